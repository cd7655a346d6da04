"""Parts of tensors, and tensors put together: cut along the other dimensions, and a plain slice along its own."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from torch import fx

from lightcache_fx.axes import Axis, Need, Reach
from lightcache_fx.axis_rules.registry import Call, Local, Needs, aten, rule


@rule(
    aten.cat.default,
    aten.concat.default,
    aten.concatenate.default,
)
def _cat(call: Call) -> Needs:
    call.forbid(call.dim("dim"), "it is what the tensors are joined along")
    return [call.same(tensor) for tensor in call.args["tensors"]]


@rule(aten.stack.default)
def _stack(call: Call) -> Needs:
    dim = call.dim("dim")
    call.forbid(dim, "it is what the tensors are stacked along")
    return [call.same(tensor, call.axis.dim - (call.axis.dim > dim)) for tensor in call.args["tensors"]]


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def _split(call: Call) -> Needs:
    call.forbid(call.dim("dim"), "it is what the tensor is split along")
    return [call.same("self")]


@rule(aten.unbind.int)
def _unbind(call: Call) -> Needs:
    return [_without(call, call.dim("dim", len(call.shape) + 1))]


@rule(aten.select.int)
def _select(call: Call) -> Needs:
    return [_without(call, call.dim("dim", len(call.shape) + 1))]


def _without(call: Call, dim: int) -> tuple[fx.Node, Need]:
    """The same positions of an input that has one more dimension than the output, `dim`."""
    return call.same("self", call.axis.dim + (call.axis.dim >= dim))


@rule(aten.select_scatter.default)
def _select_scatter(call: Call) -> Needs:
    dim = call.dim("dim")
    call.forbid(dim, "one position of it is written")
    return [call.same("self"), call.same("src", call.axis.dim - (call.axis.dim > dim))]


@rule(aten.slice_scatter.default)
def _slice_scatter(call: Call) -> Needs:
    call.forbid(call.dim("dim"), "some positions of it are written")
    return [call.same("self"), call.same("src")]


def _sliced(chunk: Local) -> fx.Node:
    """Along its own dimension what a slice needs is the slice."""
    return chunk["self"] if chunk.axis.dim == chunk.dim("dim") else chunk.again()


def _slice_from(call: Call, start: int) -> Needs:
    dim, size = call.axis.dim, call.sizes("self")[call.axis.dim]
    if size == call.axis.extent:
        return [call.same("self")]
    if call.axis.outer > 1:
        raise call.refuse("a position is in several places", Axis(dim, call.axis.extent))
    return [(call.tensor("self"), Need(Axis(dim, size), Reach(Fraction(call.axis.inner), -start, start)))]


@rule(aten.slice.Tensor, local=_sliced)
def _slice(call: Call) -> Needs:
    if call.axis.dim != call.dim("dim"):
        return [call.same("self")]
    if call.args["step"] != 1:
        raise call.refuse("it takes every so many elements")
    size, start = call.sizes("self")[call.axis.dim], call.args["start"] or 0
    return _slice_from(call, max(0, min(size, start if start >= 0 else start + size)))


@rule(aten.narrow.default, local=_sliced)
def _narrow(call: Call) -> Needs:
    if call.axis.dim != call.dim("dim"):
        return [call.same("self")]
    return _slice_from(call, call.args["start"] % call.sizes("self")[call.axis.dim])


@rule(aten.flip.default)
def _flip(call: Call) -> Needs:
    call.forbid({dim % len(call.shape) for dim in call.args["dims"]}, "it is turned around")
    return [call.same("self")]


@rule(aten.roll.default)
def _roll(call: Call) -> Needs:
    dims = call.args["dims"] or range(len(call.shape))
    call.forbid({dim % len(call.shape) for dim in dims}, "it is turned")
    return [call.same("self")]


@rule(aten.index_select.default)
def _index_select(call: Call) -> Needs:
    if call.axis.dim == call.dim("dim"):
        return [(call.tensor("self"), None), call.same("index", 0)]
    return [call.same("self")]


@rule(aten.index.Tensor)
def _index(call: Call) -> Needs:
    """`x[:, :, index]` with one index of one dimension."""
    indices = [(dim, index) for dim, index in enumerate(call.args["indices"]) if index is not None]
    if len(indices) != 1 or len(call.sizes(indices[0][1])) != 1:
        raise call.refuse("several indices, or one of several dimensions")
    ((dim, index),) = indices
    if index.meta["val"].dtype.itemsize == 1:
        raise call.refuse("what a mask takes depends on data")
    if call.axis.dim == dim:
        return [(call.tensor("self"), None), call.same(index, 0)]
    return [call.same("self")]


@rule(aten.embedding.default)
def _embedding(call: Call) -> Needs:
    if call.axis.dim == len(call.shape) - 1:
        return [call.same("weight", 1), (call.tensor("indices"), None)]
    return [(call.tensor("weight"), None), call.same("indices")]


def _repeated(chunk: Local) -> fx.Node:
    repeats = list(chunk.args["repeats"])
    if chunk.needs[chunk.tensor("self")] is None:
        repeats[chunk.axis.dim] = chunk.length
    return chunk.emit(aten.repeat.default, chunk["self"], repeats)


@rule(aten.repeat.default, local=_repeated)
def _repeat(call: Call) -> Needs:
    """`repeats` copies one after the other: the outermost factor of a dimension."""
    axis, sizes = call.axis, call.sizes("self")
    dim, repeats = axis.dim - len(call.shape) + len(sizes), call.args["repeats"][axis.dim]
    if dim < 0 or (sizes[dim] == 1 and repeats > 1):
        return [(call.tensor("self"), None)]
    if axis.outer % repeats:
        raise call.refuse("it is repeated", Axis(axis.dim, sizes[dim], outer=repeats))
    return [call.need("self", replace(axis, dim=dim, outer=axis.outer // repeats))]


def _interleaved(chunk: Local) -> fx.Node:
    return chunk.emit(aten.repeat_interleave.self_int, chunk["self"], chunk.args["repeats"], chunk.args["dim"])


@rule(aten.repeat_interleave.self_int, local=_interleaved)
def _repeat_interleave(call: Call) -> Needs:
    """Copies of each element beside each other: the innermost factor of a dimension."""
    axis, repeats = call.axis, call.args["repeats"]
    ndim = len(call.sizes("self"))
    if call.args["dim"] is None and ndim > 1:
        raise call.refuse("it flattens its input")
    if axis.dim != (0 if call.args["dim"] is None else call.dim("dim", ndim)):
        return [call.same("self")]
    if axis.inner % repeats:
        raise call.refuse("each element of it is repeated", *call.blocks(repeats))
    return [call.need("self", replace(axis, inner=axis.inner // repeats))]
