"""Which regions to chunk so that a program's peak falls under a budget, at the least predicted time.

The planner takes the highest peak, looks for stretches of the graph around it and axes along which they can be cut,
predicts the peak and the time of each, takes the fastest that fits, and goes on with the next peak. A stretch begins and
ends where little is live, at distances that double: near the peak the choice is fine, far from it coarse, up to the
whole program (frame by frame, say). The search is AutoChunk's (Zhao et al. 2024) with halos and factors of dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.costs import Machine, machine_of, traffic
from lightcache_fx.flops import count_flops
from lightcache_fx.errors import RegionError, nearest
from lightcache_fx.graphs import calls, describe, module_stack, num_bytes, output_node, tensors_of
from lightcache_fx.liveness import Timeline, timeline
from lightcache_fx.passes.chunk_regions import PlannedRegion
from lightcache_fx.policy import Region as PolicyRegion
from lightcache_fx.regions import Blocked, Region, axes_of, finer_axes, full_value, ranges_of, trace_region

log = logging.getLogger(__name__)

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_MAX_REGIONS = 256
_END = 2**60


class Memory:
    """A graph's storages and times, in a form in which a change is cheap to evaluate."""

    def __init__(self, graph: fx.Graph, *, cuda: bool | None = None) -> None:
        self.graph = graph
        self.order = list(calls(graph))
        self.place = {node: index for index, node in enumerate(self.order)}
        self.timeline: Timeline = timeline(graph, cuda=cuda)
        self.machine: Machine = machine_of(graph)
        self.flops = count_flops(graph)
        self.own: dict[fx.Node, int] = dict.fromkeys(self.order, 0)
        """Bytes of the storages that a call leaves behind."""
        ended = {step.node: step.ended for step in self.timeline.steps}
        for block in self.timeline.blocks:
            if not block.workspace and block.died > ended[block.node]:
                self.own[block.node] += block.num_bytes
        self.extra = {step.node: max(0, step.peak - step.before - self.own[step.node]) for step in self.timeline.steps}
        """Bytes that a call takes beside them while it runs."""
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        """The calls whose storages a value lives in; empty for what the caller holds."""
        for node in self.order:
            self.roots[node] = (
                frozenset([node])
                if self.own[node]
                else frozenset().union(*(self.roots.get(source, frozenset()) for source in _alias_sources(node)))
            )
        self.last_use = self._last_uses()

    def _last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {node: index for index, node in enumerate(self.order)}
        for index, node in enumerate(self.order):
            for source in (*node.all_input_nodes, node):
                for root in self.roots.get(source, ()):
                    last[root] = max(last[root], index)
        for source in output_node(self.graph).all_input_nodes:
            for root in self.roots.get(source, ()):
                last[root] = _END
        return last

    @cached_property
    def seconds(self) -> dict[fx.Node, float]:
        """Predicted time of each call."""
        found = {}
        for node in self.order:
            written, read = traffic(node)
            busy = written or self.flops.get(node, 0)
            found[node] = self.machine.seconds(self.flops.get(node, 0), written + read) if busy else 0.0
        return found


def _alias_sources(node: fx.Node) -> Sequence[fx.Node]:
    """Where the value of a call that allocates nothing lives: in its first argument, or in any for in-place lists."""
    return node.all_input_nodes[:1]


@dataclass(frozen=True, eq=False)
class Chosen:
    """A stretch `[begin, end]` of calls, its region and its number of chunks, with what they are predicted to take."""

    begin: int
    end: int
    axis: Axis
    seed: fx.Node
    region: Region
    count: int
    body_peak: int
    output_bytes: int
    seconds: float
    """Beyond what the same nodes take unchunked."""

    def planned(self) -> PlannedRegion:
        """By name, for the pass."""
        nodes = list(calls(self.seed.graph))
        return PlannedRegion(nodes[self.begin].name, nodes[self.end].name, self.seed.name, self.axis, self.count)


@dataclass
class _Profile:
    """Bytes live while each item runs; an item is a call or a whole region."""

    items: list[fx.Node | Chosen] = field(default_factory=list)
    during: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)

    def peak(self) -> tuple[int, fx.Node | Chosen | None]:
        """The highest, and whose it is."""
        if not self.items:
            return 0, None
        index = max(range(len(self.items)), key=self.during.__getitem__)
        return self.during[index], self.items[index]


