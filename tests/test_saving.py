"""Saved modules: the same bits in another process, the same rules, and refusals that name what differs."""

from __future__ import annotations

import copy
import enum
import inspect
import json
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

import lightcache_fx as lc
from axis_rules.vaes import VAES
from elsewhere import run_elsewhere
from lightcache_fx import Cache, Chunk, Policy, Residual, Swap, saving
from lightcache_fx.chunked import ChunkedRegion
from lightcache_fx.encoding import Tree, decode, encode, encode_tree
from lightcache_fx.errors import ArgumentError, LoadError, SaveError, SignatureError, TransformError
from toys import Denoiser, Resnet, Tower, latent, prompt
from zoo import ZOO, run_inputs

BLOCKS = Residual(first="transformer_blocks.1", last="transformer_blocks.2")
TIMES = [900.0, 700.0, 500.0, 300.0, 100.0]


def run(module: Any, seed: int = 0, times: list[float] = TIMES) -> list[torch.Tensor]:
    """One generation of a toy."""
    given = prompt(seed)
    with torch.no_grad():
        return [module(latent(100 * seed + i), torch.tensor(t), given) for i, t in enumerate(times)]


def saved(module: nn.Module, policy: Policy, folder: Path, **options: Any) -> Any:
    """A transformed toy that has been called and saved."""
    fast = lc.transform(module, policy)
    run(fast, times=TIMES[:1])
    lc.reset(fast)
    lc.save(fast, folder, **options)
    return fast


def assert_same_programs(fast: nn.Module, loaded: nn.Module, method: str | None = None) -> None:
    mine, its = (lc.inspect(module, method) for module in (fast, loaded))
    assert mine.programs.keys() == its.programs.keys()
    for name, program in mine.programs.items():
        assert lc.diff(program, its.programs[name]) == ""
        assert (program.inputs, program.num_outputs, program.state) == (
            its.programs[name].inputs, its.programs[name].num_outputs, its.programs[name].state)  # fmt: skip
    assert str(mine.plan) == str(its.plan)
    assert mine.plan == its.plan
    assert mine.route == its.route


def tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


# In another process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("sd", Policy.deepcache(interval=3, branch=0)),
        (
            "sd3",
            Policy(cache=Cache(cut=BLOCKS, interval=2)),
        ),
    ],
)
def test_a_model_without_its_library(tmp_path: Path, name: str, policy: Policy) -> None:
    model, make_inputs = ZOO[name].build()
    fast = lc.transform(model, policy)
    runs = [run_inputs(make_inputs, seed, 5) for seed in range(3)]
    fast(**runs[0][0])
    lc.reset(fast)
    lc.save(fast, tmp_path / "saved")
    before = dict(lc.inspect(fast).counts)
    expected = []
    for calls in runs:
        lc.reset(fast)
        expected += [tensors(fast(**call)) for call in calls]
    counted = {kind: count - before.get(kind, 0) for kind, count in lc.inspect(fast).counts.items()}
    found, counts = run_elsewhere(tmp_path / "saved", tmp_path, [[((), call) for call in calls] for calls in runs])
    assert counts == counted
    assert counts["reuse"] > 0
    assert counts["prologue"] == 3
    assert len(found) == len(expected) == 15
    for mine, its in zip(expected, found, strict=True):
        assert all(map(torch.equal, mine, its))
    assert_same_programs(fast, lc.load(tmp_path / "saved"))


OPEN = """
import sys
import torch
if sys.argv[1]:
    __import__(sys.argv[1])
for file in sys.argv[2:]:
    program = torch.export.load(file)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    args = [torch.ones(value.shape, dtype=value.dtype) for value in values]
    calls_regions = any("lightcache.region" in str(node.target) for node in program.graph.nodes)
    print(calls_regions or len(program.module()(*args)))
"""


