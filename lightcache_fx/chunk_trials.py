"""Trials of a region in so many chunks: their bytes and seconds, by arithmetic or by their bodies' own liveness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Chosen, Memory, Stretch
from lightcache_fx.costs import is_free
from lightcache_fx.direct_writes import direct_output
from lightcache_fx.graphs import concrete_size, tensors_of
from lightcache_fx.in_place import Overwrite, overwrites
from lightcache_fx.regions import Region, ranges_of

_INNER = 2
"""A chunk that stands for all that are not at a border."""
_MOST_CALLS = 8192
"""Of all bodies of a region together."""


def estimated(stretch: Stretch, count: int) -> Chosen:
    """A region in `count` chunks, its bytes by arithmetic and its time left open."""
    replaced = overwrites(stretch.region, count, stretch.replaceable, (min(_INNER, count - 1),))
    return Chosen(stretch, count, _body_peak(stretch, count, replaced), overwrites=replaced)


def exactly(chosen: Chosen) -> Chosen:
    """The same by the liveness of its bodies, as they will be built, and with its time."""
    stretch = chosen.stretch
    bodies, rounding = stretch.memory.bodies, stretch.memory.timeline.rounding
    peak, replaced = bodies.peak(stretch.region, chosen.count, stretch.replaceable, rounding)
    exact = replace(chosen, body_peak=peak, overwrites=replaced)
    return replace(exact, seconds=chunk_seconds(exact))


def fits_in_bodies(stretch: Stretch, count: int) -> bool:
    """Whether the bodies of `count` chunks have few enough calls together to be built, and to be compiled by anyone.

    Chunks whose halos reach past the border each have a body of their own: as many as the widest range is longer than
    its share, and each computes that much twice.
    """
    region = stretch.region
    calls = len(region.body)
    if calls * count <= _MOST_CALLS:
        return True
    ranges = ranges_of(region, (count - 1) // 2, count)
    widest = max((stop - start) / region.axes[node].size for node, (start, stop) in ranges.items())
    return calls * count * widest <= _MOST_CALLS


def _body_peak(stretch: Stretch, count: int, replaced: Sequence[Overwrite]) -> int:
    """Predicted bytes of a chunk's temporaries: the body's liveness, each value scaled to its range.

    With them count the parts of the chunk before that wait to be written over an input.
    """
    memory, region = stretch.memory, stretch.region
    ranges = ranges_of(region, (count - 1) // 2, count)

    def local(node: fx.Node, size: int) -> int:
        start, stop = ranges[node]
        return size * (stop - start) // region.axes[node].size

    live = peak = _copied_inputs(memory, region, ranges) + sum(
        local(node, memory.size[node]) for node in (region.outputs[over.output] for over in replaced if over.delay)
    )
    direct = _written_directly(region, replaced)
    for node, dying in zip(region.body, stretch.dying, strict=True):
        live += local(node, memory.own[node]) if node is not direct else 0
        peak = max(peak, live + local(node, memory.extra[node]))
        live -= sum(local(root, memory.own[root]) for root in dying)
    return peak


def _written_directly(region: Region, replaced: Sequence[Overwrite]) -> fx.Node | None:
    """The output that its operator writes where it belongs."""
    index = direct_output(region, replaced)
    return None if index is None else region.outputs[index]


def _copied_inputs(memory: Memory, region: Region, ranges: Mapping[fx.Node, tuple[int, int]]) -> int:
    """Bytes of the slices of inputs that are not views."""
    largest: dict[tuple[fx.Node, Axis], int] = {}
    for node in region.body:
        for source, need in region.needs[node].items():
            if need is not None and source not in region.axes and need.axis.outer > 1:
                low, high = need.reach.of(*ranges[node], need.axis.size)
                size = memory.size[source] * (high - low) // need.axis.size
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


def chunk_seconds(chosen: Chosen) -> float:
    """Predicted time of a region in chunks beyond that of the same nodes unchunked."""
    memory, region, count = chosen.stretch.memory, chosen.region, chosen.count
    machine = memory.machine
    ranges = ranges_of(region, (count - 1) // 2, count)

    def share(node: fx.Node) -> float:
        start, stop = ranges[node]
        return (stop - start) / region.axes[node].size

    def reading(node: fx.Node, source: fx.Node) -> float:
        need, size = region.needs[node].get(source), memory.size[source]
        if need is None:
            return machine.moving(size)
        if source in region.axes:
            return machine.moving(size * share(source))
        low, high = need.reach.of(*ranges[node], need.axis.size)
        part = size * (high - low) / need.axis.size
        run = _run_bytes(source, need.axis, high - low)
        return machine.moving(part) if size <= machine.cache else machine.slicing(part, run)

    total, direct = 0.0, _written_directly(region, chosen.overwrites)
    for node in region.body:
        flops = memory.flops.get(node, 0)
        if is_free(node, flops):
            continue
        part = flops * share(node) * memory.slowdown(node, _part(region, node, ranges))
        moving = sum(reading(node, source) for source in node.all_input_nodes)
        allocating = machine.allocating(memory.extra[node] * share(node))
        if node is not direct:
            moving += machine.moving(memory.size[node] * share(node))
            allocating += machine.allocating(memory.own[node] * share(node))
        total += count * (machine.seconds(part, moving) + allocating) - memory.seconds[node]
    over = {overwrite.output for overwrite in chosen.overwrites}
    for index, node in enumerate(region.outputs):
        size, axis = memory.size[node], region.axes[node]
        run = _run_bytes(node, axis, axis.size // count)
        copying = machine.moving(size / count) + machine.launch if node is not direct else 0.0
        total += count * copying + machine.slicing(size, run)
        total += 0.0 if index in over else machine.allocating(size)
    return total + 2 * count * machine.moving(_copied_inputs(memory, region, ranges))