def profile(memory: Memory, chosen: Sequence[Chosen], begin: int = 0, end: int | None = None, live: int = 0) -> _Profile:
    """Bytes live during each call of `[begin, end]` when the chosen regions run as loops.

    Args:
        memory: of the graph.
        chosen: regions with disjoint stretches, inside the window or outside of it.
        begin, end: the window.
        live: bytes live when the window begins.
    """
    end = len(memory.order) - 1 if end is None else end
    ends = {region.end: region for region in chosen if begin <= region.begin and region.end <= end}
    owner = {node: region for region in ends.values() for node in region.region.body}
    items: list[fx.Node | Chosen] = []
    for index in range(begin, end + 1):
        node = memory.order[index]
        if node not in owner:
            items.append(node)
        if index in ends:
            items.append(ends[index])
    place: dict[fx.Node, int] = {}
    for position, item in enumerate(items):
        if isinstance(item, Chosen):
            place.update(dict.fromkeys(item.region.body, position))
        else:
            place[item] = position
    # When what is live, born before the window or inside of it, dies in the window.
    dies: dict[int, int] = {}
    last: dict[fx.Node, int] = {}
    for node, position in place.items():
        for source in (*node.all_input_nodes, node):
            for root in memory.roots.get(source, ()):
                last[root] = max(last.get(root, 0), position)
    outputs = {root for region in ends.values() for node in region.region.outputs for root in memory.roots[node]}
    for root, position in last.items():
        if memory.last_use[root] <= end and (root not in owner or root in outputs):
            dies[position] = dies.get(position, 0) + memory.own[root]
    result = _Profile()
    for position, item in enumerate(items):
        if isinstance(item, Chosen):
            born, extra = item.output_bytes, item.body_peak
        else:
            born, extra = memory.own[item], memory.extra[item]
        result.items.append(item)
        result.during.append(live + born + extra)
        result.before.append(live)
        live += born - dies.get(position, 0)
    return result