def test_archives_open_by_torch_alone(tmp_path: Path) -> None:
    """Those without regions run there, too; those with regions need their operator, which this package registers."""
    fast = lc.transform(Denoiser(), Policy(cache=Cache(cut=0, interval=3), chunk=Chunk(budget="50%")))
    fast(latent(0, 64), torch.tensor(9.0), prompt(0, 64))
    lc.save(fast, tmp_path / "saved")
    files = sorted((tmp_path / "saved").glob("*.pt2"))
    bodies = [file for file in files if ".body_" in file.name]
    assert 0 < len(bodies) < len(files)
    for package, given in (("", bodies), ("lightcache_fx", files)):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, package, *map(str, given)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) == len(given)
        assert done.stdout.count("True") == len(given) - len(bodies)


def regions_of(module: nn.Module) -> list[ChunkedRegion]:
    graphs = [program.graph_module for program in lc.inspect(module).programs.values()]
    return [found for graph in graphs for found in graph.modules() if isinstance(found, ChunkedRegion)]


def test_chunks(tmp_path: Path) -> None:
    """Norms split, results over inputs, parts written directly, and all of it twice, as overwriting must not last."""
    torch.manual_seed(0)
    size = 64
    fast = lc.transform(Resnet(), Policy(chunk=Chunk(budget=int(2.4 * 8 * size * size * 4))))
    calls = [((torch.randn(1, 1, size, size), torch.tensor(float(t))), {}) for t in (9, 8, 7)]
    expected = [tensors(fast(*args)) for args, _ in calls]
    lc.save(fast, tmp_path / "saved")
    assert any(region.overwrites for region in regions_of(fast))
    assert any(region.direct(0) is not None for region in regions_of(fast))
    found, _ = run_elsewhere(tmp_path / "saved", tmp_path, [calls, calls])
    for mine, its in zip(expected * 2, found, strict=True):
        assert all(map(torch.equal, mine, its))
    loaded = lc.load(tmp_path / "saved")
    assert_same_programs(fast, loaded)
    for mine, its in zip(regions_of(fast), regions_of(loaded), strict=True):
        assert (mine.chunks, mine.outputs, mine.overwrites) == (its.chunks, its.outputs, its.overwrites)
        assert mine.memory_peak(1) == its.memory_peak(1)


def test_chunks_and_a_cut(tmp_path: Path) -> None:
    fast = saved(Tower(), Policy(cache=Cache(cut=0, interval=2), chunk=Chunk(budget="70%")), tmp_path / "saved")
    assert regions_of(fast)
    loaded = lc.load(tmp_path / "saved")
    assert_same_programs(fast, loaded)
    for seed in range(2):
        assert all(map(torch.equal, run(fast, seed), run(loaded, seed)))


def test_an_autoencoder(tmp_path: Path) -> None:
    vae = VAES["kl"].build()
    given = torch.randn(3, vae.config.latent_channels, 6, 8, generator=torch.Generator().manual_seed(0))
    fast = lc.transform(vae, Policy(decode=lc.Decode(frames=1)))
    (expected,) = fast.decode(given, return_dict=False)
    lc.save(fast, tmp_path / "saved")
    ((found,),), counts = run_elsewhere(
        tmp_path / "saved", tmp_path, [[((given,), {"return_dict": False})]], method="decode"
    )
    assert torch.equal(found, expected)
    assert counts == {"full": 1}
    loaded = lc.load(tmp_path / "saved")
    with pytest.raises(SignatureError, match=r"^AutoencoderKL\.encode was not called before it was saved"):
        loaded.encode(torch.randn(1, 3, 8, 8))


# Called as the original ---------------------------------------------------------------------------------------------


