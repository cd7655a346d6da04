"""Results that a chunk's last operator writes where they belong, instead of into memory of their own to be copied.

Only the four operations of arithmetic do: each of their elements is rounded by itself, so the layout of what is written
cannot change a bit of it, as it can where a kernel has vectorised and scalar versions of a function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lightcache_fx.graphs import GraphInput, calls, copy_graph, outputs, placeholders
from lightcache_fx.in_place import Overwrite, allocated_by
from lightcache_fx.regions import Region

_ATEN = torch.ops.aten
_INTO = {
    _ATEN.add.Tensor: _ATEN.add.out,
    _ATEN.sub.Tensor: _ATEN.sub.out,
    _ATEN.mul.Tensor: _ATEN.mul.out,
    _ATEN.div.Tensor: _ATEN.div.out,
}
_WRITES = "lightcache_writes"


def direct_output(region: Region, overwrites: Sequence[Overwrite]) -> int | None:
    """The number of the output that the region's last operator can write straight into its place, if any.

    Args:
        region: to be run in chunks.
        overwrites: its outputs that are written over inputs. Such a one can be written directly if it is the only
            output and its operator reads the input, if at all, at the very positions that it writes.
    """
    last = region.body[-1]
    if last.target not in _INTO or last not in region.outputs or region.axes[last].outer > 1:
        return None
    index = region.outputs.index(last)
    for over in overwrites:
        if over.output == index and not (over.delay == 0 and len(region.outputs) == 1 and _in_step(region, over)):
            return None
    return index


def _in_step(region: Region, over: Overwrite) -> bool:
    """Whether the last operator meets the overwritten input only position by position: as it is, not through views."""
    last, source = region.body[-1], region.inputs[over.input]
    inside = (operand for operand in region.needs[last] if operand in region.axes)
    return not any(allocated_by(operand) is allocated_by(source) for operand in inside)


def write_directly(graph: fx.Graph, index: int, place: torch.Tensor) -> None:
    """Rewrite a body so that output number `index` is written into one more argument.

    Args:
        graph: the body; its last call makes the output, or it stays as it is.
        index: the output.
        place: a tensor laid out as the whole output is.
    """
    made, last = outputs(graph)[index], list(calls(graph))[-1]
    if made is not last or made.target not in _INTO:
        return
    with graph.inserting_after(placeholders(graph)[-1]):
        into = graph.placeholder("into")
    value = made.meta["val"]
    with torch.no_grad():
        like = value.new_empty_strided(value.shape, place.stride())
    binding = GraphInput("user", "into", "latent")
    into.meta = {"val": like, "lightcache_input": binding, "lightcache_copied": False, _WRITES: index}
    made.target = _INTO[made.target]
    made.kwargs = {**made.kwargs, "out": into}
    made.meta = {**made.meta, "val": like}


def written_by(graph: fx.Graph) -> int | None:
    """The output that a body writes itself into its last argument."""
    return next((node.meta[_WRITES] for node in placeholders(graph) if _WRITES in node.meta), None)


def marked_as_written(graph: fx.Graph, index: int) -> None:
    """Say of a body that is read from a file that it writes output number `index` itself into its last argument."""
    placeholders(graph)[-1].meta[_WRITES] = index


def without_direct_writes(body: fx.GraphModule) -> fx.GraphModule:
    """A copy of a body that returns what it would have written into its last argument.

    For compilers: they would have to know that this argument shares its memory with another, and where in each chunk.
    """
    graph, _ = copy_graph(body.graph)
    for into in [node for node in placeholders(graph) if _WRITES in node.meta]:
        (made,) = into.users
        made.target = next(target for target, written in _INTO.items() if written is made.target)
        made.kwargs = {key: value for key, value in made.kwargs.items() if key != "out"}
        graph.erase_node(into)
    return fx.GraphModule(body, graph, class_name=type(body).__name__)
