"""The search for regions where budgets are out of reach, and where programs would grow without end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from graphs import captured
from lightcache_fx import chunk_search, chunk_trials
from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Memory, Stretch
from lightcache_fx.chunk_planner import Request, plan_program
from lightcache_fx.chunk_search import Search
from lightcache_fx.chunked import build_region
from lightcache_fx.graphs import calls
from lightcache_fx.regions import leaving, trace_region

HEIGHT = 64


class Convolutions(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(number))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            sample = F.silu(conv(sample))
        return sample


class Blocks(nn.Module):
    """Alike blocks, each with one large value between two that a budget cannot be kept below."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(64, 256) for _ in range(number))
        self.narrow = nn.ModuleList(nn.Linear(256, 64) for _ in range(number))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(number))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for wide, narrow, norm in zip(self.wide, self.narrow, self.norms, strict=True):
            hidden = norm(sample)
            hidden = hidden.roll(1, 0).roll(1, 1)  # keeps regions within the block
            sample = sample + narrow(F.gelu(wide(hidden)))
        return sample


def graph_of(model: nn.Module, *shape: int) -> fx.Graph:
    torch.manual_seed(0)
    return captured(model.eval(), torch.randn(*shape)).graph_module.graph


def stretch_of(graph: fx.Graph) -> Stretch:
    memory = Memory(graph)
    return Stretch(memory, trace_region(memory.order, Axis(2, HEIGHT)), 0, len(memory.order) - 1)


@pytest.mark.parametrize("number", [1, 4, 12])
def test_the_calls_of_bodies_are_near_what_is_built(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number of chunks that is let through, and the next, by the bodies as they are built."""
    graph, limit = graph_of(Convolutions(number), 1, 4, HEIGHT, 16), 20 * number
    monkeypatch.setattr(chunk_trials, "_MOST_CALLS", limit)
    stretch = stretch_of(graph)
    counts = stretch.region.counts(range(2, HEIGHT + 1))
    built = {}
    for count in counts:
        module = build_region(stretch.region, count, {})
        built[count] = sum(len(list(calls(body.graph))) for body in module.bodies)
    let_through = [count for count in counts if chunk_trials.fits_in_bodies(stretch, count)]
    assert let_through == counts[: len(let_through)]
    assert len(let_through) > 0
    assert (len(let_through) < len(counts)) == (number == 12)
    slices = 3  # a body also takes slices of what it reads
    assert all(built[count] <= slices * limit for count in let_through)
    assert all(built[count] > limit / 2 for count in counts[len(let_through) :])


def test_no_region_is_of_endless_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(Convolutions(12), 1, 4, HEIGHT, 16)
    peak = plan_program(graph, Request(None)).peak_before
    free = plan_program(graph, Request(int(0.1 * peak)))
    monkeypatch.setattr(chunk_trials, "_MOST_CALLS", 100)
    held = plan_program(graph, Request(int(0.1 * peak)))
    assert held.peak_after >= free.peak_after
    memory = Memory(graph)
    for region in held.regions:
        begin, end = (
            next(i for i, n in enumerate(memory.order) if n.name == name) for name in (region.first, region.last)
        )
        traced = trace_region(memory.order[begin : end + 1], region.axis)
        assert chunk_trials.fits_in_bodies(Stretch(memory, traced, begin, end), region.count)


def test_alike_blocks_that_cannot_fit_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lowers one block's peak as far as can be is done to the others; the plan is as low as by searches of all."""
    graph = graph_of(Blocks(6), 8, 32, 64)
    peak = plan_program(graph, Request(None)).peak_before
    searched = 0
    best = Search.best

    def counting(self: Search) -> object:
        nonlocal searched
        searched += 1
        return best(self)

    monkeypatch.setattr(Search, "best", counting)
    plan = plan_program(graph, Request(int(0.05 * peak), nested=True))
    assert not plan.fits
    assert plan.peak_after < 0.8 * peak
    assert len(plan.regions) >= 6
    assert searched < len(plan.regions)
    assert len({region.count for region in plan.regions}) <= 2


def test_what_leaves_is_known_without_looking() -> None:
    memory = Memory(graph_of(Blocks(2), 4, 8, 64))
    for begin in range(len(memory.order)):
        for end in range(begin, len(memory.order)):
            assert memory.leaving(begin, end) == leaving(memory.order[begin : end + 1])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("model", [Blocks(3), Convolutions(4)], ids=["blocks", "convolutions"])
def test_pruning_changes_no_plan(model: nn.Module, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a search that traces every stretch, and tries every number of chunks where none can fit."""
    shape = (1, 4, HEIGHT, 16) if isinstance(model, Convolutions) else (8, 32, 64)
    graph = graph_of(model, *shape)
    budget = int(share * plan_program(graph, Request(None)).peak_before)
    pruned = plan_program(graph, Request(budget))
    monkeypatch.setattr(Search, "helps", lambda *_: True)
    monkeypatch.setattr(chunk_search, "_COARSE", 1)
    whole = plan_program(graph, Request(budget))
    assert pruned.fits == whole.fits
    assert pruned.peak_after <= 1.01 * whole.peak_after
    if whole.fits:
        assert pruned == whole