def test_two_signatures_and_their_runs(tmp_path: Path) -> None:
    model = Denoiser()
    fast = lc.transform(model, Policy.deepcache(3, 0))
    run(fast)
    with torch.no_grad():
        fast(latent(0), torch.tensor(900.0), prompt(0), scale=2.0)
        fast(latent(0), 900, prompt(0))
    lc.reset(fast)
    lc.save(fast, tmp_path / "saved")
    loaded: Any = lc.load(tmp_path / "saved")
    assert lc.inspect(loaded).plan == lc.inspect(fast).plan  # of the signature that was used last
    assert all(map(torch.equal, run(fast), run(loaded)))
    kwargs = {"encoder_hidden_states": prompt(1), "timestep": torch.tensor(900.0), "scale": 2.0, "sample": latent(1)}
    assert torch.equal(loaded(**kwargs), fast(**kwargs))
    assert not torch.equal(loaded(**kwargs), loaded(**{**kwargs, "scale": 1.0}))
    assert torch.equal(loaded(latent(0), 800, prompt(0)), fast(latent(0), 800, prompt(0)))
    assert str(inspect.signature(loaded.forward)) == "(sample, timestep, encoder_hidden_states, scale=1.0)"
    assert type(loaded).__name__ == "Denoiser"
    assert not isinstance(loaded, Denoiser)


def test_branches_and_marked_runs(tmp_path: Path) -> None:
    fast = saved(Denoiser(), Policy.deepcache(3, 0), tmp_path / "saved")
    loaded: Any = lc.load(tmp_path / "saved")

    def guided(module: Any) -> list[torch.Tensor]:
        found = []
        with lc.marked_run(num_steps=4), torch.no_grad():
            for step in range(4):
                for seed, name in enumerate(("cond", "uncond")):
                    with module.cache_context(name):
                        found.append(module(latent(step), torch.tensor(900.0 - step), prompt(seed)))
                lc.step_done()
        return found

    assert all(map(torch.equal, guided(fast), guided(loaded)))
    assert lc.inspect(loaded).counts == {"prologue": 2, "full": 4, "reuse": 4}
    assert lc.inspect(loaded).kept_bytes == 0


