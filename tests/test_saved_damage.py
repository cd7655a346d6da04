"""Damaged, foreign and edited folders: each is refused with its own reason, whether hashes tell or structure does."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightcache_fx as lc
from lightcache_fx import Chunk, Policy
from lightcache_fx.errors import LoadError
from lightcache_fx.module import runtime_of
from toys import Denoiser, Resnet, latent, prompt

FULL, REUSE, PROLOGUE = (f"signature_0.{name}.pt2" for name in ("full", "reuse", "prologue"))
SIGNATURE = "signature_0.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved modules: `cached`, with every kind of program and two signatures, and `chunked`."""
    folder = tmp_path_factory.mktemp("saved")
    fast = lc.transform(Denoiser(), Policy.deepcache(3, 0))
    for scale in (2.0, 1.0):
        fast(latent(0), torch.tensor(9.0), prompt(0), scale=scale)
    lc.save(fast, folder / "cached")
    torch.manual_seed(0)
    chunked = lc.transform(Resnet(), Policy(chunk=Chunk(budget=int(2.4 * 8 * 64 * 64 * 4))))
    chunked(torch.randn(1, 1, 64, 64))
    lc.save(chunked, folder / "chunked")
    assert lc.load(folder / "chunked")(torch.ones(1, 1, 64, 64)).shape == (1, 1, 64, 64)
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals / "cached", tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def chunked(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals / "chunked", tmp_path / "chunked")
    return tmp_path / "chunked"


def refused(folder: Path) -> str:
    with pytest.raises(LoadError) as raised:
        lc.load(folder)
    return str(raised.value)


# What hashes, sizes and the format tell -----------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    os.truncate(folder / FULL, (folder / FULL).stat().st_size // 2)


def flip_in_program(folder: Path) -> None:
    flip(folder / FULL, 2000)


def flip_in_weights(folder: Path) -> None:
    flip(folder / "weights.safetensors", -3)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "weights.safetensors", (folder / "weights.safetensors").stat().st_size - 4)


def remove_program(folder: Path) -> None:
    (folder / REUSE).unlink()


def remove_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 300)


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"name": "a web app", "format": 1}')


def later_format(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(format=2, novelty=True))


def other_torch(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(torch="2.7.1"))


def edited_plan(folder: Path) -> None:
    text = (folder / SIGNATURE).read_text()
    (folder / SIGNATURE).write_text(
        text.replace('"interval"', '"Interval"').replace('"full_flops": ', '"full_flops":1')
    )


def swapped_programs(folder: Path) -> None:
    (folder / FULL).rename(folder / "x")
    (folder / REUSE).rename(folder / FULL)
    (folder / "x").rename(folder / REUSE)


def linked_program(folder: Path) -> None:
    (folder / FULL).rename(folder.parent / "elsewhere.pt2")
    (folder / FULL).symlink_to(folder.parent / "elsewhere.pt2")


def linked_weights(folder: Path) -> None:
    (folder / "weights.safetensors").rename(folder.parent / "w.safetensors")
    (folder / "weights.safetensors").symlink_to(folder.parent / "w.safetensors")


def extra_weight(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update(extra=torch.ones(1)))


def absent_weight(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("outer.bias"))