def body_peak(memory: Memory, region: Region, count: int) -> int:
    """Predicted bytes of a chunk's temporaries: the body's liveness, each value scaled to its range."""
    ranges = ranges_of(region, count // 2, count)
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(region.body):
        for source in (*node.all_input_nodes, node):
            for root in memory.roots.get(source, ()):
                if root in region.axes:
                    last[root] = position
    for node in region.outputs:
        for root in memory.roots[node]:
            last[root] = _END
    dying: dict[int, list[fx.Node]] = {}
    for root, position in last.items():
        dying.setdefault(position, []).append(root)

    def local(node: fx.Node, size: int) -> int:
        start, stop = ranges[node]
        return size * (stop - start) // region.axes[node].size

    live = peak = _copied_inputs(region, ranges)
    for position, node in enumerate(region.body):
        live += local(node, memory.own[node])
        peak = max(peak, live + local(node, memory.extra[node]))
        live -= sum(local(root, memory.own[root]) for root in dying.get(position, ()))
    return peak


def _copied_inputs(region: Region, ranges: dict[fx.Node, tuple[int, int]]) -> int:
    """Bytes of the slices of inputs that are not views."""
    largest: dict[tuple[fx.Node, Axis], int] = {}
    for node in region.body:
        for source, need in region.needs[node].items():
            if need is not None and source not in region.axes and need.axis.outer > 1:
                low, high = need.reach.of(*ranges[node], need.axis.size)
                size = num_bytes(source) * (high - low) // need.axis.size
                largest[source, need.axis] = max(size, largest.get((source, need.axis), 0))
    return sum(largest.values())


def chunk_seconds(memory: Memory, region: Region, count: int) -> float:
    """Predicted time of a region in `count` chunks beyond that of the same nodes unchunked."""
    ranges = ranges_of(region, count // 2, count)
    machine = memory.machine
    total = 0.0
    for node in region.body:
        written, read = traffic(node)
        if not (written or memory.flops.get(node, 0)):
            continue
        start, stop = ranges[node]
        share = (stop - start) / region.axes[node].size
        whole = sum(num_bytes(s) for s, need in region.needs[node].items() if need is None)
        moved = (written + read - whole) * share + whole
        total += count * machine.seconds(memory.flops.get(node, 0) * share, moved) - memory.seconds[node]
    copies = 2 * sum(map(num_bytes, region.outputs)) + 2 * count * _copied_inputs(region, ranges)
    return total + copies / machine.bytes + count * len(region.outputs) * machine.launch


@dataclass(frozen=True)
class ChunkPlan:
    """The regions of one program.

    Attributes:
        split_norms: GroupNorms that are split into statistics and scale, because regions cut across them.
        regions: in graph order.
        peak_before, peak_after: predicted bytes of activations.
        limit_node: the call that sets the peak that is left.
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

    @property
    def overhead(self) -> float:
        """Predicted time that chunking adds, over the time without."""
        return self.seconds_added / self.seconds_before if self.seconds_before else 0.0

    @property
    def fits(self) -> bool:
        """Whether the budget is kept."""
        return self.peak_after <= self.budget


def plan_chunks(
    graph: fx.Graph, budget: int | None, regions: Sequence[PolicyRegion] = (), *, cuda: bool | None = None
) -> ChunkPlan:
    """Choose regions until the peak is at most `budget` bytes or nothing lowers it further.

    Args:
        graph: of a program, complete but for its regions.
        budget: for activations; None chooses no regions beside the explicit ones.
        regions: explicit ones, taken first.
        cuda: as for `timeline`.

    Raises:
        RegionError: an explicit region does not exist, or cannot be cut along its axis.
    """
    memory = Memory(graph, cuda=cuda)
    before, _ = profile(memory, []).peak()
    chosen = [found for region in regions for found in _explicit(memory, region)]
    peak, item = profile(memory, chosen).peak()
    budget = before if budget is None else budget
    while peak > budget and isinstance(item, fx.Node) and len(chosen) < _MAX_REGIONS:
        found = _Search(memory, chosen, memory.place[item], budget).best()
        if found is None:
            break
        chosen.append(found)
        log.debug("peak %d at %%%s: %s x %d", peak, item.name, found.axis, found.count)
        peak, item = profile(memory, chosen).peak()
    chosen.sort(key=lambda region: region.begin)
    limit = item.seed if isinstance(item, Chosen) else item
    return ChunkPlan(
        regions=tuple(region.planned() for region in chosen),
        peak_before=before,
        peak_after=peak,
        limit_node=limit.name if limit is not None else "",
        seconds_before=sum(memory.seconds.values()),
        seconds_added=sum(region.seconds for region in chosen),
        budget=budget,
    )


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
        seed = next(node for node in reversed(stretch) if any(memory.place.get(u, _END) > end for u in node.users))
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
        count = -(-axis.size // wanted.size)
        peak, seconds = body_peak(memory, region, count), chunk_seconds(memory, region, count)
        yield Chosen(begin, end, axis, seed, region, count, peak, sum(map(num_bytes, region.outputs)), seconds)


class _Search:
    """Regions around one peak, in a graph where some have been chosen already."""

    def __init__(self, memory: Memory, chosen: Sequence[Chosen], at: int, budget: int) -> None:
        self.memory, self.at, self.budget = memory, at, budget
        whole = profile(memory, chosen)
        self.peak, _ = whole.peak()
        self.before = {item: live for item, live in zip(whole.items, whole.before, strict=True)}
        """Bytes live before each call that is no part of a region."""
        taken = [(region.begin, region.end) for region in chosen]
        self.low = max((end + 1 for _, end in taken if end < at), default=0)
        self.high = min((begin - 1 for begin, _ in taken if begin > at), default=len(memory.order) - 1)

    def best(self) -> Chosen | None:
        """The fastest region that fits the budget, else the one that lowers the peak most."""
        found = [(region, reached) for region, reached in self.candidates() if reached < 0.99 * self.peak]
        fitting = [region for region, reached in found if reached <= self.budget]
        if fitting:
            return min(fitting, key=lambda region: (region.seconds, region.end - region.begin))
        return min(found, key=lambda entry: (entry[1], entry[0].seconds))[0] if found else None

    def candidates(self) -> Iterator[tuple[Chosen, int]]:
        """Regions around the peak, each with the highest that its stretch then reaches."""
        begins = self.narrow_points(range(self.at, self.low - 1, -1), lambda index: self.live_before(index))
        for end in self.narrow_points(range(self.at, self.high + 1), lambda index: self.live_before(index + 1)):
            seed = self.seed(end)
            queue = axes_of(seed) if seed is not None else []
            tried: set[Axis] = set()
            while seed is not None and queue:
                axis = queue.pop(0)
                if axis not in tried:
                    tried.add(axis)
                    yield from self.along(begins, end, seed, axis, queue)

    def along(
        self, begins: Sequence[int], end: int, seed: fx.Node, axis: Axis, queue: list[Axis]
    ) -> Iterator[tuple[Chosen, int]]:
        """Regions that end at `end`, from the shortest to the longest that the rules allow."""
        for begin in begins:
            try:
                region = trace_region(self.memory.order[begin : end + 1], axis, seed=seed)
            except Blocked as blocked:
                queue += finer_axes(axis, blocked)
                if self.memory.place[blocked.node] <= self.at:
                    return
            else:
                found = self.sized(region, begin, end, seed, axis)
                if found is not None:
                    yield found

    def sized(self, region: Region, begin: int, end: int, seed: fx.Node, axis: Axis) -> tuple[Chosen, int] | None:
        """The fewest chunks that fit the budget, or the most that still lower the peak."""
        memory = self.memory
        output_bytes = sum(map(num_bytes, region.outputs))
        smallest = min(region.axes[node].size for node in region.outputs)
        last: tuple[Chosen, int] | None = None
        for count in [count for count in _COUNTS if count < smallest] + [smallest]:
            peak = body_peak(memory, region, count)
            trial = Chosen(begin, end, axis, seed, region, count, peak, output_bytes, 0.0)
            reached, _ = profile(memory, [trial], begin, end, self.live_before(begin)).peak()
            if last is not None and reached >= last[1]:
                break
            last = (trial, reached)
            if reached <= self.budget:
                break
        if last is None or last[1] >= 0.99 * self.peak:
            return None
        return replace(last[0], seconds=chunk_seconds(memory, region, last[0].count)), last[1]

    def live_before(self, index: int) -> int:
        """Bytes live before call `index`, or at the end of the graph."""
        return self.before.get(self.memory.order[index], 0) if index < len(self.memory.order) else 0

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