class Nested(nn.Module):
    """Returns a tree, with a constant in it, and takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("unread", torch.zeros(2), persistent=False)
        self.phases = nn.Parameter(torch.randn(4, dtype=torch.complex64), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last), requires_grad=False)
        self.eval()

    def forward(self, x: torch.Tensor, *, extra: dict[str, Any], **others: Any) -> Any:
        turned = torch.view_as_real(self.phases * x[0, :, 0, 0]).sum()
        y = F.conv2d(x + self.table[:, None, None] * self.count, self.weight) * turned
        return {"y": [y + extra["shift"], others["more"][0] * torch.tensor([1.0, 2.0])[:, None, None]], "n": 7,
                "z": OrderedDict(a=y)}  # fmt: skip


def test_trees_buffers_and_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested()
    fast = lc.transform(model)
    call = {"x": torch.randn(1, 4, 6, 6), "extra": {"shift": torch.ones(1), "flag": None}, "more": (torch.ones(1), "a")}
    expected: Any = fast(**call)
    lc.save(fast, tmp_path / "saved")
    loaded: Any = lc.load(tmp_path / "saved")
    found = loaded(**call)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert found["n"] == 7
    assert all(map(torch.equal, tensors(found), tensors(expected)))
    assert loaded.weight.stride() == model.weight.stride() != loaded.weight.contiguous().stride()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert "table" in dict(loaded.named_buffers())
    assert "unread" not in dict(loaded.named_buffers())
    with pytest.raises(SignatureError, match=r"more\[1\] is 'b', saved 'a'"):
        loaded(**{**call, "more": (torch.ones(1), "b")})


def test_an_output_class_becomes_a_named_tuple(tmp_path: Path) -> None:
    model, make_inputs = ZOO["sd"].build()
    fast = lc.transform(model)
    inputs = {**make_inputs(0), "return_dict": True}
    expected = fast(**inputs)
    assert isinstance(expected, diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput)
    lc.save(fast, tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    found: Any = loaded(**inputs)
    assert torch.equal(found.sample, expected.sample)
    assert torch.equal(found[0], expected[0])
    assert type(found).__name__ == "UNet2DConditionOutput"
    with pytest.raises(SignatureError, match="return_dict is False, saved True"):
        loaded(**{**inputs, "return_dict": False})


CALL = (latent(0), torch.tensor(900.0), prompt(0))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((latent(0, 3), CALL[1], CALL[2]), r"sample is float32\[3, 4\] on cpu, saved float32\[2, 4\] on cpu"),
        ((CALL[0].double(), CALL[1], CALL[2]), r"sample is float64\[2, 4\] on cpu, saved float32\[2, 4\] on cpu"),
        ((CALL[0].t().contiguous().t(), CALL[1], CALL[2]), r"sample is float32\[2, 4\], strides \[1, 2\] on cpu"),
        ((CALL[0], 900, CALL[2]), r"timestep is a Python int, saved float32\[\] on cpu"),
        ((*CALL, 3.0), r"scale is 3\.0, saved 1\.0"),
        ((*CALL, 1), r"scale is 1, saved 1\.0"),
        ((CALL[0], CALL[1], [CALL[2]]), r"encoder_hidden_states\[0\] is float32\[2, 3\] on cpu, saved without it"),
    ],
)
def test_another_signature_is_refused(tmp_path: Path, args: tuple[Any, ...], expected: str) -> None:
    saved(Denoiser(), Policy(), tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    with pytest.raises(SignatureError, match=rf"^Denoiser\.forward has no programs for this call: {expected}"):
        loaded(*args)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        loaded(*CALL, guidance=1)
    assert torch.equal(loaded(*CALL), Denoiser()(*CALL))  # and it goes on


@pytest.mark.parametrize("cut", ["blocks.3.1", "blocks.*.1"])
def test_a_cut_at_modules_without_weights(tmp_path: Path, cut: str) -> None:
    """Of the module only its weights are saved, so these have no place there: the programs know what is kept."""
    fast = saved(Tower(), Policy(cache=Cache(cut=cut, interval=2)), tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    assert all(map(torch.equal, run(fast), run(loaded)))
    assert lc.inspect(loaded).counts["reuse"] == 2


# Weights ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """The output layer's weight is the first layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.leave = nn.Linear(4, 4, bias=False)
        self.leave.weight = self.enter.weight
        self.eval().requires_grad_(False)

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> torch.Tensor:
        result: torch.Tensor = self.leave(self.enter(sample)) * timestep + encoder_hidden_states.sum()
        return result


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    fast = saved(Tied(), Policy(), tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "weights.safetensors")) == {"enter.weight", "enter.bias"}
    loaded: Any = lc.load(tmp_path / "saved")
    assert loaded.leave.weight is loaded.enter.weight
    assert len(list(loaded.parameters())) == 2
    assert all(map(torch.equal, run(fast), run(loaded)))


@pytest.mark.parametrize("kept", ["enter.weight", "leave.weight"])
def test_weights_by_reference(tmp_path: Path, kept: str) -> None:
    """Of tied weights the user's file has either name."""
    model = Tied()
    own = tmp_path / "own.safetensors"
    save_file({kept: model.enter.weight, "enter.bias": model.enter.bias}, own)
    fast = saved(model, Policy(), tmp_path / "saved", weights=own)
    assert not (tmp_path / "saved" / "weights.safetensors").exists()
    with pytest.raises(LoadError, match=r"pass weights=\.\.\., the path of what was saved as own\.safetensors$"):
        lc.load(tmp_path / "saved")
    assert all(map(torch.equal, run(fast), run(lc.load(tmp_path / "saved", weights=own))))
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({kept: model.enter.weight}, shards[0])
    save_file({"enter.bias": model.enter.bias}, shards[1])
    assert all(map(torch.equal, run(fast), run(lc.load(tmp_path / "saved", weights=shards))))


