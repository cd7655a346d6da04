"""`torch.compile` with this package's backend: the programs that `transform` makes, behind Dynamo's guards."""

from __future__ import annotations

import functools
import gc
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lightcache_fx as lc
from lightcache_fx import compiler as compiler_module
from lightcache_fx import dynamic as dynamic_module
from lightcache_fx.backend import graphs_of, lightcache, refuse_moving_weights
from lightcache_fx.capture import capture
from lightcache_fx.errors import ArgumentError, CaptureError, CutError, PolicyError, TransformError
from lightcache_fx.program import Program
from oracle import assert_bitwise, plain_step
from sizes_cases import batched
from toys import Denoiser, Tower, latent, prompt
from zoo import ZOO, run_inputs

TIMES = [981, 884, 787, 690, 593, 496, 399]
EAGER = lc.Compile(backend="eager")
CACHED = lc.Policy(cache=lc.Cache(cut=0, interval=3), compile=EAGER)
FAST = ["flux", "wan", "cogvideox", "pixart", "hunyuanvideo"]
SLOW = ["sd", "svd", "modelscope", "animatediff"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def behind(module: Any, policy: lc.Policy = CACHED, **settings: Any) -> Any:
    return torch.compile(module, backend=lc.backend(policy), **settings)


def steps(module: nn.Module, times: list[int] = TIMES, kind: Callable[[int], Any] = torch.tensor) -> list[torch.Tensor]:
    given = (
        {"sample": latent(i), "timestep": kind(t), "encoder_hidden_states": prompt(0)} for i, t in enumerate(times)
    )
    return [plain_step(module, **inputs)[0] for inputs in given]


def renumbered(program: Program) -> str:
    """A program's text, its values numbered in order: Dynamo leaves out calls that nothing uses, tracing later."""
    names: dict[str, str] = {}
    text = lc.format_graph(program.graph_module)
    return re.sub(r"%\w+", lambda m: names.setdefault(m[0], f"%{len(names)}"), text)


def printed(module: nn.Module) -> dict[str, str]:
    return {name: renumbered(program) for name, program in lc.inspect(module).programs.items()}


def assert_same_routes(model: nn.Module, policy: lc.Policy) -> None:
    """A run by `transform` and one behind Dynamo give the same bits by the same programs."""
    one, other = lc.transform(model, policy), behind(model, policy)
    for index, time in enumerate(TIMES):
        inputs = {"sample": latent(index), "timestep": torch.tensor(float(time))}
        assert_bitwise(plain_step(other, **inputs), plain_step(one, **inputs))
    assert printed(other) == printed(one)
    assert lc.inspect(other).counts == lc.inspect(one).counts


# The same programs as by transform --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_same_programs(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    policy = lc.Policy(cache=lc.Cache(cut="auto", interval=3), compile=EAGER)
    one, other = lc.transform(model, policy), behind(model, policy, fullgraph=True)
    for _, inputs in zip(range(5), run_inputs(make_inputs, 0, 5), strict=True):
        assert_bitwise(plain_step(other, **inputs), plain_step(one, **inputs))
    reports = lc.inspect(one), lc.inspect(other)
    assert reports[0].counts == reports[1].counts == {"prologue": 1, "full": 2, "reuse": 3}
    assert printed(other) == printed(one)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("cut", [0, "middle", ["middle.layer"], lc.Residual(first="middle", last="middle")])
def test_cuts(cut: Any) -> None:
    policy = lc.Policy(cache=lc.Cache(cut=cut, interval=3), compile=EAGER)
    model = Denoiser()
    one, other = lc.transform(model, policy), behind(model, policy)
    assert_bitwise(steps(other), steps(one))
    assert printed(other) == printed(one)
    assert lc.inspect(one).counts == lc.inspect(other).counts


class Streams(nn.Module):
    """Two streams through blocks that return them in the order opposite to that of computing them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        other = sample * torch.cos(timestep)
        for block in self.blocks:
            sample, other = block(sample, other=other)
        return sample + other


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.tanh(self.one(other))
        return sample + self.two(first), other + first


@pytest.mark.parametrize("cut", ["blocks.1", lc.Residual(first="blocks.0", last="blocks.2"), "auto"])
def test_several_streams(cut: Any) -> None:
    torch.manual_seed(0)
    model = Streams()
    policy = lc.Policy(cache=lc.Cache(cut=cut, interval=2), compile=EAGER)
    assert_same_routes(model, policy)


class Entered(nn.Module):
    """Its block reads the model's own input first, which is used beside it too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (sample + self.block(sample)) * timestep


@pytest.mark.parametrize("cut", ["block", lc.Residual(first="block", last="block")])
def test_a_block_that_reads_the_models_own_input(cut: Any) -> None:
    torch.manual_seed(0)
    model = Entered()
    policy = lc.Policy(cache=lc.Cache(cut=cut, interval=2), compile=EAGER)
    assert_same_routes(model, policy)


class Halves(nn.Module):
    """Its block returns the parts of a split, taken apart by the caller; nested and repeated calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Split()
        self.eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        left, right = self.inner(sample)
        left, right = self.inner(torch.cat([right, left], dim=-1) * timestep)
        return left - right


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(sample).tanh().chunk(2, dim=-1)


@pytest.mark.parametrize("cut", ["inner", "inner.layer"])
def test_parts_and_repeated_calls(cut: str) -> None:
    torch.manual_seed(0)
    model = Halves()
    policy = lc.Policy(cache=lc.Cache(cut=cut, interval=2), compile=EAGER)
    assert_same_routes(model, policy)


def test_marks_are_of_what_goes_in_and_comes_out() -> None:
    """Not of weights, which a module does not get from its caller; inputs and results of both calls of a module."""
    streams, halves = Streams(), Halves()
    compiled = [behind(model, lc.Policy(compile=EAGER)) for model in (streams, halves)]
    for module in compiled:
        plain_step(module, sample=latent(0), timestep=torch.tensor(2.0))

    def marks(model: nn.Module, *paths: str) -> list[tuple[str, str, int, int]]:
        with graphs_of(model)[-1].model.marked(paths) as found:
            return [(mark.path, mark.side, mark.call, mark.index) for mark in found]

    assert marks(streams, "blocks.1") == [("blocks.1", side, 0, index) for side in ("in", "out") for index in (0, 1)]
    assert marks(halves, "inner", "inner.layer") == [
        *(("inner", side, call, index) for call in (0, 1) for side, count in (("in", 1), ("out", 2))
          for index in range(count)),
        *(("inner.layer", side, call, 0) for call in (0, 1) for side in ("in", "out")),
    ]  # fmt: skip
    assert marks(streams) == []


def taking_anything(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    """As diffusers' models: what decorates forward takes anything, and arguments are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.eval()

    @taking_anything
    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, added: dict[str, Any], residuals: list[torch.Tensor]
    ) -> torch.Tensor:
        hidden = torch.tanh(self.inner(sample + residuals[0])) * added["scales"]["of text"] + residuals[1]
        return hidden * timestep


