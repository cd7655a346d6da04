"""Compiled packages in a saved module: taken instead of compiling, and refused where they do not fit."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import Cache, Chunk, Compile, Policy
from lightcache_fx.errors import LoadError, LoweringError, SaveError
from lightcache_fx.lowering import CompileState
from lightcache_fx.packages import Packages
from lightcache_fx.saved_packages import _identity
from toys import Denoiser, latent, prompt

TIMES = [900.0, 700.0, 500.0, 300.0]
ROWS = 64
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}
POLICY = Policy(
    cache=Cache(cut=0, interval=3), hoist=False, chunk=Chunk(budget="50%"), compile=Compile(options=QUICK)
)  # fmt: skip

SCRIPT = """
import os, sys
import torch

BLOCKED = {"diffusers", "transformers", "accelerate", "safetensors", "toys"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


def no_compiler(*args, **kwargs):
    raise AssertionError("something is compiled")


sys.meta_path.insert(0, Blocker())
folder, exchange, compiled = sys.argv[1:]
torch.set_num_threads(1)
calls = torch.load(f"{exchange}/calls.pt", weights_only=True)
import torch._inductor.compile_fx as inductor
import lightcache_fx as lc

inductor.compile_fx = inductor.compile_fx_inner = no_compiler
module = lc.load(folder, compiled=compiled == "True")
results = [module(*args) for args in calls]
states = {name: bound.compile_state for name, bound in module._lightcache.runtime.repertoire.latest().bound.items()}
counts = {name: [state.compiled, state.loaded, len(state.parts)] for name, state in states.items()}
assert not BLOCKED & set(sys.modules)
torch.save({"results": results, "counts": counts}, f"{exchange}/results.pt")
"""


class Saved(NamedTuple):
    """A module that was compiled, called and saved with its packages."""

    folder: Path
    module: nn.Module
    results: list[torch.Tensor]


def inputs() -> list[tuple[torch.Tensor, ...]]:
    return [(latent(i, ROWS), torch.tensor(time), prompt(0, ROWS)) for i, time in enumerate(TIMES)]


def run(module: nn.Module) -> list[torch.Tensor]:
    lc.reset(module)
    with torch.no_grad():
        return [module(*args) for args in inputs()]


def states(module: nn.Module) -> dict[str, CompileState]:
    found = {name: bound.compile_state for name, bound in module._lightcache.runtime.repertoire.latest().bound.items()}
    return {name: state for name, state in found.items() if state is not None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("packages") / "saved"
    module = lc.transform(Denoiser(), POLICY)
    results = run(module)
    lc.save(module, folder, compiled=True)
    return Saved(folder, module, results)


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    shutil.copytree(saved.folder, tmp_path / "saved")
    return tmp_path / "saved"


def elsewhere(folder: Path, exchange: Path, *, compiled: bool) -> subprocess.CompletedProcess[str]:
    """Load and call it in a process that can compile nothing: neither Inductor nor a C++ compiler is there."""
    torch.save(inputs(), exchange / "calls.pt")
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(exchange), str(compiled)],
        cwd=exchange,
        env={**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(exchange / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# Taken ---------------------------------------------------------------------------------------------------------------


def test_another_process_compiles_nothing(saved: Saved, tmp_path: Path) -> None:
    done = elsewhere(saved.folder, tmp_path, compiled=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    for mine, its in zip(saved.results, found["results"], strict=True):
        assert float((mine - its).abs().max()) <= 1e-6 * float(mine.abs().max())
    parts = {name: len(state.parts) for name, state in states(saved.module).items()}
    assert found["counts"] == {name: [0, count, count] for name, count in parts.items()}
    assert regions_of(saved.module)
    assert not list((tmp_path / "cache").rglob("*.so"))


def regions_of(module: nn.Module) -> list[Any]:
    graphs = [program.graph_module.graph for program in lc.inspect(module).programs.values()]
    return [node.meta["lightcache_region"] for graph in graphs for node in graph.nodes
            if "lightcache_region" in node.meta]  # fmt: skip


def test_without_packages_that_process_fails(saved: Saved, tmp_path: Path) -> None:
    done = elsewhere(saved.folder, tmp_path, compiled=False)
    assert "LoweringError" in done.stderr
    assert "something is compiled" in done.stderr


def test_packages_are_not_shared_with_who_did_not_ask(saved: Saved) -> None:
    """The same programs in the same process: what was compiled here stays apart from what comes from a folder."""
    loaded = lc.load(saved.folder, compiled=True)
    run(loaded)
    mine, its = ({part for state in states(m).values() for part in state.parts} for m in (saved.module, loaded))
    assert not mine & its
    assert all(part.loaded == 0 for part in mine)
    assert all((part.times, part.loaded) == (0, 1) for part in its)
    assert "from packages" in str(lc.inspect(loaded))


def test_another_layout_is_compiled_anew(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    """A weight that lies otherwise than it did; what it is an argument of has no package for that."""
    loaded = lc.load(saved.folder, compiled=True)
    loaded.inner.weight.data = loaded.inner.weight.data.t().contiguous().t()
    with caplog.at_level(logging.INFO, "lightcache_fx"):
        results = run(loaded)
    for mine, its in zip(saved.results, results, strict=True):
        assert float((mine - its).abs().max()) <= 1e-6 * float(mine.abs().max())
    assert "is compiled anew: no package is for arguments laid out as" in caplog.text
    assert sum(state.compiled for state in states(loaded).values()) > 0


def test_what_the_folder_holds(saved: Saved) -> None:
    manifest = json.loads((saved.folder / "manifest.json").read_text())
    parts = {part.digest for state in states(saved.module).values() for part in state.parts}
    assert {record["part"] for record in manifest["packages"]} == parts
    for record in manifest["packages"]:
        content = (saved.folder / "compiled" / "cpu" / record["file"]).read_bytes()
        assert record["content"] == {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert record["torch"] == torch.__version__
        assert record["hardware"]["capability"] == torch.backends.cpu.get_cpu_capability()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert not any(name.endswith((".pkl", ".pt")) for name in archive.namelist())
    assert sorted(path.name for path in (saved.folder / "compiled" / "cpu").iterdir()) == sorted(
        record["file"] for record in manifest["packages"]
    )


def test_without_asking_no_package_is_read(folder: Path) -> None:
    shutil.rmtree(folder / "compiled")
    assert "from packages" not in str(lc.inspect(lc.load(folder)))


# Refused -------------------------------------------------------------------------------------------------------------

FIRST, SECOND = (f"compiled/cpu/part_{i}.pt2" for i in range(2))


def flip(folder: Path) -> None:
    content = bytearray((folder / FIRST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / FIRST).write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size // 2)


def remove(folder: Path) -> None:
    (folder / FIRST).unlink()


def swap(folder: Path) -> None:
    one, other = ((folder / name).read_bytes() for name in (FIRST, SECOND))
    (folder / FIRST).write_bytes(other)
    (folder / SECOND).write_bytes(one)


def link_the_file(folder: Path) -> None:
    (folder / FIRST).rename(folder / "part")
    (folder / FIRST).symlink_to(folder / "part")


def link_the_folder(folder: Path) -> None:
    (folder / "compiled").rename(folder / "elsewhere")
    (folder / "compiled").symlink_to(folder / "elsewhere")


def edit_manifest(folder: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the records of packages, with hashes that fit the files."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest["packages"])
    for record in manifest["packages"]:
        file = folder / "compiled" / record["hardware"]["type"] / record["file"]
        if file.is_file():
            content = file.read_bytes()
            record["content"] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def rewrite(folder: Path, more: dict[str, bytes], *, without: str = "") -> None:
    """Another zip file in the place of the first package, with hashes that fit it."""
    with zipfile.ZipFile(folder / FIRST) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if not (without and name.endswith(without))}
    with zipfile.ZipFile(folder / FIRST, "w") as archive:
        for name, content in {**entries, **more}.items():
            archive.writestr(name, content)
    edit_manifest(folder, lambda records: None)


def swap_with_hashes(folder: Path) -> None:
    swap(folder)
    edit_manifest(folder, lambda records: None)


def climb_out(folder: Path) -> None:
    rewrite(folder, {"part_0/data/aotinductor/model/../../../../evil.so": b"x"})


def hold_a_pickle(folder: Path) -> None:
    rewrite(folder, {"part_0/data/weights/model.pt": b"x"})


def be_two_packages(folder: Path) -> None:
    rewrite(folder, {"part_1/archive_version": b"0"})


def hold_another_library(folder: Path) -> None:
    rewrite(folder, {"part_0/data/aotinductor/model/evil.so": b"x"})


def lose_the_library(folder: Path) -> None:
    rewrite(folder, {}, without=".so")


def be_no_zip(folder: Path) -> None:
    (folder / FIRST).write_bytes(b"no zip file")
    edit_manifest(folder, lambda records: None)


def be_of_another_part(folder: Path) -> None:
    """The record and the package agree, and no program has such a part."""

    def edit(records: list[dict[str, Any]]) -> None:
        records[0]["part"] = "0" * 64

    record = json.loads((folder / "manifest.json").read_text())["packages"][0]
    strides = tuple(map(tuple, record["strides"]))
    content = (folder / FIRST).read_bytes()
    content = content.replace(_identity(record["part"], strides).encode(), _identity("0" * 64, strides).encode())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {info.filename: _read(content, info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / FIRST, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    edit_manifest(folder, edit)


def _read(content: bytes, info: zipfile.ZipInfo) -> bytes:
    """An entry that is stored, its checksum unread."""
    header = content[info.header_offset : info.header_offset + 30]
    begin = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return content[begin : begin + info.file_size]


def another_torch(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0].update(torch="2.12.0"))


def another_capability(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0]["hardware"].update(capability="SVE256"))


def more_features(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0]["hardware"].update(features=["avx9"]))


def another_machine(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0]["hardware"].update(name="sparc"))


def another_kind(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0]["hardware"].update(type="mps"))


def other_settings(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0].update(settings="{}"))


def name_a_path(folder: Path) -> None:
    edit_manifest(folder, lambda records: records[0].update(file="../part_0.pt2"))


def drop_a_record(folder: Path) -> None:
    edit_manifest(folder, lambda records: records.pop(0))


def drop_all_records(folder: Path) -> None:
    edit_manifest(folder, lambda records: records.clear())


DAMAGES = [
    (flip, "is not the file that was saved: its SHA-256 differs"),
    (truncate, "it is damaged or another's"),
    (remove, "has no part_0.pt2"),
    (swap, "damaged or another's|SHA-256 differs"),
    (link_the_file, "part_0.pt2 of .* is a symbolic link"),
    (link_the_folder, "compiled of .* is a symbolic link"),
    (swap_with_hashes, "is the package of another part or another layout"),
    (climb_out, "has an entry .*evil.so', which no package of a part has"),
    (hold_a_pickle, "has an entry .*model.pt', which no package of a part has"),
    (be_two_packages, "has an entry twice, or entries of two packages"),
    (hold_another_library, "has 2 shared libraries, expected one"),
    (lose_the_library, "has 0 shared libraries, expected one"),
    (be_no_zip, "is no package of AOTInductor"),
    (be_of_another_part, "has a part that none of the . packages is of"),
    (another_torch, r"packages made by torch 2\.12\.0 run by that release alone.*any_torch=True"),
    (another_capability, "was made for cpu .* with SVE256, and this is"),
    (more_features, "without avx9; load it without compiled=True"),
    (another_machine, "was made for cpu sparc with"),
    (another_kind, "was made for mps, which is not there"),
    (other_settings, "was compiled with {}, but the policy has"),
    (name_a_path, "a file of the folder itself, got '../part_0.pt2'"),
    (drop_a_record, "has a part that none of the . packages is of"),
    (drop_all_records, "has no compiled packages"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged(folder: Path, damage: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(folder)
    opened: list[object] = []
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda *args, **kwargs: opened.append(args))
    with pytest.raises(LoadError, match=message):
        lc.load(folder, compiled=True)
    assert not opened, "code was loaded before all was checked"
    if damage is not name_a_path:
        lc.load(folder)


def test_a_package_of_no_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than there are parts, and its record agrees with it."""
    monkeypatch.setattr("lightcache_fx.lowering.part_digest", lambda *args: _first_part(folder))
    with pytest.raises(LoadError, match="is of a part that no program has"):
        lc.load(folder, compiled=True)


def _first_part(folder: Path) -> str:
    found: str = json.loads((folder / "manifest.json").read_text())["packages"][0]["part"]
    return found


def test_any_torch_compiles_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    another_torch(folder)
    with caplog.at_level(logging.INFO, "lightcache_fx"):
        loaded = lc.load(folder, compiled=True, any_torch=True)
    assert "packages made by torch 2.12.0 are left out, and programs compiled anew" in caplog.text
    assert all(state.packages is None for state in states(loaded).values())


def test_a_library_that_is_none(folder: Path) -> None:
    with zipfile.ZipFile(folder / FIRST) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
    rewrite(folder, {library: b"no library"}, without=".so")
    with pytest.raises(LoadError, match=r"part_0\.pt2 cannot be loaded by torch"):
        lc.load(folder, compiled=True)


def test_a_package_that_computes_something_else(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as its record, and wrong: its first run is compared with the program."""
    loaded = lc.load(saved.folder, compiled=True)
    right = Packages.find

    def wrong(self: Packages, part: str, strides: Any) -> Any:
        run = right(self, part, strides)
        assert run is not None
        return lambda *args: [value + 1 for value in run(*args)]

    monkeypatch.setattr(Packages, "find", wrong)
    with pytest.raises(LoweringError, match=r"the saved package computes something else .* without compiled=True"):
        loaded(*inputs()[0])


def test_a_package_that_fails(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> Any:
        raise RuntimeError("no such kernel")

    loaded = lc.load(saved.folder, compiled=True)
    monkeypatch.setattr(Packages, "find", lambda *args: fails)
    with pytest.raises(LoweringError, match=r"the saved package failed on program .*no such kernel; save the module"):
        loaded(*inputs()[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"its policy needs compile=Compile\(\)"),
        (Compile(backend="aot_eager"), "packages are Inductor's, and the policy compiles by backend 'aot_eager'"),
        (Compile(mode="reduce-overhead"), "packages hold no CUDA graphs"),
        (Compile(options={"triton.cudagraphs": True}), "packages hold no CUDA graphs"),
        (Compile(mode="max-autotune-no-cudagraphs"), "default mode, and the policy asks for 'max-autotune-no-cudagr"),
    ],
)
def test_what_cannot_be_packaged(tmp_path: Path, settings: Compile | None, message: str) -> None:
    module = lc.transform(Denoiser(), Policy(compile=settings))
    with pytest.raises(SaveError, match=message):
        lc.save(module, tmp_path / "saved", compiled=True)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Saved) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    with pytest.raises(SaveError, match=r"cannot be compiled ahead of time: RuntimeError: no compiler; save without"):
        lc.save(saved.module, tmp_path / "saved", compiled=True)
    assert not list(tmp_path.iterdir())