def test_a_diffusers_folder_serves_as_weights(tmp_path: Path) -> None:
    model, make_inputs = ZOO["sd"].build()
    model.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    fast = lc.transform(model)
    (expected,) = fast(**make_inputs(0))
    lc.save(fast, tmp_path / "saved", weights=tmp_path / "unet")
    found, _ = run_elsewhere(tmp_path / "saved", tmp_path, [[((), make_inputs(0))]], weights=str(tmp_path / "unet"))
    assert torch.equal(found[0][0], expected)


def changed(path: Path, **tensors_: torch.Tensor | None) -> Path:
    """A copy of a file of weights, some of them changed or gone."""
    content = {**load_file(path), **{name.replace("__", "."): value for name, value in tensors_.items()}}
    other = path.with_name("other.safetensors")
    save_file({name: value for name, value in content.items() if value is not None}, other)
    return other


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"enter__bias": None}, r"they have no 'enter\.bias'"),
        ({"enter__extra": torch.ones(1)}, "the model has no 'enter.extra'"),
        ({"enter__bias": torch.ones(5)}, r"'enter\.bias' is \[5\] of float32 there, expected \[4\] of float32"),
        ({"enter__bias": torch.ones(4).half()}, r"'enter\.bias' is \[4\] of float16 there, expected \[4\] of float32"),
        ({"enter__bias": torch.ones(4)}, "enter.bias in other.safetensors has other values than it was saved with"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], expected: str) -> None:
    fast = saved(Tied(), Policy(), tmp_path / "saved")
    other = changed(tmp_path / "saved" / "weights.safetensors", **change)
    with pytest.raises(LoadError, match=f"^load: weights.*{expected}"):
        lc.load(tmp_path / "saved", weights=other)
    with pytest.raises(SaveError, match=f"^save: weights.*{expected}.*; save without weights"):
        lc.save(fast, tmp_path / "again", weights=other)
    assert not (tmp_path / "again").exists()


def test_unchecked_hashes_are_the_users_choice(tmp_path: Path) -> None:
    saved(Tied(), Policy(), tmp_path / "saved")
    other = changed(tmp_path / "saved" / "weights.safetensors", enter__bias=torch.ones(4))
    loaded: Any = lc.load(tmp_path / "saved", weights=other, check_weights=False)
    assert torch.equal(loaded.enter.bias, torch.ones(4))


def test_edited_and_loaded_weights_are_seen(tmp_path: Path) -> None:
    model = Denoiser()
    saved(model, Policy.deepcache(3, 0), tmp_path / "saved")
    loaded: Any = lc.load(tmp_path / "saved")
    other = Denoiser(seed=1)
    loaded.load_state_dict(other.state_dict())
    assert all(map(torch.equal, run(loaded), run(lc.transform(other, Policy.deepcache(3, 0)))))
    with torch.no_grad():
        for module in (loaded, other):
            module.get_parameter("middle.embed.0.weight").mul_(2)
    assert all(map(torch.equal, run(loaded), run(lc.transform(other, Policy.deepcache(3, 0)))))
    loaded.load_state_dict({name: w.double() for name, w in other.state_dict().items()}, assign=True)
    with pytest.raises(SignatureError, match="not as it was loaded: weights have another dtype"):
        run(loaded)


def test_casts_and_moves_are_refused_where_they_change_something(tmp_path: Path) -> None:
    fast = saved(Denoiser(), Policy(), tmp_path / "saved")
    loaded: Any = lc.load(tmp_path / "saved")
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))
    for change in (loaded.half, lambda: loaded.to("meta"), lambda: loaded.to(torch.float64)):
        with pytest.raises(TransformError, match="were made for float32 on cpu and cannot run in"):
            change()
    assert loaded.to("cpu").float() is loaded
    assert all(map(torch.equal, run(fast), run(loaded)))
    with pytest.raises(SignatureError, match=r"training mode: call \.eval\(\)"):
        run(loaded.train())
    assert all(map(torch.equal, run(fast), run(loaded.eval())))