def wrong_shape(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"outer.bias": torch.ones(5)}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "weights.safetensors")


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, rf"^{FULL} of .* has \d+ B, expected \d+ B: it is damaged or another's$"),
    (flip_in_program, rf"^{FULL} of .* is not the file that was saved: its SHA-256 differs$"),
    (flip_in_weights, r"^weights\.safetensors of .*: outer\.bias in .* has other values than it was saved with$"),
    (truncate_weights, r"^weights\.safetensors of .*: .* is cut short: it has .* of .*; get it again$"),
    (remove_program, rf"^.* has no {REUSE} \(it holds manifest\.json, "),
    (remove_weights, r"^.* has no weights\.safetensors$"),
    (remove_manifest, r"^.* has no manifest\.json \(it holds policy\.yaml, "),
    (empty, r"^.* has no manifest\.json \(it holds nothing\)$"),
    (remove_all, "^load: there is no folder "),
    (cut_manifest, r"^manifest\.json of .* is damaged: "),
    (foreign_manifest, r"^.* holds no module that lightcache_fx\.save wrote: its manifest\.json is of another kind$"),
    (later_format, r"^.* is of format 2, written by lightcache_fx 0\.1\.0; this one reads format 1: save the module"),
    (other_torch, r"^saved by torch 2\.7\.1, this is .*pass any_torch=True$"),
    (edited_plan, rf"^{SIGNATURE} of .* is not the file that was saved: its SHA-256 differs$"),
    (swapped_programs, rf"^{PROLOGUE}|^{FULL} of .* has \d+ B, expected"),
    (linked_program, rf"^{FULL} of .* is a symbolic link; saved modules hold ordinary files only$"),
    (linked_weights, r"^weights\.safetensors of .* is a symbolic link"),
    (extra_weight, r"^weights\.safetensors of .* are not those that were saved: the model has no 'extra'$"),
    (absent_weight, r"^weights\.safetensors of .* are not those that were saved: they have no 'outer\.bias'$"),
    (wrong_shape, r"'outer\.bias' is \[5\] of float32 there, expected \[4\] of float32$"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damaged(folder: Path, damage: Callable[[Path], None], expected: str) -> None:
    lc.load(folder)
    damage(folder)
    with pytest.raises(LoadError, match=expected):
        lc.load(folder)


def test_another_torch_may_be_allowed(folder: Path) -> None:
    other_torch(folder)
    loaded: Any = lc.load(folder, any_torch=True)
    assert torch.equal(
        loaded(latent(0), torch.tensor(9.0), prompt(0)), Denoiser()(latent(0), torch.tensor(9.0), prompt(0))
    )


# What structure tells, where every hash has been made anew ----------------------------------------------------------


def edit_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def put(folder: Path, name: str, content: bytes) -> None:
    """Write a file and make its hash anew, as someone would who edits on purpose."""
    (folder / name).write_bytes(content)
    record = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda m: m["files"].update({name: record}))


def edit(folder: Path, change: Callable[[Any], object], name: str = SIGNATURE) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    put(folder, name, json.dumps(data).encode())


def edit_archive(
    folder: Path,
    change: Callable[[Any], object] = lambda _: None,
    name: str = FULL,
    records: dict[str, bytes] | None = None,
) -> None:
    """Change the graph in an archive, and records beside it."""
    with zipfile.ZipFile(folder / name) as archive:
        contents = {key: archive.read(key) for key in archive.namelist()}
    root = next(iter(contents)).partition("/")[0]
    model = json.loads(contents[f"{root}/models/model.json"])
    change(model["graph_module"])
    contents[f"{root}/models/model.json"] = json.dumps(model).encode()
    contents |= {f"{root}/{key}": content for key, content in (records or {}).items()}
    with zipfile.ZipFile(folder / name, "w") as archive:
        for key, content in contents.items():
            archive.writestr(key, content)
    put(folder, name, (folder / name).read_bytes())


def node(module: Any, target: str) -> Any:
    return next(n for n in module["graph"]["nodes"] if n["target"] == f"torch.ops.aten.{target}")


def swap_consistently(folder: Path) -> None:
    full, reuse = (folder / FULL).read_bytes(), (folder / REUSE).read_bytes()
    put(folder, FULL, reuse)
    put(folder, REUSE, full)


def name_each_other(folder: Path) -> None:
    def change(data: Any) -> None:
        programs = data["programs"]
        programs["full"]["file"], programs["reuse"]["file"] = programs["reuse"]["file"], programs["full"]["file"]

    edit(folder, change)


def of_another_signature(folder: Path) -> None:
    put(folder, FULL, (folder / "signature_1.full.pt2").read_bytes())


def swap_signatures(folder: Path) -> None:
    put(folder, SIGNATURE, (folder / "signature_1.json").read_bytes())


def other_slot(folder: Path) -> None:
    edit(folder, lambda d: d["plan"]["cut"]["slots"][0].update(name="slot_7"))


