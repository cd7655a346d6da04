"""Predicted bytes and seconds of a program in which some regions run chunk by chunk, cheap enough to compare many.

One timeline of the whole graph gives every call's storages; what a region changes is then arithmetic on them. The
bytes of a chosen region's body are checked against the liveness of the body itself (`exact_body_peak`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.chunked import build_region
from lightcache_fx.costs import Machine, machine_of, traffic
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import calls, num_bytes, output_node
from lightcache_fx.liveness import Timeline, timeline
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion
from lightcache_fx.regions import Region, ranges_of

_END = 2**60


class Memory:
    """A graph's storages and times, in a form in which a change is cheap to evaluate."""

    def __init__(self, graph: fx.Graph, *, cuda: bool | None = None) -> None:
        self.graph = graph
        self.order = list(calls(graph))
        self.place = {node: index for index, node in enumerate(self.order)}
        self.timeline: Timeline = timeline(graph, cuda=cuda)
        self.machine: Machine = machine_of(graph, cuda=self.timeline.cuda)
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
        """The calls whose storages a value lives in: its own, or its first argument's; empty for the caller's."""
        for node in self.order:
            self.roots[node] = (
                frozenset([node])
                if self.own[node]
                else frozenset().union(*(self.roots.get(source, ()) for source in node.all_input_nodes[:1]))
            )
        self.last_use = self._last_uses()
        self._needs: dict[tuple[fx.Node, Axis], dict[fx.Node, Need | None] | CannotCut] = {}

    def needs_of(self, node: fx.Node, axis: Axis) -> dict[fx.Node, Need | None]:
        """As `axis_rules.needs_of`, remembered."""
        key = (node, axis)
        if key not in self._needs:
            try:
                self._needs[key] = needs_of(node, axis)
            except CannotCut as error:
                self._needs[key] = error
        found = self._needs[key]
        if isinstance(found, CannotCut):
            raise found.with_traceback(None)  # raised again and again, it would grow a frame a time
        return found

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


@dataclass(frozen=True, eq=False)
class Chosen:
    """A region and its number of chunks, with what they are predicted to take.

    Attributes:
        begin: the place of the first call of its stretch.
        end: of the last.
        region: what runs chunk by chunk.
        count: number of chunks.
        body_peak: bytes of the largest chunk's temporaries.
        seconds: beyond what the same nodes take unchunked.
        bodies: how the bodies of the chunks are cut in turn.
    """

    begin: int
    end: int
    region: Region
    count: int
    body_peak: int
    seconds: float = 0.0
    bodies: tuple[Chunking, ...] = ()

    @property
    def output_bytes(self) -> int:
        """Bytes of the outputs, which are allocated whole."""
        return sum(map(num_bytes, self.region.outputs))

    def __str__(self) -> str:
        seed = self.region.seed.name
        return f"calls {self.begin} to {self.end}, {self.region.axis} of %{seed} in {self.count} chunks"

    def planned(self, memory: Memory) -> PlannedRegion:
        """By name, for the pass."""
        first, last = memory.order[self.begin].name, memory.order[self.end].name
        return PlannedRegion(first, last, self.region.axis, self.count, self.bodies)


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


def profile(
    memory: Memory, chosen: Sequence[Chosen], begin: int = 0, end: int | None = None, live: int = 0
) -> _Profile:
    """Bytes live during each call of `[begin, end]` when the chosen regions run as loops.

    Args:
        memory: of the graph.
        chosen: regions with disjoint stretches, inside the window or outside of it.
        begin: the window's first call.
        end: its last.
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
    ranges = ranges_of(region, (count - 1) // 2, count)
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


def exact_body_peak(memory: Memory, region: Region, count: int) -> int:
    """Bytes of the largest chunk's temporaries by the bodies' own liveness, and of its copied slices of inputs."""
    module = build_region(region, count, {})
    return module.memory_peak(memory.timeline.rounding)


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
    ranges = ranges_of(region, (count - 1) // 2, count)
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