def test_what_a_loaded_module_has_no_original_for(tmp_path: Path) -> None:
    saved(Denoiser(), Policy(), tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    with pytest.raises(TransformError, match="there is no original"):
        lc.restore(loaded)
    with pytest.raises(TransformError, match="load it once more"):
        copy.deepcopy(loaded)
    with pytest.raises(SaveError, match="copy the folder"):
        lc.save(loaded, tmp_path / "again")
    with pytest.raises(TransformError, match="transformed already"):
        lc.transform(loaded)


# Refused at save ----------------------------------------------------------------------------------------------------


def untransformed(folder: Path) -> None:
    lc.save(Denoiser(), folder)


def uncalled(folder: Path) -> None:
    lc.save(lc.transform(Denoiser()), folder)


def changed_since(folder: Path) -> None:
    fast = lc.transform(Denoiser())
    run(fast)
    lc.save(fast.double(), folder)


def swapped(folder: Path) -> None:
    saved(Tower(), Policy(swap=Swap(budget="60%")), folder)


class Mode(enum.Enum):
    FAST = 1


class Moded(Denoiser):
    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, mode: Mode = Mode.FAST) -> Any:
        return super().forward(sample, timestep, encoder_hidden_states)


def with_an_enum(folder: Path) -> None:
    saved(Moded(), Policy(), folder)