def no_cut(folder: Path) -> None:
    edit(folder, lambda d: d["plan"].update(cut=None))


def other_hoisting(folder: Path) -> None:
    edit(folder, lambda d: d["plan"]["hoist"].update(values=[]))


def without_reuse(folder: Path) -> None:
    edit(folder, lambda d: d["programs"].pop("reuse"))


def another_rate(folder: Path) -> None:
    edit(folder, lambda d: d["call"]["leaves"][2].update(rate="latent"))


def another_type(folder: Path) -> None:
    edit(folder, lambda d: d["call"]["types"][0].update(shape=[3, 4]))


def another_weight(folder: Path) -> None:
    def change(data: Any) -> None:
        given = next(i for i in data["programs"]["full"]["inputs"] if i["name"] == "inner.bias")
        given["name"] = "outer.bias"

    edit(folder, change)


def fewer_inputs(folder: Path) -> None:
    edit(folder, lambda d: d["programs"]["full"]["inputs"].pop())


def more_outputs(folder: Path) -> None:
    edit(folder, lambda d: d["output"].update(tree={"tuple": [0, 1]}))


def strange_tree(folder: Path) -> None:
    edit(folder, lambda d: d["output"].update(tree={"os.system": ["true"]}))


def unknown_key(folder: Path) -> None:
    edit(folder, lambda d: d["plan"].update(surprise=1))


def wrong_kind(folder: Path) -> None:
    edit(folder, lambda d: d["plan"].update(full_flops="many"))


def unknown_policy_key(folder: Path) -> None:
    put(folder, "policy.yaml", b"cahce: {cut: 0, interval: 3}\n")


def policy_with_code(folder: Path) -> None:
    put(folder, "policy.yaml", b"cache: !!python/object/apply:os.getcwd []\n")


def other_policy(folder: Path) -> None:
    put(folder, "policy.yaml", b"hoist: false\n")


def path_in_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["files"].update({"../elsewhere.pt2": m["files"][FULL]}))


def path_in_signature(folder: Path) -> None:
    edit(folder, lambda d: d["programs"]["full"].update(file="/etc/passwd"))


def unlisted(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["files"].pop(FULL))


def zip_that_is_none(folder: Path) -> None:
    put(folder, FULL, b"PK\x03\x04 is no zip")


