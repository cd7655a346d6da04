"""A region as one module of a program's graph: the bodies of its chunks, and the loop that runs them.

Each output is allocated whole, or takes the place of an input, and every chunk writes its part (`direct_writes`: some
without a copy). A body is a static
graph for a chunk's sizes; chunks of the same sizes and borders share one, so that there are a few bodies (first, inner,
last, uneven) and not one a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx, nn

from lightcache_fx.axes import Axis, Reach
from lightcache_fx.axis_rules import build_local
from lightcache_fx.axis_rules.registry import evaluate
from lightcache_fx.direct_writes import direct_output, without_direct_writes, write_directly, written_by
from lightcache_fx.graphs import GraphInput, num_bytes, outputs, placeholders
from lightcache_fx.in_place import Overwrite, overwrites
from lightcache_fx.liveness import Timeline, timeline
from lightcache_fx.ranges import profiled
from lightcache_fx.regions import Reads, Region, full_value, ranges_of, reads_of


@dataclass(frozen=True)
class Slice:
    """Positions `[start, stop)` of input or output number `index` along `axis`; the whole of it where axis is None."""

    index: int
    axis: Axis | None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Chunk:
    """One turn of the loop: which body, on which slices of the inputs, into which slices of the outputs."""

    body: int
    reads: tuple[Slice, ...]
    writes: tuple[Slice, ...]


@dataclass(frozen=True)
class Allocation:
    """How an output is allocated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        """The output, not yet written."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


class ChunkedRegion(nn.Module):
    """Runs a region chunk by chunk; its arguments are the region's inputs, its results the region's outputs.

    Attributes:
        name: of the call in its graph, for profilers.
        label: what is cut, for the printed graph: `dim 0: [25] in 25 chunks`.
        flops: of all chunks together, halos included.
        overwrites: outputs that are written over inputs, which must not be used afterwards.
    """

    def __init__(
        self,
        bodies: list[fx.GraphModule],
        chunks: tuple[Chunk, ...],
        outputs: tuple[Allocation, ...],
        *,
        label: str,
        flops: int,
        overwrites: tuple[Overwrite, ...] = (),
    ) -> None:
        super().__init__()
        self.name = "region"
        self.bodies = nn.ModuleList(bodies)
        self.chunks = chunks
        self.outputs = outputs
        self.label = label
        self.flops = flops
        self.overwrites = overwrites
        self._timelines: dict[int, list[Timeline]] = {}
        self._direct = [written_by(body.graph) for body in bodies]
        self._lowered = False
        self._runs: list[Callable[..., Sequence[torch.Tensor]]] = list(bodies)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the region's outputs."""
        over = self.overwritten()
        results = [inputs[over[i]] if i in over else output.empty() for i, output in enumerate(self.outputs)]
        waiting: list[_Part] = []
        with profiled(lambda: f"{self.name} ({self.label})"):
            for number, chunk in enumerate(self.chunks):
                with profiled(lambda n=number: f"chunk {n} of {self.name}"):  # type: ignore[misc]
                    waiting = self._run(chunk, inputs, results, waiting)
            for write, part in waiting:
                _write(results[write.index], write, part)
        return tuple(results)

    def _run(
        self, chunk: Chunk, inputs: tuple[torch.Tensor, ...], results: list[torch.Tensor], waiting: list[_Part]
    ) -> list[_Part]:
        """One turn; what it computed is freed before the next one begins, but for what is still to be written.

        What goes over an input is written last: other parts may be views of it.
        """
        delays = {overwrite.output: overwrite.delay for overwrite in self.overwrites}
        arguments, direct = [_read(inputs[read.index], read) for read in chunk.reads], self._direct[chunk.body]
        if direct is not None:
            arguments.append(_read(results[direct], chunk.writes[direct]))
        parts = self._runs[chunk.body](*arguments)
        made = [(write, part) for write, part in zip(chunk.writes, parts, strict=True) if write.index != direct]
        fresh = [(write, part) for write, part in made if write.index not in delays]
        over = [(write, part) for write, part in made if delays.get(write.index) == 0]
        for write, part in (*fresh, *waiting, *over):
            _write(results[write.index], write, part)
        return [(write, part) for write, part in made if delays.get(write.index) == 1]

    def body(self, index: int) -> fx.GraphModule:
        """One of the bodies."""
        found = self.bodies[index]
        assert isinstance(found, fx.GraphModule)
        return found

    def direct(self, index: int) -> int | None:
        """The output that a body writes itself, into its last argument."""
        return self._direct[index]

    def replace_body(self, index: int, body: fx.GraphModule) -> None:
        """Put another body of the same inputs and outputs in the place of one."""
        self.bodies[index] = self._runs[index] = body
        self._timelines.clear()

    def lower(self, compiled: Callable[[fx.GraphModule], Callable[..., Sequence[torch.Tensor]]]) -> None:
        """Run what `compiled` makes of each body, as one that returns all of its results, in its place; once for all.

        Programs that differ only in what they copy share their regions.
        """
        if self._lowered:
            return
        self._lowered = True
        self._runs = [compiled(without_direct_writes(self.body(index))) for index in range(len(self.bodies))]
        self._direct = [None] * len(self.bodies)

    def write_directly(self, output: int, place: torch.Tensor) -> None:
        """Let every body that can write its part of an output straight into it, which is laid out as `place`."""
        self._timelines.clear()
        for index in range(len(self.bodies)):
            body = self.body(index)
            write_directly(body.graph, output, place)
            body.recompile()
            self._direct[index] = written_by(body.graph)

    def overwritten(self) -> dict[int, int]:
        """The outputs that are written over an input: output to input."""
        return {overwrite.output: overwrite.input for overwrite in self.overwrites}

    def memory_peak(self, rounding: int) -> int:
        """Bytes that the largest chunk takes beside the region's inputs and outputs."""
        lines = self.timelines(rounding)
        peaks = [line.peak_bytes + copied_bytes(self.body(index).graph) for index, line in enumerate(lines)]
        waiting = [self.waiting_bytes(index, rounding) for index in range(len(lines))]
        highest = before = 0
        for chunk in self.chunks:
            highest = max(highest, before + peaks[chunk.body])
            before = waiting[chunk.body]
        return highest

    def waiting_bytes(self, index: int, rounding: int) -> int:
        """Bytes that the results of a body hold which are not written before the next chunk is computed."""
        returned, line = outputs(self.body(index).graph), self.timelines(rounding)[index]
        owners = {o for w in self.overwrites if w.delay for o in line.owners.get(returned[w.output], ())}
        return sum(line.left_bytes(owner) for owner in owners)

    def timelines(self, rounding: int) -> list[Timeline]:
        """The liveness of each body."""
        if rounding not in self._timelines:
            graphs = [self.body(index).graph for index in range(len(self.bodies))]
            self._timelines[rounding] = [timeline(graph, cuda=rounding > 1) for graph in graphs]
        return self._timelines[rounding]

    def makes_its_own(self, output: int, rounding: int) -> bool:
        """Whether no chunk's part of an output lives in the storage of an input."""
        bodies = zip(self.timelines(rounding), map(self.body, range(len(self.bodies))), strict=True)
        return all(line.owners.get(outputs(body.graph)[output]) for line, body in bodies)


