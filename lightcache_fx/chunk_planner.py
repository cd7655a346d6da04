"""Which regions to chunk so that a program's peak falls under a budget, at the least predicted time.

The planner takes the highest peak, looks for stretches of the graph around it and axes along which they can be cut,
predicts the peak and the time of each, takes the fastest that fits, and goes on with the next peak. A stretch begins
and ends where little is live, at distances that double: near the peak the choice is fine, far from it coarse, up to the
whole program (frame by frame, say). The search is AutoChunk's (Zhao et al. 2024) with halos and factors of dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import (
    Chosen,
    Memory,
    body_peak,
    chunk_seconds,
    exact_body_peak,
    live_values,
    profile,
    recomputable,
)
from lightcache_fx.chunked import build_region, copied_bytes
from lightcache_fx.errors import RegionError, nearest
from lightcache_fx.graphs import copy_graph, describe, module_stack, num_bytes, output_node, tensors_of
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion
from lightcache_fx.passes.split_group_norm import group_norms
from lightcache_fx.policy import Region as PolicyRegion
from lightcache_fx.regions import Blocked, Region, axes_of, finer_axes, full_value, trace_region

log = logging.getLogger(__name__)

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_MAX_STEPS = 1000
_MAX_DEPTH = 1
_NESTED_TRIES = 1
_RECOMPUTE_TRIES = 4
_FLOOR_TRIES = 3
_TRIES = 6
_ENOUGH = 3
"""So many stretches that fit end the search for longer ones."""


@dataclass(frozen=True)
class ChunkPlan:
    """The regions of one program.

    Attributes:
        split_norms: GroupNorms that are split into statistics and scale, because regions cut across them.
        regions: in graph order.
        peak_before, peak_after: predicted bytes of activations.
        limit_node: the call that sets the peak that is left.
        recomputed: values that are computed once for each reader instead of being kept.
        limit_live: the values live at that peak, largest first.
        seconds_before, seconds_added: predicted, on a machine as `costs` has it.
        budget: what was asked for.
    """

    regions: tuple[PlannedRegion, ...]
    peak_before: int
    peak_after: int
    limit_node: str
    seconds_before: float
    seconds_added: float
    budget: int
    split_norms: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    limit_live: tuple[str, ...] = ()

    @property
    def chunking(self) -> Chunking:
        """What is done to the graph."""
        return Chunking(self.split_norms, self.recomputed, self.regions)

    @property
    def overhead(self) -> float:
        """Predicted time that chunking adds, over the time without."""
        return self.seconds_added / self.seconds_before if self.seconds_before else 0.0

    @property
    def fits(self) -> bool:
        """Whether the budget is kept."""
        return self.peak_after <= self.budget


def plan_program(
    graph: fx.Graph,
    budget: int | None,
    regions: Sequence[PolicyRegion] = (),
    *,
    frames: int | None = None,
    cuda: bool | None = None,
    depth: int = 0,
) -> ChunkPlan:
    """As `plan_chunks`; where the budget cannot be kept so, GroupNorms are split and their values cut across."""
    plain = plan_chunks(graph, budget, regions, frames=frames, cuda=cuda, depth=depth)
    if plain.fits:
        return plain

    def after(
        split_norms: tuple[str, ...], recomputed: tuple[str, ...], goal: int | None = budget
    ) -> tuple[ChunkPlan, fx.Graph]:
        prepared, _ = copy_graph(graph)
        prepared.owning_module = graph.owning_module
        Chunking(split_norms, recomputed).apply(prepared)
        plan = plan_chunks(prepared, goal, regions, frames=frames, cuda=cuda, depth=depth)
        added = plan.seconds_added + plan.seconds_before - plain.seconds_before
        plan = replace(plan, split_norms=split_norms, recomputed=recomputed, peak_before=plain.peak_before)
        return replace(plan, seconds_before=plain.seconds_before, seconds_added=added), prepared

    best, prepared = plain, graph
    norms = tuple(group_norms(graph))
    if norms:
        found = after(norms, ())
        if found[0].peak_after < plain.peak_after:
            best, prepared = found
    failed: set[str] = set()
    while not best.fits and len(failed) < _RECOMPUTE_TRIES:
        chain = recomputable(prepared, best.limit_live, failed)
        if not chain:
            break
        found = after(best.split_norms, tuple(dict.fromkeys((*best.recomputed, *chain))))
        log.debug("recomputing %s: peak %d, was %d", chain, found[0].peak_after, best.peak_after)
        if found[0].peak_after < 0.995 * best.peak_after:
            best, prepared = found
        else:
            failed.add(chain[0])
    for _ in range(_FLOOR_TRIES if depth == 0 and not best.fits else 0):
        # The search for a budget out of reach takes what lowers most at once, which is not always what lowers most.
        lower, _ = after(best.split_norms, best.recomputed, int(0.95 * best.peak_after))
        if lower.peak_after >= best.peak_after:
            break
        best = replace(lower, budget=best.budget)
    return best


def plan_chunks(
    graph: fx.Graph,
    budget: int | None,
    regions: Sequence[PolicyRegion] = (),
    *,
    frames: int | None = None,
    cuda: bool | None = None,
    depth: int = 0,
) -> ChunkPlan:
    """Choose regions until the peak is at most `budget` bytes or nothing lowers it further.

    Args:
        graph: of a program, complete but for its regions.
        budget: for activations; None chooses no regions beside the explicit ones.
        regions: explicit ones, taken first.
        frames: cut the whole graph into so many positions of its output's first dimension at a time.
        cuda: as for `timeline`.
        depth: how many loops this graph is the body of; bodies are cut in turn up to `_MAX_DEPTH`.

    Raises:
        RegionError: an explicit region does not exist, or cannot be cut along its axis.
    """
    memory = Memory(graph, cuda=cuda)
    before, _ = profile(memory, []).peak()
    chosen = [found for region in regions for found in _explicit(memory, region)]
    if frames is not None:
        chosen += _frame_by_frame(memory, frames)
    peak, item = profile(memory, chosen).peak()
    budget = before if budget is None else budget
    planner = _Planner(memory, chosen, budget, depth)
    for _ in range(_MAX_STEPS):
        if peak <= budget or item is None or not planner.lower(item):
            break
        log.debug("peak %d at %s: %s", peak, item, planner.chosen[-1])
        peak, item = profile(memory, planner.chosen).peak()
    chosen = sorted(planner.chosen, key=lambda region: region.begin)
    limit = item.seed if isinstance(item, Chosen) else item
    return ChunkPlan(
        regions=tuple(region.planned() for region in chosen),
        peak_before=before,
        peak_after=peak,
        limit_node=limit.name if limit is not None else "",
        limit_live=tuple(node.name for node in live_values(memory, planner.chosen, item)) if item is not None else (),
        seconds_before=sum(memory.seconds.values()),
        seconds_added=sum(region.seconds for region in chosen),
        budget=budget,
    )


def _frame_by_frame(memory: Memory, frames: int) -> list[Chosen]:
    """The whole graph as one region along the first dimension of what it returns; none where one chunk is all."""
    returned = [node for node in output_node(memory.graph).all_input_nodes if node in memory.place]
    seed = max(returned, key=memory.place.__getitem__)
    begin, end = 0, len(memory.order) - 1
    axis = Axis(0, full_value(seed).shape[0])
    if frames >= axis.size:
        return []
    try:
        region = trace_region(memory.order, axis, seed=seed)
    except Blocked as blocked:
        raise RegionError(
            f"decode: frames={frames}, but frames depend on each other: {describe(blocked.node)}: {blocked}; give a"
            f" budget instead of frames, which cuts space where it must"
        ) from blocked
    return [_as_told(memory, region, (begin, end), (seed, axis), frames)]


def _as_told(memory: Memory, region: Region, stretch: tuple[int, int], cut: tuple[fx.Node, Axis], size: int) -> Chosen:
    """A region in chunks of `size` positions."""
    (begin, end), (seed, axis) = stretch, cut
    count = region.counts([-(-axis.size // min(size, axis.size))])[0]
    peak, seconds = body_peak(memory, region, count), chunk_seconds(memory, region, count)
    return Chosen(begin, end, axis, seed, region, count, peak, sum(map(num_bytes, region.outputs)), seconds)


def _explicit(memory: Memory, wanted: PolicyRegion) -> Iterator[Chosen]:
    """The calls of a module, each as a region."""
    calls_of: dict[str, list[int]] = {}
    for index, node in enumerate(memory.order):
        for path in module_stack(node):
            if path.partition("@")[0] == wanted.module:
                calls_of.setdefault(path, []).append(index)
    if not calls_of:
        known = {path.partition("@")[0] for node in memory.order for path in module_stack(node)}
        raise RegionError(f"region: the program has no module {wanted.module!r}{nearest(wanted.module, known)}")
    for indices in calls_of.values():
        begin, end = indices[0], indices[-1]
        stretch = memory.order[begin : end + 1]
        seed = next(node for node in reversed(stretch) if any(memory.place.get(u, end + 1) > end for u in node.users))
        axes = {axis.dim: axis for axis in axes_of(seed)}
        rank = full_value(seed).dim()
        if wanted.axis % rank not in axes or not -rank <= wanted.axis < rank:
            raise RegionError(
                f"region {wanted.module}: axis {wanted.axis} of {describe(seed)} has nothing to cut; expected one of"
                f" {', '.join(map(str, axes)) or 'none'}"
            )
        axis = axes[wanted.axis % rank]
        if wanted.size >= axis.size:
            continue  # one chunk: nothing to do
        try:
            region = trace_region(stretch, axis, seed=seed)
        except Blocked as blocked:
            raise RegionError(
                f"region {wanted.module}: axis {wanted.axis} cannot be cut: {describe(blocked.node)}: {blocked}"
            ) from blocked
        yield _as_told(memory, region, (begin, end), (seed, axis), wanted.size)


class _Planner:
    """Chooses regions peak by peak; what fitted one block of a model is tried first on the next like it."""

    def __init__(self, memory: Memory, chosen: Sequence[Chosen], budget: int, depth: int) -> None:
        self.memory, self.budget, self.depth = memory, budget, depth
        self.chosen = list(chosen)
        self._fitted: dict[Hashable, list[tuple[int, int, int, Axis]]] = {}
        self._types = [_type_of(node) for node in memory.order]

    def lower(self, item: fx.Node | Chosen) -> bool:
        """Choose a region for the peak at a call, or a larger one around a region; whether there is one that helps."""
        at = self.memory.place[item.seed if isinstance(item, Chosen) else item]
        search = _Search(self.memory, self.chosen, item, at, self.budget, self.depth)
        found = self._like_before(search, at) if isinstance(item, fx.Node) else None
        if found is None:
            found = search.best()
            if found is None:
                return False
            if isinstance(item, fx.Node) and not found.bodies:
                known = self._fitted.setdefault(self._types[at], [])
                known.append((found.begin - at, found.end - at, found.end, found.axis))
        self.chosen = [c for c in self.chosen if c.end < found.begin or c.begin > found.end]
        self.chosen.append(found)
        return True

    def _like_before(self, search: _Search, at: int) -> Chosen | None:
        """A region that fits where the same operations stand at the same distances as in one that was chosen."""
        for before, after, old_end, axis in self._fitted.get(self._types[at], []):
            begin, end = at + before, at + after
            shift = end - old_end
            if not (search.may_begin(begin) and search.may_end(end)):
                continue
            if self._types[begin : end + 1] != self._types[begin - shift : end - shift + 1]:
                continue
            seed = search.seed(end)
            found = search.fitted(begin, end, seed, axis) if seed is not None else None
            if found is not None:
                return found
        return None


def _type_of(node: fx.Node) -> Hashable:
    """Equal for calls of one operator on values of the same types."""
    values = [tuple(map(_tensor_type, tensors_of(n))) for n in (node, *node.all_input_nodes)]
    constants = [x for x in pytree.tree_leaves((node.args, node.kwargs)) if not isinstance(x, fx.Node)]
    return node.target, tuple(values), str(constants)


def _tensor_type(tensor: torch.Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


class _Search:
    """Regions around one peak, in a graph where some have been chosen already."""

    def __init__(
        self,
        memory: Memory,
        chosen: Sequence[Chosen],
        item: fx.Node | Chosen,
        at: int,
        budget: int,
        depth: int,
    ) -> None:
        self.memory, self.at, self.budget, self.depth = memory, at, budget, depth
        whole = profile(memory, chosen)
        self.peak = whole.during[whole.items.index(item)]
        self.before = dict(zip(whole.items, whole.before, strict=True))
        """Bytes live before each call and each region."""
        self.taken: dict[int, Chosen] = {i: region for region in chosen for i in range(region.begin, region.end + 1)}
        """The calls that are in a region; a new region holds such a region altogether or not at all."""

    def may_begin(self, index: int) -> bool:
        """Whether a region may begin with a call."""
        return index >= 0 and (index not in self.taken or self.taken[index].begin == index)

    def may_end(self, index: int) -> bool:
        """Whether a region may end with a call."""
        return index < len(self.memory.order) and (index not in self.taken or self.taken[index].end == index)

    def best(self) -> Chosen | None:
        """The fastest region that fits the budget, else the one that lowers the peak most."""
        found = list(self.candidates())
        fitting = sorted((c for c, reached in found if reached <= self.budget), key=lambda c: c.seconds)
        for candidate in fitting:
            exact = self.fitted(candidate.begin, candidate.end, candidate.seed, candidate.axis, candidate.count)
            if exact is not None:
                return exact
        lowering = sorted(found, key=lambda entry: (entry[1], entry[0].seconds))
        exactly = [self.exactly(candidate) for candidate, _ in lowering[:_TRIES]]
        exactly = sorted((e for e in exactly if e[1] < 0.99 * self.peak), key=lambda entry: entry[1])
        nested = [self.nested(exact, reached) for exact, reached in exactly[:_NESTED_TRIES]]
        return min([*exactly, *nested], key=lambda entry: entry[1])[0] if exactly else None

    def nested(self, candidate: Chosen, reached: int) -> tuple[Chosen, int]:
        """A region whose chunks are too large by themselves, their bodies cut in turn to what is left of the budget."""
        beside = reached - candidate.body_peak
        if self.depth >= _MAX_DEPTH or beside >= self.budget:
            return candidate, reached
        memory, module = self.memory, build_region(candidate.region, candidate.count, {})
        bodies, peak, added = [], 0, 0.0
        for index in range(len(module.bodies)):
            graph = module.body(index).graph
            copied = copied_bytes(graph)
            plan = plan_program(graph, self.budget - beside - copied, cuda=memory.cuda, depth=self.depth + 1)
            bodies.append(plan.chunking)
            peak = max(peak, plan.peak_after + copied)
            added = max(added, plan.seconds_added)
        if peak >= 0.99 * candidate.body_peak:
            return candidate, reached
        seconds = candidate.seconds + candidate.count * added
        exact = replace(candidate, body_peak=peak, seconds=seconds, bodies=tuple(bodies))
        return exact, beside + peak

    def fitted(self, begin: int, end: int, seed: fx.Node, axis: Axis, least: int = 2) -> Chosen | None:
        """The region with the fewest chunks that fits, by its bodies' own liveness; None where none does."""
        try:
            region = trace_region(self.memory.order[begin : end + 1], axis, seed=seed, needs_of=self.memory.needs_of)
        except Blocked:
            return None
        for count in region.counts(count for count in _COUNTS if count >= least):
            trial, reached = self.estimate(region, begin, end, seed, axis, count)
            if reached <= self.budget:
                trial, reached = self.exactly(trial)
                if reached <= self.budget:
                    return trial
        return None

    def exactly(self, candidate: Chosen) -> tuple[Chosen, int]:
        """A candidate with its bodies' own peak and its time, and the highest that its stretch reaches."""
        memory, region = self.memory, candidate.region
        peak = exact_body_peak(memory, region, candidate.count)
        seconds = chunk_seconds(memory, region, candidate.count)
        exact = replace(candidate, body_peak=peak, seconds=seconds)
        reached, _ = profile(memory, [exact], exact.begin, exact.end, self.live_before(exact.begin)).peak()
        return exact, reached

    def candidates(self) -> Iterator[tuple[Chosen, int]]:
        """Regions around the peak, each with the highest that its stretch then reaches."""
        last = len(self.memory.order)
        begins = self.narrow_points(filter(self.may_begin, range(self.at, -1, -1)), self.live_before)
        ends = self.narrow_points(filter(self.may_end, range(self.at, last)), lambda index: self.live_before(index + 1))
        fits = 0
        for end in ends:
            seed = self.seed(end)
            queue = axes_of(seed) if seed is not None else []
            tried: set[Axis] = set()
            fits_here = 0
            while seed is not None and queue:
                axis = queue.pop(0)
                if axis not in tried:
                    tried.add(axis)
                    for found, reached in self.along(begins, end, seed, axis, queue):
                        fits_here += reached <= self.budget
                        yield found, reached
            fits += fits_here > 0
            if fits >= _ENOUGH:
                return

    def along(
        self, begins: Sequence[int], end: int, seed: fx.Node, axis: Axis, queue: list[Axis]
    ) -> Iterator[tuple[Chosen, int]]:
        """Regions that end at `end`, from the shortest to the longest that the rules allow."""
        memory, fits = self.memory, 0
        for begin in begins:
            if fits >= _ENOUGH or self.live_before(begin) >= 0.99 * self.peak:
                return
            try:
                region = trace_region(memory.order[begin : end + 1], axis, seed=seed, needs_of=memory.needs_of)
            except Blocked as blocked:
                queue += finer_axes(axis, blocked)
                if memory.place[blocked.node] <= self.at:
                    return
                continue
            found = self.sized(region, begin, end, seed, axis)
            if found is not None:
                fits += found[1] <= self.budget
                yield found

    def estimate(
        self, region: Region, begin: int, end: int, seed: fx.Node, axis: Axis, count: int
    ) -> tuple[Chosen, int]:
        """A region in `count` chunks, its time left open, and the highest that its stretch then reaches."""
        memory = self.memory
        size = sum(map(num_bytes, region.outputs))
        trial = Chosen(begin, end, axis, seed, region, count, body_peak(memory, region, count), size, 0.0)
        reached, _ = profile(memory, [trial], begin, end, self.live_before(begin)).peak()
        return trial, reached

    def sized(self, region: Region, begin: int, end: int, seed: fx.Node, axis: Axis) -> tuple[Chosen, int] | None:
        """The fewest chunks that fit the budget, or the most that still lower the peak."""
        last: tuple[Chosen, int] | None = None
        for count in region.counts(_COUNTS):
            trial, reached = self.estimate(region, begin, end, seed, axis, count)
            if last is None or reached < last[1]:
                last = (trial, reached)
            if reached <= self.budget:
                break
        if last is None or last[1] >= 0.99 * self.peak:
            return None
        return replace(last[0], seconds=chunk_seconds(self.memory, region, last[0].count)), last[1]

    def live_before(self, index: int) -> int:
        """Bytes live before a call, or before the region that it is in; 0 behind the last."""
        if index >= len(self.memory.order):
            return 0
        return self.before[self.taken[index] if index in self.taken else self.memory.order[index]]

    def narrow_points(self, indices: Iterable[int], live: Callable[[int], int]) -> list[int]:
        """Where least is live, once for each doubling of the distance, and the nearest few."""
        points: list[int] = []
        group: list[int] = []
        limit = 1
        for distance, index in enumerate(indices):
            if distance >= limit:
                points.append(min(group, key=live))
                group, limit = [], limit * 2
            group.append(index)
        return [*points, min(group, key=live)] if group else points

    def seed(self, end: int) -> fx.Node | None:
        """The last value that leaves a stretch around the peak that ends at `end`."""
        inside = set(self.memory.order[self.at : end + 1])
        for node in reversed(self.memory.order[self.at : end + 1]):
            if tensors_of(node) and any(user not in inside for user in node.users):
                return node
        return None
