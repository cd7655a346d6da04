"""Dimensions moved, added, dropped and expanded: an axis goes with its dimension."""

from __future__ import annotations

from torch import fx

from lightcache_fx.axis_rules.registry import Call, Local, Needs, aten, rule


def _moved(call: Call, order: list[int]) -> Needs:
    """`order[i]` is the dimension of the input that is dimension `i` of the output."""
    return [call.same("self", order[call.axis.dim])]


@rule(aten.permute.default, aten.permute_copy.default)
def _permute(call: Call) -> Needs:
    return _moved(call, [dim % len(call.shape) for dim in call.args["dims"]])


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def _t(call: Call) -> Needs:
    if len(call.shape) != 2:
        raise call.refuse("it is not a matrix")
    return _moved(call, [1, 0])


def _swapped(call: Call, first: str, second: str) -> Needs:
    order = list(range(len(call.shape)))
    a, b = call.dim(first), call.dim(second)
    order[a], order[b] = order[b], order[a]
    return _moved(call, order)


@rule(aten.transpose.int, aten.transpose_copy.int, aten.swapdims.default)
def _transpose(call: Call) -> Needs:
    return _swapped(call, "dim0", "dim1")


@rule(aten.swapaxes.default)
def _swapaxes(call: Call) -> Needs:
    return _swapped(call, "axis0", "axis1")


@rule(aten.movedim.int, aten.movedim.intlist)
def _movedim(call: Call) -> Needs:
    ndim = len(call.shape)
    source, destination = (
        [dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)]
        for dims in (call.args["source"], call.args["destination"])
    )
    placed = dict(zip(destination, source, strict=True))
    rest = iter(dim for dim in range(ndim) if dim not in source)
    return _moved(call, [placed[dim] if dim in placed else next(rest) for dim in range(ndim)])


@rule(aten.unsqueeze.default, aten.unsqueeze_copy.default)
def _unsqueeze(call: Call) -> Needs:
    dim = call.dim("dim")
    call.forbid(dim, "it is new, of one element")
    return [call.same("self", call.axis.dim - (call.axis.dim > dim))]


def _squeezed(chunk: Local) -> fx.Node:
    """A chunk of one position keeps its dimension, whatever the call says."""
    need = chunk.needs[chunk.tensor("self")]
    assert need is not None
    sizes = chunk.sizes("self")
    gone = [dim for dim in _dims(chunk) if sizes[dim] == 1 and dim != need.axis.dim]
    return chunk.emit(aten.squeeze.dims, chunk["self"], gone)


def _dims(call: Call) -> list[int]:
    """Dimensions of the input that are dropped where they have one element."""
    ndim = len(call.sizes("self"))
    dims = call.args.get("dim", list(range(ndim)))
    return [dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)]


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze_copy.dim, local=_squeezed)
def _squeeze(call: Call) -> Needs:
    dims, sizes = _dims(call), call.sizes("self")
    kept = [dim for dim, size in enumerate(sizes) if size != 1 or dim not in dims]
    return _moved(call, kept)


def _expanded(chunk: Local) -> fx.Node:
    return chunk.emit(aten.expand.default, chunk["self"], chunk.local_shape)


@rule(aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default, local=_expanded)
def _expand(call: Call) -> Needs:
    return [call.broadcast("self")]


@rule(aten.expand_as.default, local=_expanded)
def _expand_as(call: Call) -> Needs:
    """The other tensor gives only the shape, so it is read where it is."""
    return [call.broadcast("self"), call.same("other")]
