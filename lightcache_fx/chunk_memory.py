"""Predicted bytes and seconds of a program in which some regions run chunk by chunk, cheap enough to compare many.

One timeline of the whole graph gives every call's storages; what a region changes is then arithmetic on them. How many
chunks it is cut into changes little of that arithmetic, so a `Stretch` keeps what it does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.chunk_bodies import Bodies
from lightcache_fx.chunked import allocated
from lightcache_fx.costs import Machine, is_free, machine_of, slowdown
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import calls, num_bytes, output_node, tensors_of
from lightcache_fx.in_place import Overwrite, laid_out_alike, why_not
from lightcache_fx.liveness import Timeline, timeline
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion
from lightcache_fx.regions import Region, full_value

_END = 2**60


class Memory:
    """A graph's storages and times, in a form in which a change is cheap to evaluate."""

    def __init__(self, graph: fx.Graph, *, cuda: bool | None = None, bodies: Bodies | None = None) -> None:
        self.graph = graph
        self.bodies = Bodies() if bodies is None else bodies
        """What is known of regions' bodies, of this graph and of others that share it."""
        self.order = list(calls(graph))
        self.place = {node: index for index, node in enumerate(self.order)}
        self.timeline: Timeline = timeline(graph, cuda=cuda)
        self.machine: Machine = machine_of(graph, cuda=self.timeline.cuda)
        self.flops = count_flops(graph)
        self.size = {node: num_bytes(node) for node in graph.nodes}
        """Bytes of each value's own elements."""
        self.own = {node: self.timeline.left_bytes(node) for node in self.order}
        """Bytes of the storages that a call leaves behind."""
        self.extra = {step.node: max(0, step.peak - step.before - self.own[step.node]) for step in self.timeline.steps}
        """Bytes that a call takes beside them while it runs."""
        self._last_readers = [self._last_reader(node) for node in self.order]
        self.roots = self.timeline.owners
        self.touched = {
            node: tuple(dict.fromkeys(r for n in (*node.all_input_nodes, node) for r in self.roots.get(n, ())))
            for node in self.order
        }
        """The calls whose storages a call reads or makes."""
        self.last_use = self._last_uses()
        self._needs: dict[tuple[fx.Node, Axis], dict[fx.Node, Need | None] | CannotCut] = {}
        self._allocated: dict[fx.Node, torch.Tensor] = {}
        self._slowdowns: dict[tuple[fx.Node, tuple[Axis, int] | None], float] = {}

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

    def leaving(self, begin: int, end: int) -> list[fx.Node]:
        """As `regions.leaving`, of the calls of `[begin, end]`."""
        readers = enumerate(self._last_readers[begin : end + 1], begin)
        return [self.order[index] for index, last in readers if last > end]

    def _last_reader(self, node: fx.Node) -> int:
        """The place of the last call that reads a value; -1 where nobody does, or it is no tensor."""
        if not tensors_of(node):
            return -1
        return max((self.place.get(user, _END) for user in node.users), default=-1)

    def _last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {node: index for index, node in enumerate(self.order)}
        for index, node in enumerate(self.order):
            last.update(dict.fromkeys(self.touched[node], index))
        for source in output_node(self.graph).all_input_nodes:
            for root in self.roots.get(source, ()):
                last[root] = _END
        return last

    def replaceable(self, region: Region, end: int) -> list[tuple[int, int]]:
        """Outputs and inputs of a region, by number, of which the one could be written over the other.

        The input's storage holds this value alone, laid out as the output is, and nobody reads it behind call `end`,
        the last of the region's stretch.
        """
        counts = Counter(owner for node in region.inputs for owner in self.roots.get(node, ()))
        sole = {
            index: full_value(source)
            for index, source in enumerate(region.inputs)
            if self._is_alone(source, counts, end) and not why_not(source, region, self.place, end)
        }
        return [
            (output, index)
            for output, node in enumerate(region.outputs)
            for index, value in sole.items()
            if laid_out_alike(value, self.allocated(node))
        ]

    def allocated(self, node: fx.Node) -> torch.Tensor:
        """As `chunked.allocated`, remembered."""
        if node not in self._allocated:
            self._allocated[node] = allocated(node)
        return self._allocated[node]

    def _is_alone(self, source: fx.Node, inputs_of: Mapping[fx.Node, int], end: int) -> bool:
        """Whether an input's storage was seen to hold it alone and to die by call `end`.

        Args:
            source: the input.
            inputs_of: for each call, how many of the region's inputs live in its storage.
            end: the last call of the region's stretch.
        """
        owners = self.roots.get(source, frozenset())
        if len(owners) != 1:
            return False
        (owner,) = owners
        rounding = self.timeline.rounding
        fills = self.own[owner] == -(-self.size[source] // rounding) * rounding
        alone = inputs_of[owner] == 1 and owner not in self.timeline.assumed
        return fills and alone and self.last_use[owner] <= end

    @cached_property
    def seconds(self) -> dict[fx.Node, float]:
        """Predicted time of each call."""
        found, machine = {}, self.machine
        for node in self.order:
            flops = self.flops.get(node, 0)
            if is_free(node, flops):
                found[node] = 0.0
                continue
            moving = sum(machine.moving(self.size[value]) for value in (node, *node.all_input_nodes))
            allocating = machine.allocating(self.own[node]) + machine.allocating(self.extra[node])
            found[node] = machine.seconds(flops * self.slowdown(node, None), moving) + allocating
        return found

    def slowdown(self, node: fx.Node, part: tuple[Axis, int] | None) -> float:
        """As `costs.slowdown`, for a convolution whose input is cut to so many positions of an axis."""
        if self.timeline.cuda or not self.flops.get(node, 0):
            return 1.0
        if (node, part) not in self._slowdowns:
            self._slowdowns[node, part] = self._slowdown(node, part)
        return self._slowdowns[node, part]

    @staticmethod
    def _slowdown(node: fx.Node, part: tuple[Axis, int] | None) -> float:
        shape = list(tensors_of(node.all_input_nodes[0])[0].shape)
        if part is not None:
            axis, positions = part
            shape[axis.dim] = axis.local_extent(positions)
        return slowdown(node, shape)


@dataclass(frozen=True, eq=False)
class Stretch:
    """A region at its place in a graph, and what holds of it into however many chunks it is cut.

    Attributes:
        memory: of the graph.
        region: what runs chunk by chunk.
        begin: the place of the first call of its stretch.
        end: of the last.
    """

    memory: Memory
    region: Region
    begin: int
    end: int
    _beside: dict[tuple[Overwrite, ...], tuple[int, int]] = field(default_factory=dict, repr=False)

    @cached_property
    def replaceable(self) -> list[tuple[int, int]]:
        """As `Memory.replaceable`."""
        return self.memory.replaceable(self.region, self.end)

    @cached_property
    def seconds(self) -> float:
        """Predicted time of the region's calls uncut."""
        return sum(self.memory.seconds[node] for node in self.region.body)

    @cached_property
    def dying(self) -> list[list[fx.Node]]:
        """For each call of the body, the calls of it whose storages are not read or returned behind it."""
        region, roots = self.region, self.memory.roots
        last: dict[fx.Node, int] = {}
        for position, node in enumerate(region.body):
            last.update((root, position) for root in self.memory.touched[node] if root in region.axes)
        returned = {root for node in region.outputs for root in roots[node]}
        found: list[list[fx.Node]] = [[] for _ in region.body]
        for root, position in last.items():
            if root not in returned:
                found[position].append(root)
        return found

    def reached(self, chosen: Chosen, live: int) -> int:
        """The most that is live within the stretch when the region runs as chosen and so much is live before."""
        if chosen.overwrites not in self._beside:
            trial = replace(chosen, body_peak=0)
            found = profile(self.memory, [trial], self.begin, self.end)
            during = dict(zip(found.items, found.during, strict=True))
            outputs = during.pop(trial)
            self._beside[chosen.overwrites] = max(during.values(), default=0), outputs
        beside, outputs = self._beside[chosen.overwrites]  # more than is live before
        return live + max(beside, outputs + chosen.body_peak)


@dataclass(frozen=True, eq=False)
class Chosen:
    """A region and its number of chunks, with what they are predicted to take.

    Attributes:
        stretch: the region at its place.
        count: number of chunks.
        body_peak: bytes of the largest chunk's temporaries.
        seconds: beyond what the same nodes take unchunked.
        bodies: how the bodies of the chunks are cut in turn.
        overwrites: outputs that take the place of an input.
    """

    stretch: Stretch
    count: int
    body_peak: int
    seconds: float = 0.0
    bodies: tuple[Chunking, ...] = ()
    overwrites: tuple[Overwrite, ...] = ()

    @property
    def region(self) -> Region:
        """What runs chunk by chunk."""
        return self.stretch.region

    @property
    def begin(self) -> int:
        """The place of the first call of its stretch."""
        return self.stretch.begin

    @property
    def end(self) -> int:
        """Of the last."""
        return self.stretch.end

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the outputs that are allocated."""
        over = {overwrite.output for overwrite in self.overwrites}
        size = self.stretch.memory.size
        return sum(size[node] for index, node in enumerate(self.region.outputs) if index not in over)

    @property
    def overwritten(self) -> list[fx.Node]:
        """The inputs whose storages live on as outputs."""
        return [self.region.inputs[overwrite.input] for overwrite in self.overwrites]

    def __str__(self) -> str:
        seed = self.region.seed.name
        return f"calls {self.begin} to {self.end}, {self.region.axis} of %{seed} in {self.count} chunks"

    def planned(self) -> PlannedRegion:
        """By name, for the pass."""
        order = self.stretch.memory.order
        first, last = order[self.begin].name, order[self.end].name
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
        last.update(dict.fromkeys(memory.touched[node], position))
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
