"""Predicted bytes and seconds of a program in which some regions run chunk by chunk, cheap enough to compare many.

One timeline of the whole graph gives every call's storages; what a region changes is then arithmetic on them. The
bytes of a chosen region's body are checked against the liveness of the body itself (`exact_body_peak`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.chunked import build_region
from lightcache_fx.costs import Machine, machine_of, traffic
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import calls, is_view, num_bytes, output_node, tensors_of
from lightcache_fx.liveness import CUDA_BLOCK, Timeline, timeline
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion
from lightcache_fx.regions import Region, ranges_of

_END = 2**60
_MAX_CHAIN = 12


class Memory:
    """A graph's storages and times, in a form in which a change is cheap to evaluate."""

    def __init__(self, graph: fx.Graph, *, cuda: bool | None = None) -> None:
        self.graph = graph
        self.order = list(calls(graph))
        self.place = {node: index for index, node in enumerate(self.order)}
        self.timeline: Timeline = timeline(graph, cuda=cuda)
        self.cuda = (
            cuda if cuda is not None else any(t.device.type == "cuda" for n in self.order for t in tensors_of(n))
        )
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
        self.rounding = CUDA_BLOCK if self.cuda else 1
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
    bodies: tuple[Chunking, ...] = ()
    """How the bodies of the chunks are cut in turn."""

    def __str__(self) -> str:
        return f"calls {self.begin} to {self.end}, {self.axis} of %{self.seed.name} in {self.count} chunks"

    def planned(self) -> PlannedRegion:
        """By name, for the pass."""
        nodes = list(calls(self.seed.graph))
        first, last = nodes[self.begin].name, nodes[self.end].name
        return PlannedRegion(first, last, self.seed.name, self.axis, self.count, self.bodies)


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
    return module.memory_peak(memory.rounding)


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


def live_values(memory: Memory, chosen: Sequence[Chosen], item: fx.Node | Chosen) -> list[fx.Node]:
    """The calls whose storages are live while an item runs, largest first; without the insides of regions."""
    inner = {node: region for region in chosen for node in region.region.body if node not in region.region.outputs}
    begin, end = (item.begin, item.end) if isinstance(item, Chosen) else (memory.place[item],) * 2
    live = [
        node
        for node, size in memory.own.items()
        if size and node not in inner and memory.place[node] <= end and memory.last_use[node] >= begin
    ]
    return sorted(live, key=lambda node: -memory.own[node])


def recomputable(graph: fx.Graph, live: Sequence[str], failed: Collection[str]) -> tuple[str, ...]:
    """The largest live value that can be computed again for each reader, with the calls that must be repeated for it.

    Its inputs are there anyway as long as it is, or are at most half its size and are kept for longer, or are computed
    again themselves.
    """
    by_name = {node.name: node for node in graph.nodes}
    last_use = _last_readers(graph)
    for name in live:
        node = by_name.get(name)
        if node is None or name in failed or len(node.users) < 2:
            continue
        chain = _chain(node, last_use)
        if chain is not None:
            return tuple(link.name for link in chain)
    return ()


def _last_readers(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place of the last call that reads each value, or a view of it."""
    places = {node: index for index, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        last[node] = max([places[node], *(places[user] for user in node.users)])
        last[node] = max([last[node], *(last[user] for user in node.users if is_view(user))])
    return last


def _chain(value: fx.Node, last_use: dict[fx.Node, int]) -> list[fx.Node] | None:
    """What must be computed again to have a value again; None where that cannot be done in strips, or is long."""
    size, until = num_bytes(value), last_use[value]
    chain, stack = [value], [value]
    while stack:
        node = stack.pop()
        if not _in_strips(node) or len(chain) > _MAX_CHAIN:
            return None
        for source in node.all_input_nodes:
            kept = source.op == "placeholder" or last_use[source] >= until or num_bytes(source) <= size // 2
            if not kept and source not in chain:
                chain.append(source)
                stack.append(source)
    return chain


def _in_strips(node: fx.Node) -> bool:
    """Whether a call can be computed in strips of its last dimension but one."""
    tensors = tensors_of(node)
    if len(tensors) != 1 or tensors[0].dim() < 3:
        return False
    try:
        needs_of(node, Axis(tensors[0].dim() - 2, tensors[0].shape[-2]))
    except CannotCut:
        return False
    return True