def test_a_decorated_forward_and_nested_arguments() -> None:
    torch.manual_seed(0)
    model = Decorated()
    policy = lc.Policy(cache=lc.Cache(cut="inner", interval=3), compile=EAGER)
    one, other = lc.transform(model, policy), behind(model, policy)
    added, residuals = {"scales": {"of text": torch.tensor(3.0)}}, [latent(7), latent(8)]
    for index, time in enumerate(TIMES):
        args, kwargs = (latent(index), torch.tensor(time)), {"added": added, "residuals": residuals}
        with torch.no_grad():
            assert torch.equal(other(*args, **kwargs), one(*args, **kwargs))
    reports = lc.inspect(one), lc.inspect(other)
    assert reports[0].counts == reports[1].counts == {"full": 3, "reuse": 4}
    assert printed(other) == printed(one)
    names = [leaf.name for leaf in graphs_of(model)[-1].runtime.repertoire.latest().capture.layout.leaves]
    assert names == ["sample", "timestep", "added['scales']['of text']", "residuals[0]", "residuals[1]"]


def test_the_registered_name_and_options() -> None:
    assert "lightcache" in torch.compiler.list_backends()
    model = Denoiser()
    options = {"cache": {"cut": 0, "interval": 3}, "compile": "aot_eager"}
    by_name = torch.compile(model, backend="lightcache", options=options)
    assert_bitwise(steps(by_name), steps(lc.transform(model, CACHED)))
    torch._dynamo.reset()
    by_policy = torch.compile(model, backend="lightcache", options={"policy": CACHED})
    assert_bitwise(steps(by_policy), steps(lc.transform(model, CACHED)))


