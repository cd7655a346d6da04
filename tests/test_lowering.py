"""Programs handed to a compiler: equal results, each piece compiled once, and whatever cannot be right is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import lightcache_fx as lc
from lightcache_fx.errors import LoweringError, PolicyError
from lightcache_fx.lowering import _SHARED, CompileState, compiled, lower
from oracle import assert_bitwise, plain_step
from pretend_device import DEVICE, OnDevice, pretended
from toys import Denoiser, latent, prompt
from zoo import ZOO, run_inputs

TIMES = [981, 884, 787, 690, 593, 496, 399]
UNETS = ["sd", "svd", "animatediff", "modelscope"]
CACHED = lc.Policy(cache=lc.Cache(cut=0, interval=3))
DITS = ["flux", "wan", "cogvideox", "hunyuanvideo", "pixart"]


def states(module: nn.Module) -> dict[str, CompileState]:
    found = {name: bound.compile_state for name, bound in module._lightcache.runtime.repertoire.latest().bound.items()}
    return {name: state for name, state in found.items() if state is not None}


def steps(module: nn.Module, times: list[int] = TIMES) -> list[torch.Tensor]:
    inputs = ({"sample": latent(i), "timestep": t, "encoder_hidden_states": prompt(0)} for i, t in enumerate(times))
    return [plain_step(module, **given)[0] for given in inputs]


# Equal results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DITS, *(pytest.param(name, marks=pytest.mark.slow) for name in UNETS)])
@pytest.mark.parametrize(
    "memory",
    [{}, {"chunk": lc.Chunk(budget="95%")}, pytest.param({"swap": lc.Swap(budget="90%")}, marks=pytest.mark.slow)],
    ids=["plain", "chunks", "swaps"],
)
def test_bitwise_by_aot_eager(name: str, memory: dict[str, Any]) -> None:
    model, make_inputs = ZOO[name].build()
    cache = lc.Cache(cut="auto", interval=3)
    policy = lc.Policy(cache=cache, hoist=not memory, **memory)
    one = lc.transform(model, policy)
    other = lc.transform(model, policy.model_copy(update={"compile": lc.Compile(backend="aot_eager")}))
    for _, inputs in zip(range(5), run_inputs(make_inputs, 0, 5), strict=True):
        assert_bitwise(plain_step(other, **inputs), plain_step(one, **inputs))
    assert lc.inspect(other).counts == lc.inspect(one).counts
    compiled = {name: (state.compiled, len(state.parts)) for name, state in states(other).items()}
    assert all(times <= parts for times, parts in compiled.values()), compiled  # fewer: a step that did not occur


def test_inductor_is_within_its_rounding() -> None:
    model = Denoiser()
    policy = lc.Policy.deepcache(3, 0)
    expected = steps(lc.transform(model, policy))
    compiled = lc.transform(model, policy.model_copy(update={"compile": lc.Compile()}))
    for found, wanted in zip(steps(compiled), expected, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert {name: (state.pieces, state.compiled) for name, state in states(compiled).items()} == {
        "full": (1, 1), "reuse": (1, 1),
    }  # fmt: skip
    assert lc.inspect(compiled).signatures[0].programs["prologue"].compiled == "eager"
    again = states(compiled)["full"].seconds
    steps(compiled)
    assert states(compiled)["full"].seconds == again > 0


class Wide(nn.Module):
    """Four equal blocks with a peak in each that only chunks bring down."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 256), nn.Linear(256, 8)]) for _ in range(4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for up, down in self.blocks:  # type: ignore[misc]
            sample = sample + down(F.gelu(up(sample)))
        return sample * timestep