_Part = tuple[Slice, torch.Tensor]
"""A chunk's part of an output, and where it goes."""


def copied_bytes(graph: fx.Graph) -> int:
    """Bytes of the slices of inputs that are copies."""
    return sum(num_bytes(node) for node in placeholders(graph) if node.meta["lightcache_copied"])


def _read(tensor: torch.Tensor, read: Slice) -> torch.Tensor:
    return tensor if read.axis is None else read.axis.narrow(tensor, read.start, read.stop)


def _write(result: torch.Tensor, write: Slice, part: torch.Tensor) -> None:
    axis = write.axis
    assert axis is not None
    if axis.outer == 1:
        axis.narrow(result, write.start, write.stop).copy_(part)
        return
    factors = (axis.outer, -1, axis.inner)
    target = result.unflatten(axis.dim, factors).narrow(axis.dim + 1, write.start, write.stop - write.start)
    target.copy_(part.unflatten(axis.dim, factors))


def build_region(
    region: Region,
    count: int,
    flops_of: dict[fx.Node, int],
    *,
    candidates: Sequence[tuple[int, int]] = (),
    rounding: int = 1,
) -> ChunkedRegion:
    """The module that computes a region in `count` chunks.

    Args:
        region: as `trace_region` found it.
        count: at most the number of positions.
        flops_of: FLOPs of the whole body's nodes, from which those of the chunks are taken in proportion.
        candidates: outputs and inputs, by number, of which the one may be written over the other (`in_place`).
        rounding: the device's, as `memory_peak` has it.
    """
    bodies: dict[Hashable, tuple[int, fx.GraphModule]] = {}
    chunks = []
    flops = Fraction(0)
    for index in range(count):
        ranges = ranges_of(region, index, count)
        flops += sum(
            (Fraction(flops_of.get(n, 0) * (stop - start), region.axes[n].size) for n, (start, stop) in ranges.items()),
            Fraction(0),
        )
        reads = reads_of(region, ranges)
        key = _sizes_and_borders(region, ranges, index, count)
        if key not in bodies:
            bodies[key] = (len(bodies), _build_body(region, ranges, reads, index, count))
        writes = tuple(
            Slice(i, region.axes[node], *region.bounds(index, count, node)) for i, node in enumerate(region.outputs)
        )
        slices = tuple(
            Slice(region.inputs.index(source), axis, start, stop) for (source, axis), (start, stop) in reads.items()
        )
        chunks.append(Chunk(bodies[key][0], slices, writes))
    allocations = tuple(
        Allocation(tuple(value.shape), value.stride(), value.dtype, value.device)
        for value in map(allocated, region.outputs)
    )
    label = f"{region.axis} in {count} chunks"
    module = ChunkedRegion(
        [body for _, body in bodies.values()], tuple(chunks), allocations, label=label, flops=int(flops)
    )
    candidates = [pair for pair in candidates if module.makes_its_own(pair[0], rounding)]
    module.overwrites = overwrites(region, count, candidates, range(count))
    direct = direct_output(region, module.overwrites)
    if direct is not None:
        module.write_directly(direct, allocated(region.outputs[direct]))
    return module


