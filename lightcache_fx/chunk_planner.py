"""Which regions to chunk so that a program's peak falls under a budget, at the least predicted time.

The planner takes the highest peak, searches for a region around it (`chunk_search`), takes the fastest that fits, and
goes on with the next peak. Where that is not enough, GroupNorms are split so that regions may cut across them, and then
large values are computed again for each of their readers.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx
from torch.utils import _pytree as pytree

from lightcache_fx.chunk_bodies import Bodies
from lightcache_fx.chunk_memory import Chosen, Memory, profile
from lightcache_fx.chunk_search import PlanBody, Search
from lightcache_fx.chunk_trials import estimated
from lightcache_fx.explicit_regions import frame_by_frame, layer_by_layer, regions_of_module
from lightcache_fx.graphs import copy_graph, layout_of
from lightcache_fx.liveness import timeline
from lightcache_fx.norm_splits import fewest_splits, norms_near_peaks
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion, chunked_copy
from lightcache_fx.passes.split_group_norm import group_norms
from lightcache_fx.policy import Layers, Region
from lightcache_fx.regions import Blocked
from lightcache_fx.rematerialization import recomputations

log = logging.getLogger(__name__)

_MAX_STEPS = 1000
_OUT_OF_REACH = 0.25
"""Of the least that was reached: the budget of one more search, for the least that can be reached."""


@dataclass(frozen=True)
class Request:
    """What is asked of one program.

    Attributes:
        budget: bytes for activations; None chooses no regions beside the explicit ones.
        regions: explicit ones, taken first.
        layers: every other layer in so many chunks.
        frames: cut the whole graph into so many positions of its output's first dimension at a time.
        cuda: as for `timeline`.
        nested: whether the graph is the body of a loop already; its own regions' bodies are not cut in turn.
        best_effort: whether what is reached on the way to the budget will do; then the least is not looked for.
    """

    budget: int | None
    regions: Sequence[Region] = ()
    frames: int | None = None
    cuda: bool | None = None
    nested: bool = False
    layers: Layers | None = None
    best_effort: bool = False


@dataclass(frozen=True)
class ChunkPlan:
    """The regions of one program.

    Attributes:
        regions: in graph order.
        peak_before, peak_after: predicted bytes of activations.
        limit_node: the call that sets the peak that is left.
        seconds_before, seconds_added: predicted, on a machine as `costs` has it.
        budget: what was asked for.
        split_norms: GroupNorms that are split into statistics and scale, because regions cut across them.
        recomputed: values that are computed once for each reader instead of being kept.
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


class _Stages:
    """A graph with norms split and values computed again, and what is known of it; every search reads the same."""

    def __init__(self, graph: fx.Graph, cuda: bool | None, bodies: Bodies) -> None:
        self.graph, self.cuda, self.bodies = graph, cuda, bodies
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...]], Memory] = {}

    def memory(self, norms: tuple[str, ...] = (), recomputed: tuple[str, ...] = ()) -> Memory:
        """Of the graph after this."""
        if (norms, recomputed) not in self._known:
            prepared = self.graph
            if norms or recomputed:
                prepared, _ = copy_graph(self.graph)
                Chunking(norms, recomputed).apply(prepared)
            self._known[norms, recomputed] = Memory(prepared, cuda=self.cuda, bodies=self.bodies)
        return self._known[norms, recomputed]


def plan_program(graph: fx.Graph, request: Request, bodies: Bodies | None = None) -> ChunkPlan:
    """As `plan_chunks`; where the budget cannot be kept so, GroupNorms are split, and large values computed again.

    Where that is not enough, and least is asked for, the plan is the one that takes least, found with a budget that
    nothing keeps.

    Args:
        graph: of a program, complete but for its regions.
        request: what is asked of it.
        bodies: what is known of regions' bodies from other searches.
    """
    stages = _Stages(graph, request.cuda, Bodies() if bodies is None else bodies)
    plan = _plan_in_stages(stages, request)
    if plan.fits or request.nested or request.best_effort:
        return plan
    least = _plan_in_stages(stages, replace(request, budget=int(_OUT_OF_REACH * plan.peak_after)))
    return min(plan, replace(least, budget=plan.budget), key=lambda plan: plan.peak_after)