def wide(**settings: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Wide().eval()
    return model, lc.transform(model, lc.Policy(chunk=lc.Chunk(budget="30%"), **settings))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_region_is_looped_and_each_body_compiled_once(compiler: str) -> None:
    _, chunked = wide()
    _, compiled = wide(compile=compiler)
    sample = torch.randn(2, 120, 8)
    with torch.no_grad():
        expected, found = (module(sample, torch.tensor(2.0)) for module in (chunked, compiled))
        again = compiled(sample, torch.tensor(2.0))
    assert torch.equal(found, again)
    assert float((found - expected).abs().max()) <= (1e-5 if compiler == "inductor" else 0) * float(
        expected.abs().max()
    )
    regions = [node.meta["lightcache_region"] for node in lc.inspect(compiled).programs["full"].graph_module.graph.nodes
               if "lightcache_region" in node.meta]  # fmt: skip
    bodies, chunks = sum(len(region.bodies) for region in regions), sum(len(region.chunks) for region in regions)
    state = states(compiled)["full"]
    assert 0 < bodies < chunks
    assert state.pieces == bodies + 1  # and what comes behind the last region
    assert state.compiled == len(state.parts) <= state.pieces


def half_filled(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a piece that ends before the last write to a tensor: rotary embeddings fill one half and then the other."""
    made = torch.empty_like(sample)
    made[..., ::2] = sample[..., ::2] + 1
    return made, sample * 2


@pytest.mark.parametrize(("factor", "is_refused"), [(1.0, False), (1.01, True)])
def test_only_what_a_piece_defines_is_compared(
    factor: float, is_refused: bool, backend: Callable[[Callable[..., Any]], str]
) -> None:
    graph_module = make_fx(functionalize(half_filled))(torch.ones(4, 6))
    filled = itertools.count(5)

    class Otherwise(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_function(target, args, kwargs)
            return result.fill_(next(filled)) if target is torch.ops.aten.empty_like.default else result

    def run(given: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        return lambda *args: [result * factor for result in Otherwise(given).run(*args)]

    lowered, _ = lower(graph_module, lc.Compile(backend=backend(run)), "full")
    if is_refused:
        with pytest.raises(LoweringError, match="result 0 is"):
            lowered(torch.ones(4, 6))
    else:
        assert lowered(torch.ones(4, 6))[0][0, :2].tolist() == [2.0, 5.0]


class Stack(nn.Module):
    """Equal blocks between a first and a last layer; every other one is narrower where `mixed`."""

    def __init__(self, num_blocks: int, *, mixed: bool = False, last: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Feed(12 if mixed and index % 2 else 16) for index in range(num_blocks))
        self.last = nn.Linear(8, last)
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.first(sample) * timestep
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up = F.gelu(self.up(self.norm(hidden)))
        return hidden + torch.tanh(self.down(up * torch.sigmoid(up) + 1)) * 2 - hidden.sin().cos()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("mixed", "different"), [(False, 1), (True, 2)])
def test_equal_blocks_are_compiled_once(compiler: str, mixed: bool, different: int) -> None:
    torch.manual_seed(0)
    model = Stack(12, mixed=mixed)
    by_block = lc.transform(model, lc.Policy(compile=compiler))
    whole = lc.transform(model, lc.Policy(compile=lc.Compile(backend=compiler, blocks=False)))
    for index, time in enumerate(TIMES[:3]):
        given = {"sample": latent(index), "timestep": torch.tensor(time / 1000)}
        (expected,) = plain_step(model, **given)
        for module in (by_block, whole):
            (found,) = plain_step(module, **given)
            assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    of_blocks, of_whole = states(by_block)["full"], states(whole)["full"]
    assert (of_blocks.pieces, len(of_blocks.parts)) == (12, different)
    assert of_blocks.compiled == different
    assert (of_whole.pieces, of_whole.compiled) == (1, 1)


@pytest.mark.parametrize(("width", "is_compiled"), [(8, False), (1_000_000, True)])
def test_what_blocks_leave_is_compiled_where_it_takes_time(width: int, is_compiled: bool) -> None:
    model = Stack(12, last=width)
    compiled = lc.transform(model, lc.Policy(compile=lc.Compile(backend="aot_eager")))
    given = {"sample": latent(0), "timestep": torch.tensor(0.5)}
    assert_bitwise(plain_step(compiled, **given), plain_step(model, **given))
    assert states(compiled)["full"].pieces == (14 if is_compiled else 12)


def test_few_blocks_stay_in_one_graph() -> None:
    model = Stack(2)
    given = {"sample": latent(0), "timestep": torch.tensor(0.5)}
    for blocks, pieces in ((None, 1), (True, 4)):  # the ends take a good part of the time of so few
        module = lc.transform(model, lc.Policy(compile=lc.Compile(backend="aot_eager", blocks=blocks)))
        assert_bitwise(plain_step(module, **given), plain_step(model, **given))
        assert states(module)["full"].pieces == pieces


# What changes after it was compiled -------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_other_layouts_and_weights(compiler: str) -> None:
    model = Denoiser()
    compiled = lc.transform(model, lc.Policy(compile=compiler))

    def check() -> None:
        with torch.no_grad():
            for sample in (latent(0), latent(1).transpose(-1, -2).contiguous().transpose(-1, -2)):
                found, wanted = (m(sample, torch.tensor(5), prompt(0)) for m in (compiled, model))
                assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())

    check()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # as a fused adapter does
    check()
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(parameter.detach() * 0.5))
    check()
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    check()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_tensors_anywhere_in_their_storage(compiler: str) -> None:
    """Weights at home share one storage, and so do the samples of a batch; where they begin must not be a symbol."""
    model = Denoiser()
    home = torch.cat([torch.zeros(5), *(parameter.flatten() for parameter in model.parameters())])
    begin = 5
    for parameter in model.parameters():
        parameter.data = home[begin : begin + parameter.numel()].view(parameter.shape)
        begin += parameter.numel()
    compiled = lc.transform(model, lc.Policy(compile=compiler))
    samples = torch.cat([latent(0), latent(1), latent(2)]).split(2)
    for sample in samples[::-1]:
        given = {"sample": sample, "timestep": torch.tensor(5), "encoder_hidden_states": prompt(0)}
        (found,), (expected,) = plain_step(compiled, **given), plain_step(model, **given)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_nothing_is_symbolic_for_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is for its very sizes; a symbol among them would be one that no input defines."""
    seen: list[torch.Tensor] = []

    def spy(_graph: fx.GraphModule, inputs: list[torch.Tensor], **_: object) -> Callable[..., Any]:
        seen.extend(inputs)
        return lambda *args: args

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda _: spy)
    graph = fx.symbolic_trace(Denoiser().middle.layer)
    args = [torch.randn(1, 3, 4), nn.Parameter(torch.randn(4, 4)), torch.randn(9)[5:], torch.tensor(2.0)]
    assert compiled(graph, args, lc.Compile())(*args) == tuple(args)
    assert len(seen) == len(args)
    for fake, real in zip(seen, args, strict=True):
        facts = (*fake.shape, *fake.stride(), fake.storage_offset())
        assert all(type(fact) is int for fact in facts)
        assert facts == (*real.shape, *real.stride(), real.storage_offset())


def test_inductor_finds_what_it_compiled_before() -> None:
    """On disk, by the content of a graph; ours are found too, without what this process remembers."""
    from torch._dynamo.utils import counters

    given = {"sample": latent(0), "timestep": torch.tensor(5), "encoder_hidden_states": prompt(0)}
    settings = lc.Policy(compile=lc.Compile(options={"max_fusion_size": 63}))
    plain_step(lc.transform(Denoiser(), settings), **given)
    _SHARED.clear()
    counters.clear()
    again = lc.transform(Denoiser(), settings)
    plain_step(again, **given)
    parts = sum(state.compiled for state in states(again).values())
    assert counters["inductor"]["fxgraph_cache_hit"] == parts > 0
    assert not counters["inductor"]["fxgraph_cache_bypass"]


def test_a_module_of_another_precision_is_compiled_anew() -> None:
    model = Denoiser()
    compiled = lc.transform(model, lc.Policy(compile="aot_eager"))
    with torch.no_grad():
        compiled(latent(0), torch.tensor(5), prompt(0))
        model.double()
        given = latent(0).double(), torch.tensor(5), prompt(0).double()
        assert torch.equal(compiled(*given), model(*given))


def test_a_module_that_is_moved_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device it computes there, with the weights that are there, in a run that begins anew."""
    model, times = Denoiser(), TIMES[:4]
    expected = steps(lc.transform(model, CACHED), times)
    compiled = lc.transform(model, CACHED.model_copy(update={"compile": lc.Compile(backend="eager")}))
    with pretended(monkeypatch):
        assert_bitwise(steps(compiled, times), expected)
        model.to(DEVICE)
        with pytest.raises(RuntimeError, match="to be on the same device"):
            steps(compiled, times[:1])
        inputs = [(latent(i).to(DEVICE), torch.tensor(t).to(DEVICE), prompt(0).to(DEVICE)) for i, t in enumerate(times)]
        with torch.no_grad():
            found = [compiled(*given) for given in inputs]
        assert all(isinstance(tensor, OnDevice) for tensor in found)
        assert_bitwise([tensor.cpu() for tensor in found], expected)
        model.to("cpu")
        assert_bitwise(steps(compiled, times), expected)
    assert lc.inspect(compiled).counts["full"] == 2 + 2 + 2


def test_layouts_are_bounded() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1)).eval()
    compiled = lc.transform(model, lc.Policy(compile="eager"))
    base = torch.randn(2, 2, 3, 5)
    with torch.no_grad():
        for order in itertools.permutations(range(4)):
            sample = base.permute(order).contiguous().permute([order.index(d) for d in range(4)])
            assert torch.allclose(compiled(sample), model(sample))
    for found in compiled._lightcache.runtime.repertoire.compiled.values():
        assert len(found.bound["full"]._run._by_layout) <= 4


# What is refused --------------------------------------------------------------------------------------------------


def test_a_backend_that_computes_something_else(backend: Callable[[Callable[..., Any]], str]) -> None:
    def wrong(graph_module: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        return lambda *args: [result * 1.01 for result in graph_module(*args)]

    compiled = lc.transform(Denoiser(), lc.Policy(hoist=False, compile=backend(wrong)))
    with pytest.raises(LoweringError, match=r"computes something else than program full does: result 0 is 1\.0e-02"):
        steps(compiled, TIMES[:1])
    unchecked = lc.Compile(backend=backend(wrong), check=False)
    assert steps(lc.transform(Denoiser(), lc.Policy(compile=unchecked)), TIMES[:1])


def test_a_backend_that_makes_nan(backend: Callable[[Callable[..., Any]], str]) -> None:
    def nan(graph_module: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        return lambda *args: [result * float("nan") for result in graph_module(*args)]

    compiled = lc.transform(Denoiser(), lc.Policy(compile=backend(nan)))
    with pytest.raises(LoweringError, match="inf of its largest element off"):
        steps(compiled, TIMES[:1])


def test_a_backend_that_fails(backend: Callable[[Callable[..., Any]], str]) -> None:
    fails = [True]

    def failing(graph_module: fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        if fails.pop():
            raise NotImplementedError("no such\noperator")
        fails.append(False)
        return graph_module.forward

    model = Denoiser()
    compiled = lc.transform(model, lc.Policy(hoist=False, compile=(name := backend(failing))))
    with pytest.raises(LoweringError, match=f"backend '{name}' failed on program full: NotImplementedError: no such;"):
        steps(compiled, TIMES[:1])
    fails.append(False)
    assert_bitwise(steps(compiled, TIMES[:1]), steps(model, TIMES[:1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("inductr", "expected a backend of torch.compile, one of .*inductor.*, got 'inductr'"),
        (3, "expected a Compile, True, a backend's name, or a mapping with the keys backend, mode, options, check"),
        ({"backend": "eager", "mode": "reduce-overhead"}, "mode='reduce-overhead' is one of Inductor's"),
        ({"mode": "fast"}, "mode"),
        ({"bakend": "eager"}, "bakend"),
    ],
)
def test_settings_that_cannot_be(given: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        lc.Policy(compile=given)


def test_settings_read_and_written(tmp_path: Any) -> None:
    assert lc.Policy(compile=True).compile == lc.Compile()
    assert lc.Policy(compile=False).compile is None
    policy = lc.Policy(compile=lc.Compile(backend="aot_eager", check=False))
    policy.to_yaml(tmp_path / "policy.yaml")
    assert lc.Policy.from_yaml(tmp_path / "policy.yaml") == policy