class Stubborn(nn.Module):
    """Branches on a value, so that it stays a call of its own class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.abs().max()) >= 0 else x


class Opaque(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.stubborn = Stubborn()

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return super().forward(self.stubborn(sample), timestep, encoder_hidden_states)


def with_an_opaque_submodule(folder: Path) -> None:
    saved(Opaque(), Policy(), folder)


@torch.library.custom_op("lightcache_fx_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Foreign(Denoiser):
    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return super().forward(twice(sample), timestep, encoder_hidden_states)


def with_a_foreign_operator(folder: Path) -> None:
    saved(Foreign(), Policy(), folder)


def over_a_folder(folder: Path) -> None:
    (folder / "mine").mkdir(parents=True)
    saved(Denoiser(), Policy(), folder)


def over_something_else(folder: Path) -> None:
    (folder / "mine").mkdir(parents=True)
    saved(Denoiser(), Policy(), folder, overwrite=True)


def without_a_parent(folder: Path) -> None:
    saved(Denoiser(), Policy(), folder / "deeper")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (untransformed, "expected a module that lightcache_fx.transform returned, got Denoiser"),
        (uncalled, "Denoiser has no programs in the state that it is in; call it once"),
        (changed_since, "Denoiser has no programs in the state that it is in"),
        (swapped, r"save: Tower\.forward swaps weights or features"),
        (with_an_enum, r"save: Moded\.forward has an argument that cannot be saved: a .*\.Mode"),
        (with_an_opaque_submodule, "calls a submodule of the model's own class"),
        (with_a_foreign_operator, r"calls lightcache_fx_tests\.twice\.default, which is no operator of torch's own"),
        (over_a_folder, "exists; name another folder, or pass overwrite=True"),
        (over_something_else, "is not overwritten, since it is not a saved module"),
        (without_a_parent, "there is no folder .* to make deeper in"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    with pytest.raises((SaveError, ArgumentError), match=expected):
        make(tmp_path / "saved")
    assert {path.name for path in tmp_path.rglob("*")} <= {"saved", "mine"}


# Atomic -------------------------------------------------------------------------------------------------------------


def test_overwriting(tmp_path: Path) -> None:
    saved(Denoiser(), Policy(), tmp_path / "saved")
    fast = saved(Denoiser(seed=1), Policy.deepcache(3, 0), tmp_path / "saved", overwrite=True)
    assert all(map(torch.equal, run(fast), run(lc.load(tmp_path / "saved"))))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("after", range(8))
def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Whichever write, sync or renaming fails; as a whole or not at all, and nothing left beside it."""
    before = saved(Denoiser(), Policy(), tmp_path / "saved")
    fast = lc.transform(Denoiser(seed=1), Policy())
    run(fast)
    real_sync, real_rename, real_write = saving._sync, Path.rename, Path.write_bytes
    left = [after]

    def step(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return real(*args)

        return call

    monkeypatch.setattr(saving, "_sync", step(real_sync))
    monkeypatch.setattr(Path, "rename", step(real_rename))
    monkeypatch.setattr(Path, "write_bytes", step(real_write))
    with pytest.raises(KeyboardInterrupt):
        lc.save(fast, tmp_path / "saved", overwrite=True)
    left[0] = after
    with pytest.raises(KeyboardInterrupt):
        lc.save(fast, tmp_path / "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert all(map(torch.equal, run(before), run(lc.load(tmp_path / "saved"))))


def test_a_killed_save_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the power went: nothing is cleaned up."""
    fast = lc.transform(Denoiser(), Policy())
    run(fast)
    monkeypatch.setattr(saving.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(saving, "to_json", lambda record: (_ for _ in ()).throw(OSError("gone")) if isinstance(
        record, saving.Manifest) else real_json(record))  # fmt: skip
    with pytest.raises(OSError, match="gone"):
        lc.save(fast, tmp_path / "saved")
    folders = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()]
    assert any((folder / "weights.safetensors").exists() for folder in folders)
    for folder in folders:
        with pytest.raises(LoadError, match=r"has no manifest\.json"):
            lc.load(folder)


real_json = saving.to_json


# What is written ----------------------------------------------------------------------------------------------------


def test_archives_are_plain_and_hold_no_pickle(tmp_path: Path) -> None:
    fast = saved(Denoiser(), Policy.deepcache(3, 0), tmp_path / "saved")
    archives = sorted((tmp_path / "saved").glob("*.pt2"))
    assert [path.name for path in archives] == [f"signature_0.{name}.pt2" for name in ("full", "prologue", "reuse")]
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        assert not [name for name, content in contents.items() if content.startswith((b"\x80", b"PK"))]
        program = torch.export.load(path)  # as any other tool would
        name = path.name.split(".")[1]
        inputs = [torch.rand(node.meta["val"].shape) for node in program.graph.nodes if node.op == "placeholder"]
        mine = lc.inspect(fast).programs[name].graph_module
        assert all(map(torch.equal, program.module()(*inputs), mine(*inputs)))
    text = b"".join(path.read_bytes() for path in (tmp_path / "saved").iterdir())
    assert str(Path(__file__).parent).encode() not in text, "paths of this machine are nobody's business"
    assert json.loads((tmp_path / "saved" / "manifest.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -2.5, float("inf"), 1e-310, 2 + 3j, "text", b"\x00\xff", torch.float16, torch.device("cuda:1"),
     torch.strided, torch.channels_last, torch.Size([2, 3]), slice(1, None, 2), range(1, 9, 2), ..., (1, [2.0, None]),
     {"a": (1,), 2: []}],
    ids=repr,
)  # fmt: skip
def test_values_survive_json(value: object) -> None:
    found = decode(json.loads(json.dumps(encode(value))))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("data", [1.5, [1], {}, {"float": "x"}, {"dtype": "nn"}, {"a": 1, "b": 2}, {"device": "x y"},
                                  {"eval": "1"}, {"slice": [1, 2, 3, 4]}])  # fmt: skip
def test_other_json_is_no_value(data: object) -> None:
    with pytest.raises(ValueError, match="expected a value as JSON"):
        decode(data)


def test_trees_survive_json() -> None:
    tree = {"a": [1, (2, None)], 3: OrderedDict(x=4)}
    spec = pytree.tree_structure(tree)
    data = json.loads(json.dumps(encode_tree(spec)))
    assert Tree(data).spec() == spec
    assert Tree(data).fill(pytree.tree_leaves(tree)) == tree
    for wrong in (1, {"tuple": [0, 0]}, {"tuple": [0, 2]}, {"set": [0]}, [0], {"dict": [0]}, {"record": ["a b", []]}):
        with pytest.raises(ValueError, match=r"tree|leaves|names|identifier"):
            Tree(wrong)
