"""Predicted bytes and seconds of a program in which some regions run chunk by chunk, cheap enough to compare many.

One timeline of the whole graph gives every call's storages; what a region changes is then arithmetic on them. The
bytes of a chosen region's body are checked against the liveness of the body itself (`exactly`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.chunked import allocated, build_region
from lightcache_fx.costs import Machine, is_free, machine_of, slowdown
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import calls, concrete_size, num_bytes, output_node, tensors_of
from lightcache_fx.in_place import Overwrite, laid_out_alike, overwrites, why_not
from lightcache_fx.liveness import Timeline, timeline
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion
from lightcache_fx.regions import Region, full_value, ranges_of

_END = 2**60
_INNER = 2
"""A chunk that stands for all that are not at a border."""


class Memory:
    """A graph's storages and times, in a form in which a change is cheap to evaluate."""

    def __init__(self, graph: fx.Graph, *, cuda: bool | None = None) -> None:
        self.graph = graph
        self.order = list(calls(graph))
        self.place = {node: index for index, node in enumerate(self.order)}
        self.timeline: Timeline = timeline(graph, cuda=cuda)
        self.machine: Machine = machine_of(graph, cuda=self.timeline.cuda)
        self.flops = count_flops(graph)
        self.own = {node: self.timeline.left_bytes(node) for node in self.order}
        """Bytes of the storages that a call leaves behind."""
        self.extra = {step.node: max(0, step.peak - step.before - self.own[step.node]) for step in self.timeline.steps}
        """Bytes that a call takes beside them while it runs."""
        self.roots = self.timeline.owners
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

    def replaceable(self, region: Region, end: int) -> list[tuple[int, int]]:
        """Outputs and inputs of a region, by number, of which the one could be written over the other.

        The input's storage holds this value alone, laid out as the output is, and nobody reads it behind call `end`,
        the last of the region's stretch.
        """
        sole = {
            index: full_value(source)
            for index, source in enumerate(region.inputs)
            if self._is_alone(source, region, end) and not why_not(source, region, self.place, end)
        }
        return [
            (output, index)
            for output, node in enumerate(region.outputs)
            for index, value in sole.items()
            if laid_out_alike(value, allocated(node))
        ]

    def _is_alone(self, source: fx.Node, region: Region, end: int) -> bool:
        """Whether an input's storage was seen to hold it alone and to die by call `end`."""
        owners = self.roots.get(source, frozenset())
        others = [node for node in region.inputs if not owners.isdisjoint(self.roots.get(node, ()))]
        if len(owners) != 1 or others != [source]:
            return False
        (owner,) = owners
        rounding = self.timeline.rounding
        fills = self.own[owner] == -(-num_bytes(source) // rounding) * rounding
        return fills and owner not in self.timeline.assumed and self.last_use[owner] <= end

    @cached_property
    def seconds(self) -> dict[fx.Node, float]:
        """Predicted time of each call."""
        found, machine = {}, self.machine
        for node in self.order:
            flops = self.flops.get(node, 0)
            if is_free(node, flops):
                found[node] = 0.0
                continue
            moving = sum(map(machine.moving, (num_bytes(node), *map(num_bytes, node.all_input_nodes))))
            allocating = machine.allocating(self.own[node]) + machine.allocating(self.extra[node])
            found[node] = machine.seconds(flops * self.slowdown(node, None), moving) + allocating
        return found

    def slowdown(self, node: fx.Node, part: tuple[Axis, int] | None) -> float:
        """As `costs.slowdown`, for a convolution whose input is cut to so many positions of an axis."""
        if self.timeline.cuda or not self.flops.get(node, 0):
            return 1.0
        shape = list(tensors_of(node.all_input_nodes[0])[0].shape)
        if part is not None:
            axis, positions = part
            shape[axis.dim] = axis.local_extent(positions)
        return slowdown(node, shape)


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
        overwrites: outputs that take the place of an input.
    """

    begin: int
    end: int
    region: Region
    count: int
    body_peak: int
    seconds: float = 0.0
    bodies: tuple[Chunking, ...] = ()
    overwrites: tuple[Overwrite, ...] = ()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the outputs that are allocated."""
        over = {overwrite.output for overwrite in self.overwrites}
        return sum(num_bytes(node) for index, node in enumerate(self.region.outputs) if index not in over)

    @property
    def overwritten(self) -> list[fx.Node]:
        """The inputs whose storages live on as outputs."""
        return [self.region.inputs[overwrite.input] for overwrite in self.overwrites]

    def __str__(self) -> str:
        seed = self.region.seed.name
        return f"calls {self.begin} to {self.end}, {self.region.axis} of %{seed} in {self.count} chunks"

    def planned(self, memory: Memory) -> PlannedRegion:
        """By name, for the pass."""
        first, last = memory.order[self.begin].name, memory.order[self.end].name
        return PlannedRegion(first, last, self.region.axis, self.count, self.bodies, self.overwrites)


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
    overwritten = {root for region in ends.values() for node in region.overwritten for root in memory.roots[node]}
    for root, position in last.items():
        if memory.last_use[root] <= end and (root not in owner or root in outputs) and root not in overwritten:
            dies[position] = dies.get(position, 0) + memory.own[root]
    result = _Profile()
    for position, item in enumerate(items):
        if isinstance(item, Chosen):
            born, extra = item.allocated_bytes, item.body_peak
        else:
            born, extra = memory.own[item], memory.extra[item]
        result.items.append(item)
        result.during.append(live + born + extra)
        result.before.append(live)
        live += born - dies.get(position, 0)
    return result


def body_peak(memory: Memory, region: Region, count: int, replaced: Iterable[Overwrite] = ()) -> int:
    """Predicted bytes of a chunk's temporaries: the body's liveness, each value scaled to its range.

    With them count the parts of the chunk before that wait to be written over an input.
    """
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

    live = peak = _copied_inputs(region, ranges) + sum(
        local(node, num_bytes(node)) for node in (region.outputs[over.output] for over in replaced if over.delay)
    )
    for position, node in enumerate(region.body):
        live += local(node, memory.own[node])
        peak = max(peak, live + local(node, memory.extra[node]))
        live -= sum(local(root, memory.own[root]) for root in dying.get(position, ()))
    return peak


def estimated(memory: Memory, region: Region, begin: int, end: int, count: int) -> Chosen:
    """A region in `count` chunks, its bytes by arithmetic and its time left open."""
    replaced = overwrites(region, count, memory.replaceable(region, end), (min(_INNER, count - 1),))
    return Chosen(begin, end, region, count, body_peak(memory, region, count, replaced), overwrites=replaced)


def exactly(memory: Memory, chosen: Chosen) -> Chosen:
    """The same by the liveness of its bodies, as they will be built, and with its time."""
    region, rounding = chosen.region, memory.timeline.rounding
    candidates = memory.replaceable(region, chosen.end)
    module = build_region(region, chosen.count, {}, candidates=candidates, rounding=rounding)
    exact = replace(chosen, body_peak=module.memory_peak(rounding), overwrites=module.overwrites)
    return replace(exact, seconds=chunk_seconds(memory, exact))


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


def _part(region: Region, node: fx.Node, ranges: Mapping[fx.Node, tuple[int, int]]) -> tuple[Axis, int] | None:
    """How the first input of a cut node is cut for one chunk, and to how many positions."""
    need = region.needs[node].get(node.all_input_nodes[0]) if node.all_input_nodes else None
    if need is None:
        return None
    low, high = need.reach.of(*ranges[node], need.axis.size)
    return need.axis, high - low


def _run_bytes(node: fx.Node, axis: Axis, positions: int) -> int:
    """Bytes that lie in a row in a slice of a value: a few where its innermost dimension is cut."""
    value = tensors_of(node)[0]
    return max(1, positions) * axis.inner * max(1, concrete_size(value.stride()[axis.dim])) * value.element_size()


def chunk_seconds(memory: Memory, chosen: Chosen) -> float:
    """Predicted time of a region in chunks beyond that of the same nodes unchunked."""
    region, count, machine = chosen.region, chosen.count, memory.machine
    ranges = ranges_of(region, (count - 1) // 2, count)

    def share(node: fx.Node) -> float:
        start, stop = ranges[node]
        return (stop - start) / region.axes[node].size

    def reading(node: fx.Node, source: fx.Node) -> float:
        need, size = region.needs[node].get(source), num_bytes(source)
        if need is None:
            return machine.moving(size)
        if source in region.axes:
            return machine.moving(size * share(source))
        low, high = need.reach.of(*ranges[node], need.axis.size)
        part = size * (high - low) / need.axis.size
        run = _run_bytes(source, need.axis, high - low)
        return machine.moving(part) if size <= machine.cache else machine.slicing(part, run)

    total = 0.0
    for node in region.body:
        flops = memory.flops.get(node, 0)
        if is_free(node, flops):
            continue
        part = flops * share(node) * memory.slowdown(node, _part(region, node, ranges))
        moving = machine.moving(num_bytes(node) * share(node)) + sum(reading(node, s) for s in node.all_input_nodes)
        allocating = (machine.allocating(size[node] * share(node)) for size in (memory.own, memory.extra))
        total += count * (machine.seconds(part, moving) + sum(allocating)) - memory.seconds[node]
    over = {overwrite.output for overwrite in chosen.overwrites}
    for index, node in enumerate(region.outputs):
        size, axis = num_bytes(node), region.axes[node]
        run = _run_bytes(node, axis, axis.size // count)
        total += count * (machine.moving(size / count) + machine.launch) + machine.slicing(size, run)
        total += 0.0 if index in over else machine.allocating(size)
    return total + 2 * count * machine.moving(_copied_inputs(region, ranges))
