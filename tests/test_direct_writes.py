"""The last operator of a chunk writes where its result belongs, if that changes no bit of anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from graphs import Captured, captured
from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Memory, Stretch
from lightcache_fx.chunk_trials import chunk_seconds, estimated, exactly
from lightcache_fx.chunked import ChunkedRegion, build_region
from lightcache_fx.graphs import calls
from lightcache_fx.liveness import timeline
from lightcache_fx.measure import measure_peak
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion, chunked_copy
from lightcache_fx.printer import format_graph
from lightcache_fx.regions import trace_region

Model = Callable[[torch.Tensor], object]
KERNEL = torch.randn(4, 4, 3, 1, generator=torch.Generator().manual_seed(0))


def cut(given: Captured, first: str, last: str, axis: Axis, count: int) -> tuple[torch.fx.GraphModule, ChunkedRegion]:
    """The captured graph with one region, outputs written over inputs wherever they can be."""
    memory = Memory(given.graph_module.graph)
    names = [node.name for node in calls(given.graph_module.graph)]
    begin, end = names.index(first), names.index(last)
    stretch = Stretch(memory, trace_region(memory.order[begin : end + 1], axis), begin, end)
    over = exactly(estimated(stretch, count)).overwrites
    module = chunked_copy(
        given.graph_module.graph, Chunking((), (), (PlannedRegion(first, last, axis, count, (), over),))
    )
    region = module.get_submodule("region_0")
    assert isinstance(region, ChunkedRegion)
    return module, region


def direct(region: ChunkedRegion) -> set[int | None]:
    return set(region._direct)


@pytest.mark.parametrize(
    ("model", "last", "expected"),
    [
        (lambda x: (x.sin() + x).cos(), "add", {0}),
        (lambda x: (x.sin() - x).cos(), "sub", {0}),
        (lambda x: (x.sin() * x).cos(), "mul", {0}),
        (lambda x: (x.sin() / 3.0).cos(), "div", {0}),
        (lambda x: torch.add(x.sin(), x, alpha=2).cos(), "add", {0}),
        (lambda x: (x.sin().half() + x).cos(), "add", {0}),  # of two types
        (lambda x: (x.sin() + x[:, :1]).cos(), "add", {0}),
        (lambda x: x.sin().exp().cos(), "exp", {None}),  # vectorised and scalar code may differ
        (lambda x: ((y := x.sin()) + x, y.exp()), "add", {1}),  # the last of two outputs
        (lambda x: ((y := x.sin() + 1) + x, y.exp()), "exp", {None}),  # not the last call
        (lambda x: F.conv2d((x.sin() + x).view(1, 4, 7, 3), KERNEL), "add", {0}),
    ],
)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_what_is_written_directly(model: Model, last: str, expected: set[int | None], count: int) -> None:
    given = captured(model, torch.randn(7, 12, generator=torch.Generator().manual_seed(0)))
    module, region = cut(given, "sin", last, Axis(0, 7), count)
    assert direct(region) == expected
    for found, wanted in zip(given.run(module), given.run(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("model", "first", "expected", "over"),
    [
        (lambda x: ((y := x.abs()) + y.sin()).cos(), "sin", {0}, True),  # position by position
        (
            lambda x: ((y := x.abs()).unsqueeze(2).squeeze(2) * y.sin()).cos(),
            "unsqueeze",
            {None},
            True,
        ),  # a view: it is not looked into
        (lambda x: (F.pad((y := x.abs()), (0, 0, 1, 0))[:7] + y).cos(), "pad", {None}, True),  # waits
        (lambda x: ((y := x.abs()) + 1, y.exp()), "add", {0}, False),  # read later
        (lambda x: ((y := x.abs())[:, :6].sin() + y[:, 6:]).cos(), "slice_1", {0}, False),  # of another size
    ],
)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_over_inputs(model: Model, first: str, expected: set[int | None], over: bool, count: int) -> None:
    given = captured(model, torch.randn(7, 12, generator=torch.Generator().manual_seed(0)))
    names = [node.name for node in calls(given.graph_module.graph)]
    last = "mul" if "mul" in names else "add"
    module, region = cut(given, first, last, Axis(0, 7), count)
    assert bool(region.overwrites) == over
    assert direct(region) == expected
    for _ in range(2):
        for found, wanted in zip(given.run(module), given.run(), strict=True):
            assert torch.equal(found, wanted)


def test_two_outputs_over_inputs_are_copied() -> None:
    """The other may be a view of what would be written too early."""
    sample = torch.randn(7, 12)
    order = Memory(captured(lambda x: ((y := x.abs())[:, :6], y + 1), sample).graph_module.graph).order
    module = build_region(trace_region(order[1:], Axis(0, 7)), 3, {}, candidates=[(1, 0)])
    assert [over.output for over in module.overwrites] == [1]
    assert direct(module) == {None}
    part, added = module(sample.abs())
    assert torch.equal(part, sample.abs()[:, :6])
    assert torch.equal(added, sample.abs() + 1)


def test_an_axis_inside_a_dimension_is_copied() -> None:
    """`2 x [3] x 2` of a dimension is no view of it."""
    given = captured(lambda x: (x.sin() + x).cos(), torch.randn(12, 5))
    module, region = cut(given, "sin", "add", Axis(0, 3, outer=2, inner=2), 3)
    assert direct(region) == {None}
    assert torch.equal(given.run(module)[0], given.run()[0])


def test_bytes_and_seconds_count_it() -> None:
    def of(model: Model, last: str) -> tuple[int, float, int]:
        given = captured(model, torch.randn(8, 4096))
        memory = Memory(given.graph_module.graph)
        trial = estimated(Stretch(memory, trace_region(memory.order[:2], Axis(0, 8)), 0, 1), 4)
        module, _ = cut(given, "sin", last, Axis(0, 8), 4)
        predicted = timeline(module.graph).peak_bytes
        measured = measure_peak(lambda: given.run(module)).peak_bytes
        assert measured == predicted
        return trial.body_peak, chunk_seconds(trial), predicted

    part = 2 * 4096 * 4
    (body, seconds, peak), (copied_body, copied_seconds, copied_peak) = (
        of(lambda x: (x.sin() + x).abs(), "add"),
        of(lambda x: torch.maximum(x.sin(), x).abs(), "maximum"),
    )
    assert (body, copied_body) == (part, 2 * part)
    assert seconds < copied_seconds
    assert peak <= copied_peak


def test_it_is_printed() -> None:
    given = captured(lambda x: (x.sin() + x).cos(), torch.randn(8, 6))
    module, _ = cut(given, "sin", "add", Axis(0, 8), 2)
    assert "aten.add.out(%sin_default, %sample, out=%into)" in format_graph(module.graph).replace("%x", "%sample")


def test_a_body_that_ends_otherwise_is_left_alone() -> None:
    memory = Memory(captured(lambda x: x.sin().exp(), torch.randn(8, 6)).graph_module.graph)
    module = build_region(trace_region(memory.order, Axis(0, 8)), 2, {})
    before = str(module.body(0).graph)
    module.write_directly(0, torch.empty(8, 6))
    assert str(module.body(0).graph) == before
    assert direct(module) == {None}
