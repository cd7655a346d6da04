"""Outputs written where inputs were: half the memory of a residual block without computing anything twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphs import Captured, captured
from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Memory, Stretch, profile
from lightcache_fx.chunk_planner import Request, plan_program
from lightcache_fx.chunk_trials import estimated, exactly
from lightcache_fx.chunked import build_region
from lightcache_fx.graphs import calls
from lightcache_fx.in_place import Overwrite, overwrites
from lightcache_fx.liveness import timeline
from lightcache_fx.measure import measure_peak
from lightcache_fx.norm_splits import fewest_splits, norms_near_peaks
from lightcache_fx.passes.chunk_regions import Chunking, chunked_copy
from lightcache_fx.passes.split_group_norm import group_norms
from lightcache_fx.regions import trace_region
from toys import Resnet

SIZE = 128
VALUE = 8 * SIZE * SIZE * 4


def resnet() -> Captured:
    torch.manual_seed(0)
    return captured(Resnet().eval(), torch.randn(1, 1, SIZE, SIZE))


def test_a_residual_block_needs_two_values_and_not_three() -> None:
    given = resnet()
    plan = plan_program(given.graph_module.graph, Request(int(2.3 * VALUE)))
    assert plan.fits
    assert not plan.recomputed
    module = chunked_copy(given.graph_module.graph, plan.chunking)
    assert any(region.overwrites for region in plan.regions)
    assert timeline(module.graph).peak_bytes <= 2.3 * VALUE < 3 * VALUE <= plan.peak_before
    (expected,) = given.run()
    for _ in range(2):
        (found,) = given.run(module)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_measured_as_predicted() -> None:
    given = resnet()
    plan = plan_program(given.graph_module.graph, Request(int(2.3 * VALUE)))
    module = chunked_copy(given.graph_module.graph, plan.chunking)
    predicted = timeline(module.graph).peak_bytes
    measured = measure_peak(lambda: given.run(module)).peak_bytes
    assert abs(measured - predicted) <= 0.05 * predicted


def region_of(given: Captured, first: str, last: str, axis: Axis) -> tuple[Memory, int, int]:
    memory = Memory(given.graph_module.graph)
    names = [node.name for node in calls(given.graph_module.graph)]
    return memory, names.index(first), names.index(last)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda x: (x.abs() + 1).sin(), [(0, 0)]),
        (lambda x: x + 1 + x.sin(), []),  # the program's input
        (lambda x: (x.double() + 1).sin(), []),  # it would be the program's input for a double
        (lambda x: ((y := x.abs()) + 1) * y, []),  # read later
        (lambda x: ((y := x.abs()).reshape(-1).view(7, 4) + 1) * y.sum(), []),  # an alias is read later
        (lambda x: (x.abs()[:, :2] + 1).sin(), []),  # a part of a larger storage
        (lambda x: (x.abs().half() + x[0]).sin(), []),  # another type
        (lambda x: (x.abs() + x.sin()).sin(), [(0, 0), (0, 1)]),
        (lambda x: ((y := x.abs()) + y.t().reshape(7, 4)).sin(), []),  # reshape says that it may be an alias
        (lambda x: ((y := x.abs()) + y.flip(0)[:]).sin(), [(0, 0), (0, 1)]),
        # einsum does not say that its result is a view of what it permutes; a run shows it
        (lambda x: (torch.einsum("ij->ji", y := x.abs()), (y + 1).sin()), []),
        (lambda x: ((y := x.abs()) + torch.einsum("ij->ij", y)).sin(), []),
    ],
)
def test_what_may_be_written_over(model: object, expected: list[tuple[int, int]]) -> None:
    given = captured(model, torch.randn(7, 4))  # type: ignore[arg-type]
    memory, begin, _ = region_of(given, "add", "add", Axis(0, 7))
    region = trace_region(memory.order[begin : begin + 1], Axis(0, 7))
    found = memory.replaceable(region, begin)
    assert [pair for pair in found if pair in expected or not expected] == expected


def test_a_smaller_output_keeps_its_own_storage() -> None:
    given = captured(lambda x: x.abs().sum(1, keepdim=True).exp(), torch.randn(7, 4))
    memory = Memory(given.graph_module.graph)
    region = trace_region(memory.order[1:2], Axis(0, 7))
    assert memory.replaceable(region, 1) == []


def test_halos_decide_whether_parts_wait() -> None:
    def delays(kernel: int, count: int) -> list[int]:
        weight = torch.randn(2, 2, kernel, 1)
        given = captured(lambda x: F.conv2d(x.abs(), weight, padding=(kernel // 2, 0)).sin(), torch.randn(1, 2, 24, 3))
        memory = Memory(given.graph_module.graph)
        region = trace_region(memory.order[1:2], Axis(2, 24))
        return [w.delay for w in overwrites(region, count, memory.replaceable(region, 1), range(count))]

    assert delays(1, 4) == [0]
    assert delays(3, 4) == [1]
    assert delays(3, 24) == [1]
    assert delays(5, 24) == []  # two rows back, and a chunk has one
    assert delays(5, 12) == [1]


def test_the_estimate_counts_what_waits() -> None:
    weight = torch.ones(2, 2, 3, 1)
    given = captured(lambda x: F.conv2d(x.abs(), weight, padding=(1, 0)).sin(), torch.randn(1, 2, 24, 3))
    memory = Memory(given.graph_module.graph)
    region = trace_region(memory.order[1:2], Axis(2, 24))
    trial = estimated(Stretch(memory, region, 1, 1), 4)
    assert trial.overwrites == (Overwrite(0, 0, delay=1),)
    exact = exactly(trial)
    part = 2 * 24 * 3 * 4 // 4
    assert exact.overwrites == trial.overwrites
    module = build_region(region, 4, {}, candidates=[(0, 0)])
    inner = max(line.peak_bytes for line in module.timelines(1)[1:])
    assert exact.body_peak == module.memory_peak(1) == inner + part
    assert trial.allocated_bytes == 0
    live = profile(memory, [exact])
    assert live.during[live.items.index(exact)] == 4 * part + exact.body_peak


# Which norms are split -----------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Small residual blocks around a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(5))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for norm in self.norms[:2]:
            sample = norm(sample).sin()
        wide = F.interpolate(sample, scale_factor=8.0)
        wide = wide + self.norms[2](wide).sin()
        sample = F.avg_pool2d(wide, 8)
        for norm in self.norms[3:]:
            sample = norm(sample).sin()
        return sample


def test_norms_far_from_the_peak_stay_whole() -> None:
    graph = captured(Chain().eval(), torch.randn(1, 4, 16, 16)).graph_module.graph
    names = group_norms(graph)
    peak = timeline(graph).peak_bytes
    assert set(norms_near_peaks(timeline(graph), names, peak // 2)) == set(names[1:4])
    assert norms_near_peaks(timeline(graph), names, peak) == ()
    assert norms_near_peaks(timeline(graph), names, 1) == tuple(names)


def test_a_plan_splits_no_norm_that_it_does_not_cut() -> None:
    given = captured(Chain().eval(), torch.randn(1, 4, 16, 16))
    graph = given.graph_module.graph
    plan = plan_program(graph, Request(int(0.55 * timeline(graph).peak_bytes)))
    assert plan.fits
    assert set(plan.split_norms) <= {group_norms(graph)[2]}
    everything = Chunking(tuple(group_norms(graph)), (), plan.regions)
    assert set(fewest_splits(graph, everything, plan.budget, cuda=None).split_norms) <= {group_norms(graph)[2]}
    (expected,) = given.run()
    found = given.run(chunked_copy(graph, plan.chunking))[0]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_norms_stay_split_where_the_budget_needs_it() -> None:
    graph = captured(Chain().eval(), torch.randn(1, 4, 16, 16)).graph_module.graph
    names = tuple(group_norms(graph))
    split = Chunking(split_norms=names)
    assert fewest_splits(graph, split, 1, cuda=None).split_norms == names
    assert fewest_splits(graph, split, 2**40, cuda=None).split_norms == ()