def allocated(node: fx.Node) -> torch.Tensor:
    """A fake tensor laid out as a region allocates an output: in the same order of dimensions, without gaps."""
    with torch.no_grad():
        return torch.empty_like(full_value(node))


def _sizes_and_borders(region: Region, ranges: dict[fx.Node, tuple[int, int]], index: int, count: int) -> Hashable:
    """Equal for two chunks exactly when the same body computes both.

    A body depends on lengths, on where each read lies in what is there, on how far a need sticks out at either end
    (padding), and on how a range lies to the grid of a scaled one.
    """
    key: list[Hashable] = []
    reads = reads_of(region, ranges)
    for node in region.body:
        start, stop = ranges[node]
        key.append(stop - start)
        for source, need in region.needs[node].items():
            if need is None:
                continue
            low, high = need.reach.of(start, stop, need.axis.size)
            have = ranges[source] if source in region.axes else reads[source, need.axis]
            key += [low - have[0], high - low, have[1] - have[0], *_sticking_out(need.reach, start, stop, low, high)]
    for node in region.outputs:
        start, stop = region.bounds(index, count, node)
        key += [start - ranges[node][0], stop - start]
    return tuple(key)


def _sticking_out(reach: Reach, start: int, stop: int, low: int, high: int) -> Iterator[Hashable]:
    left, right = reach.unclamped(start, stop)
    yield low - left
    yield right - high
    yield start * reach.scale % 1
    yield stop * reach.scale % 1


def _build_body(
    region: Region, ranges: dict[fx.Node, tuple[int, int]], reads: Reads, index: int, count: int
) -> fx.GraphModule:
    graph = fx.Graph()
    held: dict[tuple[fx.Node, Axis | None], tuple[fx.Node, int]] = {}  # what the body has, and from which position on
    for (source, axis), (start, stop) in reads.items():
        node = graph.placeholder(source.name)
        node.target = node.name  # an input read along two axes comes twice
        node.meta["lightcache_input"] = GraphInput("user", source.name, "latent")
        value = full_value(source)
        node.meta["lightcache_copied"] = axis is not None and axis.outer > 1
        node.meta["val"] = value if axis is None else _like(axis.narrow(value, start, stop))
        held[source, axis] = (node, start)

    def at(source: fx.Node, axis: Axis, start: int, stop: int) -> fx.Node:
        node, begins = held[source, axis]
        if (start - begins, stop - begins) == (0, axis_length(node, axis)):
            return node
        return narrow_node(graph, node, axis, start - begins, stop - begins)

    for original in region.body:
        start, stop = ranges[original]
        local = {}
        for source, need in region.needs[original].items():
            if need is None:
                local[source] = held[source, None][0]
            else:
                local[source] = at(source, need.axis, *need.reach.of(start, stop, need.axis.size))
        axis = region.axes[original]
        held[original, axis] = (build_local(graph, original, axis, start, stop, local), start)
    graph.output(tuple(at(n, region.axes[n], *region.bounds(index, count, n)) for n in region.outputs))
    return fx.GraphModule(nn.Module(), graph, class_name="Body")


def axis_length(node: fx.Node, axis: Axis) -> int:
    """How many positions of an axis a chunk's value has."""
    value = node.meta["val"]
    tensor = value if isinstance(value, torch.Tensor) else value[0]
    return int(tensor.shape[axis.dim]) // (axis.outer * axis.inner)


def narrow_node(graph: fx.Graph, node: fx.Node, axis: Axis, start: int, stop: int) -> fx.Node:
    """Append what takes positions `[start, stop)` of a chunk's value."""
    aten = torch.ops.aten
    value: torch.Tensor = node.meta["val"]

    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        new = graph.call_function(target, args)  # type: ignore[arg-type]
        new.meta["val"] = evaluate(target, args, {})
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        return new

    if axis.outer == 1:
        return call(aten.slice.Tensor, node, axis.dim, start * axis.inner, stop * axis.inner)
    shape = list(value.shape)
    split = [*shape[: axis.dim], axis.outer, axis_length(node, axis), axis.inner, *shape[axis.dim + 1 :]]
    joined = [*shape[: axis.dim], axis.local_extent(stop - start), *shape[axis.dim + 1 :]]
    taken = call(aten.slice.Tensor, call(aten.reshape.default, node, split), axis.dim + 1, start, stop)
    return call(aten.reshape.default, taken, joined)


def _like(view: torch.Tensor) -> torch.Tensor:
    """A fake tensor of a slice's layout that shares no storage with the whole."""
    with torch.no_grad():
        return view.new_empty_strided(view.shape, view.stride())
