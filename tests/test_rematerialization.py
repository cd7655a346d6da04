"""Which values are kept and which are computed again, and what that does to a plan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from graphs import Captured, captured
from lightcache_fx import rematerialization
from lightcache_fx.chunk_memory import Memory
from lightcache_fx.chunk_planner import ChunkPlan, Request, plan_program
from lightcache_fx.costs import GPU_FLOAT, GPU_HALF, machine_of
from lightcache_fx.graphs import calls, copy_graph, module_path
from lightcache_fx.liveness import timeline
from lightcache_fx.passes.chunk_regions import Chunking
from lightcache_fx.passes.split_group_norm import group_norms
from lightcache_fx.rematerialization import Values, recomputations

SIZE = 256
WIDE = 8 * SIZE * SIZE * 4
"""Bytes of one value at full size."""


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, 8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = sample
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = conv(F.silu(norm(hidden)))
        return sample + hidden


class Decoder(nn.Module):
    """The last block of an image decoder: doubled, three residual blocks, three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 8, 3, padding=1)
        self.resnets = nn.Sequential(Resnet(), Resnet(), Resnet())
        self.norm, self.leave = nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(F.interpolate(sample, scale_factor=2.0))
        result: torch.Tensor = self.leave(F.silu(self.norm(self.resnets(hidden))))
        return result


def decoder() -> Captured:
    torch.manual_seed(0)
    return captured(Decoder().eval(), torch.randn(1, 4, SIZE // 2, SIZE // 2))


def split(given: Captured) -> fx.Graph:
    graph, _ = copy_graph(given.graph_module.graph)
    Chunking(split_norms=tuple(group_norms(graph))).apply(graph)
    return graph


def planned(given: Captured, budget: int) -> tuple[ChunkPlan, fx.GraphModule]:
    graph, _ = copy_graph(given.graph_module.graph)
    plan = plan_program(graph, Request(budget))
    plan.chunking.apply(graph)
    regions = {n.name: n.meta["lightcache_region"] for n in graph.nodes if n.op == "call_module"}
    return plan, fx.GraphModule(regions, graph)


def test_with_room_for_two_values_one_block_is_made_from_the_next() -> None:
    """Out of a block and into the next are two; a hidden value inside a block would be the third."""
    (cheapest, *_, least) = recomputations(Memory(split(decoder())), int(2.5 * WIDE))
    assert {"add", "add_1"} - set(cheapest), "something large is kept"
    assert {"conv2d", "add", "add_1", "add_2"} <= set(least)
    assert len(cheapest) < len(least)


def test_what_is_kept_longest_counts() -> None:
    """With room for no large value at all there is one choice: everything is made from the input."""
    (only,) = recomputations(Memory(split(decoder())), WIDE // 2)
    assert {"upsample_nearest2d", "conv2d", "add", "add_1", "add_2"} <= set(only)


def test_what_is_made_again_keeps_what_it_is_made_from() -> None:
    """All but the first convolution streamed, it stays to the end, beside the three channels that are returned."""
    graph = split(decoder())
    values = Values.of(Memory(graph), WIDE // 64)
    first = next(node for node in graph.nodes if node.name == "conv2d")
    returned = WIDE * 3 // 8
    assert WIDE + returned <= values.kept_peak(values.streamable - {first}) < 1.05 * (WIDE + returned)
    assert returned <= values.kept_peak(values.streamable) < 1.05 * returned


def test_a_budget_below_two_large_values() -> None:
    given = decoder()
    budget = int(1.6 * WIDE)
    plan, module = planned(given, budget)
    assert plan.recomputed
    assert plan.fits
    assert plan.peak_after == timeline(module.graph).peak_bytes <= budget < plan.peak_before / 2
    (expected,) = given.run()
    assert float((given.run(module)[0] - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_what_is_made_again_is_paid_for() -> None:
    """Less memory costs more time, and the plan says so: the chain is computed once for each norm that is left."""
    generous, _ = planned(decoder(), int(3.4 * WIDE))
    scarce, _ = planned(decoder(), int(1.6 * WIDE))
    assert not generous.recomputed
    assert scarce.overhead > generous.overhead + 0.5


def test_a_kept_budget_is_left_alone() -> None:
    given = decoder()
    plan, _ = planned(given, timeline(given.graph_module.graph).peak_bytes)
    assert plan.chunking == Chunking()


def test_a_half_precision_model_is_priced_as_one_though_its_norms_compute_in_float32() -> None:
    given = captured(Decoder().eval().half(), torch.randn(1, 4, 8, 8).half())
    assert machine_of(split(given), cuda=True) is GPU_HALF
    assert machine_of(split(decoder()), cuda=True) is GPU_FLOAT


def test_values_of_blocks_that_are_alike_are_decided_about_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many values; what is kept still fits, and alike blocks are treated alike."""
    memory, room = Memory(split(decoder())), int(2.5 * WIDE)
    values = Values.of(memory, 0)
    alone = values.keep_what_saves(values.streamable, room)
    monkeypatch.setattr(rematerialization, "_MOST_ALONE", 0)
    together = values.keep_what_saves(values.streamable, room)
    assert values.kept_peak(together) <= room
    assert values.seconds(alone) <= values.seconds(together) < values.seconds(values.streamable)
    alike: dict[tuple[str, str], set[bool]] = {}
    for node in values.streamable:
        place = module_path(node).replace("1", "0").replace("2", "0")
        alike.setdefault((place, str(node.target)), set()).add(node in together)
    assert 2 < len(alike) < len(values.streamable)
    assert all(len(kept_or_not) == 1 for kept_or_not in alike.values())


def test_calls_are_counted_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And sets with which there would be too many are left out."""
    given, budget = split(decoder()), int(2.5 * WIDE)
    memory = Memory(given)
    values, made = Values.of(memory, 0), {}
    for names in recomputations(memory, budget):
        graph, _ = copy_graph(given)
        Chunking(recomputed=names).apply(graph)
        made[names] = len(list(calls(graph)))
        assert values.num_calls({values.root[n] for n in memory.order if n.name in names}) == made[names]
    fewest = min(made.values())
    assert fewest < max(made.values())
    monkeypatch.setattr(rematerialization, "_MOST_CALLS", fewest)
    assert list(recomputations(memory, budget)) == [names for names, number in made.items() if number == fewest]
    monkeypatch.setattr(rematerialization, "_MOST_CALLS", 0)
    assert all(made[names] <= len(memory.order) for names in recomputations(memory, budget))  # no longer than it was
