"""Slots of CUDA graphs: written where they are read, at addresses that stay. Here Inductor makes them for a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx

import lightcache_fx as lc
from lightcache_fx import lowering, program
from lightcache_fx.errors import LoweringError
from lightcache_fx.graphs import outputs, placeholders
from lightcache_fx.lowering import lower
from lightcache_fx.static_slots import SlotBuffers, without_results, writing_to_buffers, written_arguments
from lightcache_fx.stores import Stores
from oracle import assert_bitwise, plain_step
from toys import Denoiser, latent, prompt

TIMES = [981, 884, 787, 690, 593]
CACHED = lc.Policy(cache=lc.Cache(cut=0, interval=2))
WITH_GRAPHS = CACHED.model_copy(update={"compile": lc.Compile(mode="reduce-overhead")})


class Compilation:
    """What Inductor was given: the places of inputs at fixed addresses, and the graph."""

    def __init__(self, graph: torch.fx.GraphModule, static: list[int]) -> None:
        names = [node.name for node in placeholders(graph.graph)]
        self.static = {names[place] for place in static}
        self.written = {n.args[0].name for n in graph.graph.nodes if n.target is torch.ops.aten.copy_.default}
        self.num_results = len([value for value in outputs(graph.graph) if value is not None])


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compilation]]:
    """CUDA graphs are taken for granted, and what Inductor is given is noted."""
    made: list[Compilation] = []
    plain, inner = compile_fx.compile_fx, compile_fx.compile_fx_inner

    def noted(graph: Any, inputs: Any, **settings: Any) -> Any:
        made.append(Compilation(graph, list(settings.get("static_input_idxs") or ())))
        return inner(graph, inputs, **settings)

    monkeypatch.setattr(compile_fx, "compile_fx", lambda *args, **kw: plain(*args, **{"inner_compile": noted, **kw}))
    for module in (lowering, program):
        monkeypatch.setattr(module, "has_cuda_graphs", lambda *_: True)
    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False):  # or nothing may be left to compile
        yield made


def steps(module: nn.Module, prompts: tuple[int, ...] = (0,), times: list[int] = TIMES) -> list[torch.Tensor]:
    return [
        plain_step(module, sample=latent(step), timestep=time, encoder_hidden_states=prompt(number))[0]
        for step, time in enumerate(times)
        for number in prompts
    ]


def slots(module: Any) -> list[torch.Tensor]:
    branches = module._lightcache.runtime.tracker.branches
    return [slot for branch in branches for slot in branch.stores.slots.values()]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_slot_stays_where_it_is(compilations: list[Compilation]) -> None:
    model = Denoiser()
    plain, compiled = lc.transform(model, CACHED), lc.transform(model, WITH_GRAPHS)
    expected, addresses = steps(plain, (0, 1)), set()
    for times in (TIMES, TIMES[:3], TIMES):  # a later run has the buffers of the first
        assert_close(steps(compiled, (0, 1), times), expected[: 2 * len(times)])
        addresses.add(tuple(slot.data_ptr() for slot in slots(compiled)))
        lc.reset(compiled)
    (of_both,) = addresses
    assert len(set(of_both)) == len(of_both) == len(slots(plain)) == 2
    steps(compiled, (0, 1))
    buffers = compiled._lightcache.runtime.repertoire.latest().bound["full"].slot_buffers
    assert buffers.num_bytes() == lc.inspect(compiled).kept_bytes > 0
    assert len(compilations) == 2


def test_inductor_is_told_of_the_addresses(compilations: list[Compilation]) -> None:
    model = Denoiser()
    compiled = lc.transform(model, WITH_GRAPHS)
    steps(compiled)
    full, reuse = compilations
    weights = [name for name, _ in model.named_parameters()]
    assert len(full.written) == 1
    assert full.written < full.static
    assert not reuse.written
    assert len(full.static) <= len(weights) + 1
    programs = lc.inspect(compiled).programs
    read = [given.kind for given in programs["reuse"].inputs].count("weight")
    assert len(reuse.static) == read + 1
    assert full.num_results == 1  # the model's own: no copy of the slot leaves the graph's memory


def test_a_broken_off_run_leaves_its_buffers(compilations: list[Compilation], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Denoiser()
    plain, compiled = lc.transform(model, CACHED), lc.transform(model, WITH_GRAPHS)
    steps(compiled)
    before = [slot.data_ptr() for slot in slots(compiled)]
    bound = compiled._lightcache.runtime.repertoire.latest().bound["full"]

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(bound, "_run", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            steps(compiled)
    assert not slots(compiled)
    gc.collect()
    assert_close(steps(compiled), steps(plain))
    assert [slot.data_ptr() for slot in slots(compiled)] == before


def test_with_inference_mode_and_without(compilations: list[Compilation]) -> None:
    compiled = lc.transform(Denoiser(), WITH_GRAPHS)
    with torch.inference_mode():
        inside = steps(compiled)
        assert not any(slot.is_inference() for slot in slots(compiled))  # they could not be written to outside
    lc.reset(compiled)
    assert_bitwise(steps(compiled), [found.clone() for found in inside])


def test_buffers_are_handed_on_in_order() -> None:
    buffers = SlotBuffers([torch.empty_strided((2, 3), (1, 2)), torch.zeros(4, dtype=torch.float16)])
    owners = [Stores() for _ in range(3)]
    first = [buffers.of(owner) for owner in owners]
    assert [(b.shape, b.stride(), b.dtype) for b in first[0]] == [
        ((2, 3), (1, 2), torch.float32),
        ((4,), (1,), torch.float16),
    ]
    assert buffers.of(owners[1]) is first[1]
    assert buffers.num_bytes() == 3 * (24 + 8)
    owners[2] = owners[0] = Stores()  # the two go in the other order
    del owners[0]
    again = [buffers.of(owner) for owner in (Stores(), owners[1])]
    assert again[0] is first[0]
    assert any(again[1] is one for one in first[1:])
    assert buffers.num_bytes() == 3 * (24 + 8)


def test_a_program_that_writes_to_buffers(backend: Callable[[Callable[..., Any]], str]) -> None:
    model = Denoiser()
    transformed = lc.transform(model, CACHED)
    steps(transformed)
    made = transformed._lightcache.runtime.repertoire.latest()
    graph_module = made.programs["full"].graph_module
    before = lc.format_graph(graph_module)
    writing = writing_to_buffers(graph_module, [1])
    assert written_arguments(writing.graph) == {1: len(placeholders(graph_module.graph))}
    assert len(outputs(without_results(writing, {1: 0}).graph)) == 1
    assert lc.format_graph(graph_module) == before
    args = [torch.randn(node.meta["val"].shape) for node in placeholders(graph_module.graph)]
    value = outputs(graph_module.graph)[1].meta["val"]
    buffer = torch.full_like(torch.empty(value.shape), torch.nan)
    own = graph_module(*args)
    found = writing(*args, buffer)
    assert_bitwise(list(found), list(own))
    assert found[1] is buffer or found[1].data_ptr() == buffer.data_ptr()

    def wrong(given: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        """What it returns is right, and what it writes is not."""

        def run(*args: Any) -> Any:
            results = list(given(*args))
            results[1].add_(1)
            return results

        return run

    run, _ = lower(writing, lc.Compile(backend=backend(wrong)), "full")
    with pytest.raises(LoweringError, match=r"result 1 is .* of its largest element off"):
        run(*args, buffer)