def test_inductor_is_the_compiler_behind_it_by_default() -> None:
    model = Denoiser()
    compiled = torch.compile(model, backend="lightcache")
    for found, wanted in zip(steps(compiled, TIMES[:2]), steps(model, TIMES[:2]), strict=True):
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert lc.inspect(compiled).programs["full"].flops > 0
    runtime = graphs_of(model)[-1].runtime
    assert runtime is not None
    assert runtime.policy.compile == lc.Compile()


# Runs and their state ---------------------------------------------------------------------------------------------


def test_runs_branches_and_interruptions() -> None:
    model = Denoiser()
    one, other = lc.transform(model, CACHED), behind(model)

    def guided(module: nn.Module, stop: int | None = None) -> list[torch.Tensor]:
        found = []
        with lc.marked_run(len(TIMES)):
            for index, time in enumerate(TIMES):
                if index == stop:
                    raise KeyboardInterrupt
                for text in (0, 1):
                    given = {"sample": latent(index), "timestep": torch.tensor(time)}
                    found += plain_step(module, **given, encoder_hidden_states=prompt(text))
                lc.step_done()
        return found

    for _ in range(2):
        assert_bitwise(guided(other), guided(one))
    for module in (one, other):
        with pytest.raises(KeyboardInterrupt):
            guided(module, stop=4)
    assert_bitwise(guided(other), guided(one))
    assert lc.inspect(other).counts == lc.inspect(one).counts


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in (*FAST, *SLOW) if name != "wan")]
)
def test_a_run_with_everything_on_compiles_nothing_anew(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    policy = lc.Policy(
        cache=lc.Cache(cut="auto", interval=8),
        swap=lc.Swap(budget="80%" if name == "modelscope" else "60%"),  # its activations alone take more
        chunk=lc.Chunk(budget="95%"),
        hoist=False,
        compile=EAGER,
    )
    inputs = run_inputs(make_inputs, 0, 25)
    whole = lc.transform(model, policy.model_copy(update={"compile": None}))
    expected = [plain_step(whole, **given) for given in inputs]
    lc.reset(whole)
    compiled = behind(model, policy, fullgraph=True)
    for given in inputs[:9]:  # one full step, the reuse steps behind it and the next full one
        plain_step(compiled, **given)
    warm = compilations(compiled)
    lc.reset(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for given, wanted in zip(inputs, expected, strict=True):
            assert_bitwise(plain_step(compiled, **given), wanted)
    assert compilations(compiled) == warm > 0
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    full = lc.inspect(compiled).programs["full"]
    assert full.transfers.moves
    assert full.num_regions


def compilations(module: nn.Module) -> int:
    """How often a part of the module's programs has been compiled; one that several programs have counts for each."""
    (graph,) = graphs_of(module)
    assert graph.runtime is not None
    states = [
        bound.compile_state for made in graph.runtime.repertoire.compiled.values() for bound in made.bound.values()
    ]
    return sum(state.compiled for state in states if state is not None)


def test_no_recompilation_in_a_run_with_everything_on() -> None:
    model = Tower()
    policy = lc.Policy(
        cache=lc.Cache(cut=0, interval=3), swap=lc.Swap(budget="60%"), chunk=lc.Chunk(budget="90%"), compile="aot_eager"
    )
    plain, compiled = lc.transform(model, policy.model_copy(update={"compile": None})), behind(model, policy)
    times = list(range(975, -25, -40))
    expected = steps(plain, times)
    first = steps(compiled, times[:3])
    lc.reset(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = steps(compiled, times)
    assert_bitwise(found, expected)
    assert_bitwise(first, expected[:3])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert lc.inspect(compiled).programs["full"].transfers.moves


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)
        self.eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.first(sample)
        return self.last(torch.cat([self.middle(torch.sin(hidden * timestep)), hidden], dim=1))


def sizes_made(model: nn.Module) -> list[list[bool]]:
    """Of each graph that has run, and of each size in it: whether its programs are those of sizes that vary."""
    runtimes = [graph.runtime for graph in graphs_of(model) if graph.runtime is not None]
    return [
        [made.signature.dynamic is not None for made in runtime.repertoire.compiled.values()] for runtime in runtimes
    ]


@pytest.mark.parametrize("dynamic", [None, False])
def test_other_sizes(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    captured: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        captured.append("varying" in kwargs)
        return capture(*args, **kwargs)

    for module in (compiler_module, dynamic_module):
        monkeypatch.setattr(module, "capture", noted)
    policy = CACHED.model_copy(update={"dynamic": dynamic})
    model = Conv()
    one, other = lc.transform(model, CACHED.model_copy(update={"dynamic": False})), behind(model, policy)
    found, sizes = [], (8, 12, 20, 8)
    for module in (other, one):
        for size in sizes:
            for index, time in enumerate(TIMES[:4]):
                sample = torch.randn(1, 2, size, size + 4, generator=torch.Generator().manual_seed(index))
                found += plain_step(module, sample=sample, timestep=torch.tensor(float(time)))
        if module is other:  # a graph for the first size, and Dynamo's for those that vary
            assert sizes_made(model) == [[False], [dynamic is None] * 3]
            assert captured == ([False] * 4 if dynamic is False else [False, True])
    half = len(found) // 2
    assert_bitwise(found[:half], found[half:])
    trackers = {graph.runtime.tracker: graph.runtime for graph in graphs_of(model) if graph.runtime is not None}
    kept = sum(runtime.kept_bytes() for runtime in trackers.values())
    assert kept == lc.inspect(one).kept_bytes > 0  # of the last run alone, in whichever graph it ended


def test_sizes_that_a_capture_cannot_leave_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise CaptureError("no symbols here")

    monkeypatch.setattr(dynamic_module, "capture", refused)
    model = Conv()
    compiled = behind(model)
    for size in (8, 12, 20):
        sample = torch.randn(1, 2, size, size, generator=torch.Generator().manual_seed(size))
        inputs = {"sample": sample, "timestep": torch.tensor(1.0)}
        assert_bitwise(plain_step(compiled, **inputs), plain_step(model, **inputs))
    assert sizes_made(model) == [[False], [False, False]]
    assert [graph.model.varying for graph in graphs_of(model)] == [{}, {"sample": (2, 3)}]


@pytest.mark.parametrize("name", [pytest.param("sd", marks=pytest.mark.slow), "pixart"])
def test_real_models_at_several_batch_sizes(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    policy = lc.Policy(cache=lc.Cache(cut="auto", interval=2), compile=EAGER)
    one, other = lc.transform(model, policy.model_copy(update={"dynamic": False})), behind(model, policy)
    found = {
        module: [
            tensor
            for batch in (2, 3, 4)
            for step in range(3)
            for tensor in plain_step(module, **batched(make_inputs, batch, step))
        ]
        for module in (one, other)
    }
    assert_bitwise(found[other], found[one])
    assert sizes_made(model) == [[False], [True, True]]


def test_timesteps_as_numbers(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Halves()
    policy = lc.Policy(cache=lc.Cache(cut="inner", interval=3), compile=EAGER)
    one, other = lc.transform(model, policy), behind(model, policy)
    times = [0.5, 0.4, 0.3, 0.2, 0.1]
    with caplog.at_level(logging.WARNING, "lightcache_fx"):
        first = plain_step(other, sample=latent(0), timestep=1.5)  # a graph for this very number
    assert_bitwise(first, plain_step(model, sample=latent(0), timestep=1.5))
    assert "takes no timestep" in caplog.text
    for index, time in enumerate(times):
        inputs = {"sample": latent(index), "timestep": time}
        assert_bitwise(plain_step(other, **inputs), plain_step(one, **inputs))
    assert lc.inspect(other).counts == lc.inspect(one).counts == {"full": 2, "reuse": 3}


def test_a_broken_graph_runs_without_a_cache(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Denoiser):
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, scale: float = 1.0) -> Any:
            hidden = sample * 2
            torch._dynamo.graph_break()
            return super().forward(hidden, timestep, encoder_hidden_states, scale)

    model = Broken()
    with caplog.at_level(logging.WARNING, "lightcache_fx"):
        assert_bitwise(steps(behind(model)), steps(model))
    assert "broke Broken into several graphs" in caplog.text


# What changes after it was compiled -------------------------------------------------------------------------------


def test_other_weights() -> None:
    model = Denoiser()
    compiled = behind(model, lc.Policy(compile=EAGER))

    def check() -> None:
        assert_bitwise(steps(compiled), steps(model))

    check()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # as a fused adapter does
    check()
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(parameter.detach() * 0.5, requires_grad=False))
    check()
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    check()
    model.middle.layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).requires_grad_(False).eval()
    check()
    model.double()
    with torch.no_grad():
        given = latent(0).double(), torch.tensor(5), prompt(0).double()
        assert torch.equal(compiled(*given), model(*given))


def test_numbers_and_tensors_among_attributes() -> None:
    class Scaled(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.gain = 2
            self.settings = {"scale": 2, "table": torch.arange(4.0)}

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, scale: float = 1.0) -> Any:
            found = super().forward(sample, timestep, encoder_hidden_states, scale)
            return found * self.settings["scale"] * self.gain + self.settings["table"]

    model = Scaled()
    compiled = behind(model)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for scale in (2, 3, 5, 7):
            model.gain, model.settings = scale + 1, {"scale": scale, "table": torch.arange(4.0) * scale}
            assert_bitwise(steps(compiled, TIMES[:1]), steps(model, TIMES[:1]))
    named = {place.name for graph in graphs_of(model) for place in graph.model.places}
    assert {"self_gain", "settings.table"} <= named


@pytest.mark.parametrize("decode", [lc.Decode(frames=1), lc.Decode(budget="70%")])
def test_an_autoencoders_decode(decode: lc.Decode) -> None:
    """What a policy says about denoising does not concern it, and what it says about decoding does."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=2, sample_size=8, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.eval().requires_grad_(False)
    latents = torch.randn(4, 2, 8, 8)
    policy = CACHED.model_copy(update={"decode": decode})
    compiled, transformed = torch.compile(vae.decode, backend=lc.backend(policy)), lc.transform(vae, policy)
    with torch.no_grad():
        (found,), (expected,) = (decode(latents, return_dict=False) for decode in (compiled, transformed.decode))
    assert torch.equal(found, expected)
    behind_dynamo = lc.inspect(vae)
    assert printed(vae) == printed(transformed)
    regions = [n for n in behind_dynamo.programs["full"].graph_module.graph.nodes if "lightcache_region" in n.meta]
    assert regions
    assert "decode" in str(behind_dynamo.owner)


def test_weights_elsewhere_are_refused_on_a_device() -> None:
    """Dynamo's guards ask for the weights' device; with `meta` for an accelerator."""
    weight = torch.empty(1, device="meta")
    for policy in (lc.Policy(swap=lc.Swap()), lc.Policy(memory_budget="1GiB")):
        with pytest.raises(
            PolicyError, match=r"Dynamo's guards expect the weights on meta.*use lightcache_fx.transform"
        ):
            refuse_moving_weights(policy, weight)
    refuse_moving_weights(lc.Policy(swap=lc.Swap(weights=False)), weight)
    refuse_moving_weights(lc.Policy(swap=lc.Swap()), torch.empty(1))


def test_adapters() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = Denoiser()
    compiled = behind(model)
    seen = [steps(compiled, TIMES[:1])[0]]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["layer", "outer"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for edit in (lambda _: None, lambda lora: lora.scale_layer(0.25), lambda lora: lora.merge(safe_merge=True)):
        for lora in (model.middle.layer, model.outer):
            edit(lora)
        lc.reset(compiled)
        seen += steps(compiled, TIMES[:1])
        assert_bitwise(seen[-1:], steps(model, TIMES[:1]))
    assert not any(torch.equal(seen[0], later) for later in seen[1:])


def test_graphs_go_with_the_model() -> None:
    model = Denoiser()
    compiled = behind(model)
    steps(compiled, TIMES[:2])
    graph = weakref.ref(graphs_of(model)[-1])
    weight = weakref.ref(model.outer.weight)
    del compiled, model
    torch._dynamo.reset()
    gc.collect()
    assert graph() is None
    assert weight() is None


# What is refused --------------------------------------------------------------------------------------------------


def test_bad_settings() -> None:
    with pytest.raises(ArgumentError, match=r"backend: policy must be a lightcache_fx.Policy, got dict"):
        lc.backend({"cache": None})  # type: ignore[arg-type]
    model = Denoiser()
    for options, message in (
        ({"cachee": {}}, "unknown key 'cachee'; did you mean 'cache'"),
        ({"policy": {}}, "'policy' must be a lightcache_fx.Policy and stand alone, got dict"),
        ({"policy": CACHED, "cache": None}, "stand alone, got Policy beside 'cache'"),
        ({"cache": {"cut": "midle", "interval": 2}}, "cut='midle': Denoiser has no such module; did you mean 'middle'"),
        ({"compile": "lightcache"}, "got 'lightcache' itself"),
    ):
        torch._dynamo.reset()
        with pytest.raises((PolicyError, CutError), match=re.escape(message)):
            steps(torch.compile(model, backend="lightcache", options=options), TIMES[:1])
    torch._dynamo.reset()
    with pytest.raises(TransformError, match=r"no program of this compiled Denoiser has run; compile it with.*call it"):
        lc.inspect(torch.compile(Denoiser(), backend="lightcache"))
    graph = torch.fx.symbolic_trace(nn.Identity())
    compiled = lightcache(graph, [torch.ones(1)], mode="reduce-overhead", options={"compile": "eager"})
    with pytest.raises(PolicyError, match="the options say how to compile already"):
        compiled(torch.ones(1))


def test_gradients_and_training() -> None:
    model = Denoiser()
    compiled = behind(model)
    with pytest.raises(TransformError, match="argument sample requires a gradient"):
        compiled(latent(0).requires_grad_(), torch.tensor(5), prompt(0))
    model.train()
    with pytest.raises(CaptureError, match="Denoiser is in training mode"):
        compiled(latent(0), torch.tensor(5), prompt(0))


class WritesToItsArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = InPlace()
        self.eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.block(sample * timestep) + 1


class InPlace(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden.view(-1).mul_(3)
        return hidden


def test_a_cut_that_dynamos_graph_does_not_show() -> None:
    policy = lc.Policy(cache=lc.Cache(cut="block", interval=2), compile=EAGER)
    compiled = behind(WritesToItsArgument(), policy)
    with pytest.raises(CaptureError, match="writes in place to what it is given"), torch.no_grad():
        compiled(latent(0), torch.tensor(2.0))


def test_compiled_around_a_transformed_module(caplog: pytest.LogCaptureFixture) -> None:
    module = lc.transform(Denoiser(), CACHED)
    expected = steps(module)
    lc.reset(module)
    with caplog.at_level(logging.WARNING, "lightcache_fx"):
        assert_bitwise(steps(torch.compile(module, backend="eager")), expected)
    assert caplog.text.count("torch.compile around a transformed module compiles nothing") == 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match="programs are graphs already"):
        steps(torch.compile(module, backend="eager", fullgraph=True))