def _plan_in_stages(stages: _Stages, request: Request) -> ChunkPlan:
    plain = plan_chunks(stages.memory(), request)
    if plain.fits:
        return plain

    def after(norms: tuple[str, ...], recomputed: tuple[str, ...] = ()) -> ChunkPlan:
        plan = plan_chunks(stages.memory(norms, recomputed), request)
        added = plan.seconds_added + plan.seconds_before - plain.seconds_before
        return replace(
            plan, split_norms=norms, recomputed=recomputed, peak_before=plain.peak_before,
            seconds_before=plain.seconds_before, seconds_added=added,
        )  # fmt: skip

    def settings() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Norms to split and values to compute again, the cheapest first."""
        yield from dict.fromkeys((names, ()) for names in (near, norms) if names)
        for names in recomputations(stages.memory(norms), plain.budget):
            yield norms, names

    norms = tuple(group_norms(stages.graph))
    near = norms_near_peaks(stages.memory().timeline, norms, plain.budget)
    best = plain
    for split_norms, names in settings():
        found = after(split_norms, names)
        log.debug(
            "%d norms split, %d values again: peak %d, was %d",
            len(split_norms), len(names), found.peak_after, best.peak_after,
        )  # fmt: skip
        best = min(best, found, key=lambda plan: plan.peak_after)
        if best.fits:
            return _less_split(stages, best)
    return best


def _less_split(stages: _Stages, plan: ChunkPlan) -> ChunkPlan:
    """A plan that fits with as few norms split as its regions allow."""
    fewer = fewest_splits(stages.graph, plan.chunking, plan.budget, cuda=stages.cuda)
    if fewer.split_norms == plan.split_norms:
        return plan
    peak = timeline(chunked_copy(stages.graph, fewer).graph, cuda=stages.cuda).peak_bytes
    memories = (stages.memory(chunking.split_norms, chunking.recomputed) for chunking in (plan.chunking, fewer))
    before, after = (sum(memory.seconds.values()) for memory in memories)
    return replace(
        plan, split_norms=fewer.split_norms, peak_after=peak, seconds_added=plan.seconds_added - before + after
    )


def plan_chunks(memory: Memory, request: Request) -> ChunkPlan:
    """Choose regions until the peak is at most the budget or nothing lowers it further.

    Args:
        memory: of the graph of a program, complete but for its regions.
        request: what is asked of it.

    Raises:
        RegionError: an explicit region does not exist, or cannot be cut along its axis.
    """
    before, _ = profile(memory, []).peak()
    chosen = [found for region in request.regions for found in regions_of_module(memory, region)]
    if request.layers is not None:
        chosen += layer_by_layer(memory, request.layers, chosen)
    if request.frames is not None:
        chosen += frame_by_frame(memory, request.frames)
    peak, item = profile(memory, chosen).peak()
    budget = before if request.budget is None else request.budget

    def plan_body(body: fx.Graph, left: int) -> ChunkPlan:
        return plan_program(body, Request(left, cuda=memory.timeline.cuda, nested=True), memory.bodies)

    planner = _Planner(memory, chosen, budget, None if request.nested else plan_body)
    for _ in range(_MAX_STEPS):
        if peak <= budget or item is None or not planner.lower(item):
            break
        log.debug("peak %d at %s: %s", peak, item, planner.chosen[-1])
        peak, item = profile(memory, planner.chosen).peak()
    chosen = sorted(planner.chosen, key=lambda region: region.begin)
    limit = item.region.seed if isinstance(item, Chosen) else item
    return ChunkPlan(
        regions=tuple(region.planned() for region in chosen),
        peak_before=before,
        peak_after=peak,
        limit_node=limit.name if limit is not None else "",
        seconds_before=sum(memory.seconds.values()),
        seconds_added=sum(region.seconds for region in chosen),
        budget=budget,
    )


class _Planner:
    """Chooses regions peak by peak; what fitted one block of a model is tried first on the next like it."""

    def __init__(self, memory: Memory, chosen: Sequence[Chosen], budget: int, plan_body: PlanBody | None) -> None:
        self.memory, self.budget, self.plan_body = memory, budget, plan_body
        self.chosen = list(chosen)
        self._found: dict[Hashable, list[_Found]] = {}
        self._types = [_type_of(node) for node in memory.order]

    def lower(self, item: fx.Node | Chosen) -> bool:
        """Choose a region for the peak at a call, or a larger one around a region; whether there is one that helps."""
        at = self.memory.place[item.region.seed if isinstance(item, Chosen) else item]
        search = Search(self.memory, self.chosen, item, at, self.budget, self.plan_body)
        found = self._like_before(search, at) if isinstance(item, fx.Node) else None
        if found is None:
            found = search.best()
            if found is None:
                return False
            if isinstance(item, fx.Node) and not found.bodies:
                _, reached = search.exactly(found)
                self._found.setdefault(self._types[at], []).append(_Found(at, found, reached))
        self.chosen = [c for c in self.chosen if c.end < found.begin or c.begin > found.end]
        self.chosen.append(found)
        return True

    def _like_before(self, search: Search, at: int) -> Chosen | None:
        """A region where the same operations stand at the same distances as in one that was chosen.

        It fits, or lowers the peak as far as the other did.
        """
        for known in self._found.get(self._types[at], []):
            shift = at - known.at
            begin, end = known.chosen.begin + shift, known.chosen.end + shift
            if not (search.may_begin(begin) and search.may_end(end)):
                continue
            if self._types[begin : end + 1] != self._types[known.chosen.begin : known.chosen.end + 1]:
                continue
            try:
                stretch = search.stretch(begin, end, known.chosen.region.axis)
            except Blocked:
                continue
            found = search.fitted(stretch)
            if found is not None:
                return found
            if known.chosen.count in stretch.region.counts([known.chosen.count]):
                lowering, reached = search.exactly(estimated(stretch, known.chosen.count))
                if reached <= known.reached and reached < 0.99 * search.peak:
                    return lowering
        return None


@dataclass(frozen=True)
class _Found:
    """A region that was chosen for the peak at call `at`, and the highest that its stretch reached then."""

    at: int
    chosen: Chosen
    reached: int


def _type_of(node: fx.Node) -> Hashable:
    """Equal for calls of one operator on values of the same types."""
    values = tuple(map(layout_of, (node, *node.all_input_nodes)))
    constants = [x for x in pytree.tree_leaves((node.args, node.kwargs)) if not isinstance(x, fx.Node)]
    return node.target, values, str(constants)