def zip_of_another_kind(folder: Path) -> None:
    with zipfile.ZipFile(folder / FULL, "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    put(folder, FULL, (folder / FULL).read_bytes())


class Evil:
    """Would leave a file behind, were it unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def pickled_inputs(folder: Path) -> None:
    edit_archive(folder, records={"data/sample_inputs/model.pt": pickle.dumps(Evil())})


def pickled_weights(folder: Path) -> None:
    edit_archive(folder, records={"data/weights/weight_0": pickle.dumps(Evil())})


def second_model(folder: Path) -> None:
    edit_archive(folder, records={"models/other.json": b"{}"})


def python_function(folder: Path) -> None:
    edit_archive(folder, lambda m: node(m, "tanh.default").update(target="torch.hub.load"))


def file_operator(folder: Path) -> None:
    edit_archive(folder, lambda m: node(m, "tanh.default").update(target="torch.ops.aten.from_file.default"))


def symbolic_size(folder: Path) -> None:
    evil = {"as_expr": {"expr_str": "__import__('os').system('touch evaluated')", "hint": None}}
    edit_archive(folder, lambda m: m["graph"]["tensor_values"]["tanh"]["sizes"].__setitem__(0, evil))


def importing_tree(folder: Path) -> None:
    edit_archive(folder, lambda m: m["module_call_graph"][0]["signature"].update(in_spec='[1, {"type": "x"}]'))


def metadata(folder: Path) -> None:
    edit_archive(folder, lambda m: node(m, "tanh.default")["metadata"].update(source_fn_stack="x,torch.hub.load"))


def write_to_weight(folder: Path) -> None:
    def change(module: Any) -> None:
        found = node(module, "tanh.default")
        found["target"] = "torch.ops.aten.tanh_.default"
        found["inputs"][0]["arg"]["as_tensor"]["name"] = "inner_weight"
        sizes = module["graph"]["tensor_values"]
        sizes["tanh"] = sizes["inner_weight"]

    edit_archive(folder, change)


def dangling(folder: Path) -> None:
    edit_archive(folder, lambda m: node(m, "tanh.default")["inputs"][0]["arg"]["as_tensor"].update(name="nowhere"))


def tied_to_nothing(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["weights"]["outer.bias"].update(tensor=None, tied_to="nothing"))


def weight_of_an_attribute(folder: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["weights"]["forward.x"] = {
            "tensor": None, "tied_to": "outer.bias", "is_parameter": True, "is_persistent": True}  # fmt: skip

    edit_manifest(folder, change)


def no_class_name(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(model="os.path"))


def unknown_device(folder: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["weights"]["outer.bias"]["tensor"]["device"] = "toaster"

    edit_manifest(folder, change)


def overlapping_strides(folder: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["weights"]["inner.weight"]["tensor"]["strides"] = [0, 1]

    edit_manifest(folder, change)


EDITED: list[tuple[Callable[[Path], None], str]] = [
    (
        swap_consistently,
        rf"^{FULL} holds .*0\.reuse.*expected .*0\.full.*: files have been swapped$",
    ),
    (name_each_other, rf"^{REUSE}: the graph has \d+ inputs, expected \d+ by its record$"),
    (of_another_signature, rf"^{FULL} holds .*signature_1\.full.*: files have been swapped$"),
    (swap_signatures, rf"^{SIGNATURE} is signature 1 of forward: files have been swapped$"),
    (other_slot, rf"^{SIGNATURE}: its plan's full program returns 1 tensors and .*slot_7"),
    (no_cut, rf"^{SIGNATURE}: its plan is of programs \['full', 'prologue'\], but it has"),
    (other_hoisting, rf"^{SIGNATURE}: its plan is of programs \['full', 'reuse'\], but it has"),
    (without_reuse, rf"^{SIGNATURE}: its plan is of programs \['full', 'prologue', 'reuse'\], but it has"),
    (another_rate, rf"^{SIGNATURE}: encoder_hidden_states has rate latent there, but run by the policy$"),
    (
        another_type,
        rf"^{SIGNATURE}: its full program reads the user 'sample' as float32\[2, 4\] on cpu, but",
    ),
    (
        another_weight,
        rf"^{SIGNATURE}: its full program reads the weight 'outer\.bias' as float32\[8\] on cpu, but",
    ),
    (fewer_inputs, rf"^{FULL}: the graph has \d+ inputs, expected \d+ by its record$"),
    (more_outputs, rf"^{SIGNATURE}: its plan's full program returns 2 tensors"),
    (strange_tree, rf"^{SIGNATURE} is not as lightcache_fx writes it: output\.tree: expected a tree as JSON"),
    (unknown_key, rf"^{SIGNATURE} is not as lightcache_fx writes it: plan\.surprise: Extra inputs"),
    (
        wrong_kind,
        rf"^{SIGNATURE} is not as lightcache_fx writes it: plan\.full_flops: Input should be a valid integer$",
    ),
    (unknown_policy_key, r"^policy\.yaml of .* is no policy: .*unknown key 'cahce'; did you mean 'cache'"),
    (policy_with_code, r"^policy\.yaml of .* is no policy: cannot read the policy"),
    (other_policy, rf"^{SIGNATURE}: its plan has a cut, unlike the policy$"),
    (path_in_manifest, r"^manifest\.json is not as .*a file of the folder itself, got '\.\./elsewhere\.pt2'$"),
    (path_in_signature, rf"^{SIGNATURE} is not as .*a file of the folder itself, got '/etc/passwd'$"),
    (unlisted, rf"^{FULL} is not listed in the manifest of"),
    (zip_that_is_none, rf"^{FULL} is no archive of torch\.export, or is cut short: "),
    (zip_of_another_kind, rf"^{FULL} is a zip file, but no archive of torch\.export$"),
    (pickled_inputs, rf"^{FULL} holds pickled example inputs; they are not read"),
    (pickled_weights, rf"^{FULL} holds data/weights/weight_0, which no saved program does$"),
    (second_model, rf"^{FULL} holds models/other\.json, which no saved program does$"),
    (python_function, rf"^{FULL} holds no graph of a program: it calls torch\.hub\.load, which programs do not$"),
    (file_operator, rf"^{FULL} holds no graph of a program: it calls torch\.ops\.aten\.from_file\.default"),
    (symbolic_size, rf"^{FULL} holds no graph of a program: it has a value of kind as_expr"),
    (importing_tree, rf"^{FULL} holds no graph of a program: its inputs or outputs are not a plain list"),
    (metadata, rf"^{FULL} holds no graph of a program: %tanh has metadata \['source_fn_stack'\]$"),
    (write_to_weight, rf"^{SIGNATURE}: its full program writes to an argument, by aten\.tanh_\.default$"),
    (dangling, rf"^{FULL}: torch\.export cannot read its graph: "),
    (tied_to_nothing, r"^weights\.safetensors of .* the model has no 'outer\.bias'$|tied to 'nothing'"),
    (weight_of_an_attribute, r"^'forward\.x' cannot be the name of a weight: "),
    (no_class_name, r"^'os\.path' is no name of a class or method$"),
    (unknown_device, r"^manifest\.json is not as .*outer\.bias.*device: no device 'toaster'$"),
    (overlapping_strides, r"^inner\.weight has strides \(0, 1\) for sizes \(8, 4\): elements overlap$"),
]


def test_a_cut_that_no_signature_has(folder: Path) -> None:
    """One that skips what is kept may have none, if another has it."""
    saved = runtime_of(lc.load(folder)).repertoire
    saved.check_cuts()
    assert len(saved.compiled) > 1
    for key, made in saved.compiled.items():
        saved.check_cuts()
        saved.compiled[key] = replace(made, plan=replace(made.plan, cut=None))
    with pytest.raises(LoadError, match=rf"^{SIGNATURE}: its plan has no cut, unlike the policy, and no other signatu"):
        saved.check_cuts()


@pytest.mark.parametrize(("change", "expected"), EDITED, ids=[change.__name__ for change, _ in EDITED])
def test_edited_consistently(
    folder: Path, change: Callable[[Path], None], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lc.load(folder)
    change(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=expected):
        lc.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "something of the folder was run"


@pytest.fixture(scope="module")
def deciding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved module whose steps decide for themselves, and extrapolate."""
    cache = lc.Cache(cut=0, adaptive=lc.Adaptive(threshold=0.5), order=1)
    fast = lc.transform(Denoiser(), Policy(cache=cache))
    fast(latent(0), torch.tensor(9.0), prompt(0))
    lc.save(fast, tmp_path_factory.mktemp("deciding") / "saved")
    return tmp_path_factory.getbasetemp() / "deciding0" / "saved"


PROBES: list[tuple[Callable[[Any], object], str]] = [
    (lambda d: d["plan"].update(probe=None), "its plan has no probe, unlike the policy"),
    (lambda d: d["programs"].pop("probe"), r"is of programs \['full', 'probe', 'prologue', 'reuse'\], but it has"),
    (lambda d: d["plan"]["probe"]["handed"].pop(), "its plan's probe program returns 0 tensors and"),
    (lambda d: d["programs"]["probe"]["state"].pop(), "probe program returns"),
]


@pytest.mark.parametrize(("change", "expected"), PROBES)
def test_edited_probes(deciding: Path, tmp_path: Path, change: Callable[[Any], object], expected: str) -> None:
    lc.load(deciding)
    edited = Path(shutil.copytree(deciding, tmp_path / "saved"))
    edit(edited, change)
    assert re.search(expected, refused(edited))


def test_a_probe_without_a_policy_for_it(deciding: Path, folder: Path) -> None:
    """The plan of steps that decide, in the folder of a module whose steps do not."""
    probe = json.loads((deciding / SIGNATURE).read_text())["plan"]["probe"]
    edit(folder, lambda d: d["plan"].update(probe=probe))
    assert "its plan has a probe, unlike the policy" in refused(folder)


def first_region(data: Any) -> Any:
    """The first region that overwrites an input."""
    return next(r for r in data["programs"]["full"]["regions"].values() if r["overwrites"])


def any_region(data: Any) -> Any:
    return next(iter(data["programs"]["full"]["regions"].values()))


REGIONS: list[tuple[Callable[[Any], object], str]] = [
    (lambda d: any_region(d)["chunks"].pop(), "does not write all of output 0 once and in order"),
    (lambda d: any_region(d)["chunks"].reverse(), "does not write all of output 0 once and in order|read later"),
    (lambda d: any_region(d)["chunks"][0].update(body=99), "has a chunk of body 99, but"),
    (lambda d: any_region(d)["chunks"][0].update(body=-1), "has a chunk of body -1, but"),
    (lambda d: any_region(d)["chunks"][0]["writes"][0].update(stop=10**6), "has a slice from 0 to 1000000 of"),
    (lambda d: any_region(d)["chunks"][0]["reads"].pop(), "slices of other types than it takes"),
    (lambda d: any_region(d)["outputs"][0].update(shape=[1, 8, 64, 65]), "allocates other outputs than the graph has"),
    (lambda d: any_region(d)["outputs"][0].update(strides=[1]), "other strides than sizes"),
    (lambda d: first_region(d)["overwrites"][0].update(input=99), "over input 99, which it does not have"),
    (lambda d: d["programs"]["full"]["regions"].clear(), "the graph has a region 'region_0', but its record has none"),
    (lambda d: d["programs"]["full"]["regions"].update(region_99=any_region(d)), "has a region 'region_99', but the"),
    (lambda d: first_region(d)["bodies"][0]["copied"].pop(), "inputs, expected 0 by its record"),
]


@pytest.mark.parametrize(("change", "expected"), REGIONS, ids=[expected[:40] for _, expected in REGIONS])
def test_edited_regions(chunked: Path, change: Callable[[Any], object], expected: str) -> None:
    edit(chunked, change)
    with pytest.raises(LoadError, match=expected):
        lc.load(chunked)


def load_or_reason(folder: Path) -> Any:
    try:
        return lc.load(folder)
    except LoadError as error:
        return str(error)


def test_no_region_is_made_to_write_over_what_is_not_its_own(chunked: Path) -> None:
    """Whichever input and delay an edit names: refused, or the one that was saved."""
    record = json.loads((chunked / SIGNATURE).read_text())
    regions = record["programs"]["full"]["regions"]
    accepted, tried = 0, 0
    for name, region in regions.items():
        known = [(w["output"], w["input"], w["delay"]) for w in region["overwrites"]]
        for given in range(len(region["chunks"][0]["reads"])):
            for delay in (0, 1):
                over = {"output": 0, "input": given, "delay": delay}
                edit(chunked, lambda d, n=name, o=over: d["programs"]["full"]["regions"][n].update(overwrites=[o]))
                tried += 1
                reason = "" if (0, given, delay) in known else "writes over|laid out otherwise"
                loaded = load_or_reason(chunked)
                if isinstance(loaded, str):
                    assert reason, f"{over} of {name} was saved, and is refused: {loaded}"
                    assert re.search(reason, loaded)
                    continue
                accepted += 1
                sample = torch.randn(1, 1, 64, 64)
                torch.manual_seed(0)
                expected = Resnet()(sample)
                for _ in range(2):
                    assert torch.allclose(loaded(sample), expected, atol=1e-5)
        edit(chunked, lambda d, n=name, r=region: d["programs"]["full"]["regions"].update({n: r}))
    assert 0 < accepted < tried


def test_every_truncation_and_many_flips_are_refused(folder: Path) -> None:
    """Of every file, at places all over it."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for part in range(8):
            place = len(content) * part // 8
            path.write_bytes(content[:place])
            refused(folder)
        if path.name != "manifest.json":
            for place in range(0, len(content), max(1, len(content) // 16)):
                path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
                refused(folder)
        path.write_bytes(content)
    lc.load(folder)
