"""Which GroupNorms are split into statistics and scale: no more than a budget asks for.

A whole one reads its value in fewer passes, a split one can be cut across and written over what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import fx

from lightcache_fx.errors import PassError
from lightcache_fx.graphs import copy_graph
from lightcache_fx.liveness import Timeline, timeline
from lightcache_fx.passes.chunk_regions import Chunking, chunked_copy, find_region

_TRIES = 16


def norms_near_peaks(line: Timeline, norms: Sequence[str], budget: int) -> tuple[str, ...]:
    """Of some norms, those between which and the norm before or behind more than the budget is live."""
    wanted = set(norms)
    near: set[str] = set()
    before, high = "", False  # the norm before, and whether the budget was exceeded since
    for step in line.steps:
        high |= step.peak > budget
        if step.node.name in wanted:
            near |= {before, step.node.name} if high else set()
            before, high = step.node.name, step.peak > budget
    near |= {before} if high else set()
    return tuple(name for name in norms if name in near)


def fewest_splits(graph: fx.Graph, chunking: Chunking, budget: int, *, cuda: bool | None) -> Chunking:
    """The same regions with fewer norms split, if the budget is kept so.

    What no region cuts across is put together again: all of it, or by halves as far as the budget allows.
    """

    def fits(norms: tuple[str, ...]) -> bool:
        trial = Chunking(norms, chunking.recomputed, chunking.regions)
        try:
            built = chunked_copy(graph, trial)
        except PassError:  # a region, or what it overwrites, is another without the parts of a norm
            return False
        return timeline(built.graph, cuda=cuda).peak_bytes <= budget

    cut = _cut_across(graph, chunking)
    loose = tuple(name for name in chunking.split_norms if name not in cut)
    kept = _without(chunking.split_norms, loose, fits)
    return Chunking(kept, chunking.recomputed, chunking.regions)


def _without(
    norms: tuple[str, ...], loose: tuple[str, ...], fits: Callable[[tuple[str, ...]], bool]
) -> tuple[str, ...]:
    """Norms less as many loose ones as fit, found by halving what does not."""
    groups = [loose] if loose else []
    for _ in range(_TRIES):
        if not groups:
            break
        group = groups.pop(0)
        fewer = tuple(name for name in norms if name not in group)
        if fits(fewer):
            norms = fewer
        elif len(group) > 1:
            half = len(group) // 2
            groups += [group[:half], group[half:]]
    return norms


def _cut_across(graph: fx.Graph, chunking: Chunking) -> Collection[str]:
    """The norms of which a region makes only some rows or channels at a time, which a whole one cannot do."""
    prepared, _ = copy_graph(graph)
    Chunking(chunking.split_norms, chunking.recomputed).apply(prepared)
    found = set()
    for planned in chunking.regions:
        region = find_region(prepared, planned)
        for node in region.body:
            norm = node.meta.get("lightcache_split_norm")
            by_sample = region.axes[node].dim == (1 if _is_by_row(node) else 0)
            if norm is not None and not by_sample:
                found.add(norm)
    return found


def _is_by_row(node: fx.Node) -> bool:
    """Whether a value's first dimension is rows, and samples come second."""
    return str(node.target) == "lightcache.row_moments.default"
