"""Space enlarged, rearranged or padded: along it a position of the output lies in a part of one of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import fx
from torch._ops import OpOverload

from lightcache_fx.axes import Axis, Need, Reach
from lightcache_fx.axis_rules.conv import padding_there
from lightcache_fx.axis_rules.registry import Call, Local, Needs, aten, rule

# How many spatial dimensions each has.
_NEAREST: dict[OpOverload, int] = {
    overload: count
    for name in ("upsample_nearest", "_upsample_nearest_exact")
    for count in (1, 2, 3)
    for overload in (getattr(aten, f"{name}{count}d").default, getattr(aten, f"{name}{count}d").vec)
}
_SMOOTH: dict[OpOverload, int] = {
    aten.upsample_linear1d.vec: 1,
    aten.upsample_linear1d.default: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bilinear2d.default: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_bicubic2d.default: 2,
    aten.upsample_trilinear3d.vec: 3,
    aten.upsample_trilinear3d.default: 3,
}


def _source(call: Call) -> str:
    """The `.vec` overloads call their tensor `input`, the others `self`."""
    return "input" if "input" in call.args else "self"


def _enlarged(call: Call, source: str, factor: int) -> tuple[fx.Node, Need]:
    """What is needed of a dimension of which each element becomes `factor` elements of the output."""
    axis = call.axis
    if axis.inner % factor == 0:
        return call.need(source, replace(axis, inner=axis.inner // factor))
    if axis.outer > 1:
        raise call.refuse(f"each element of the input becomes {factor}", *call.blocks(factor))
    size = axis.extent // factor
    return call.tensor(source), Need(Axis(axis.dim, size), Reach(Fraction(axis.inner, factor)))


def _cropped(chunk: Local, made: fx.Node, source: str, factor: int) -> fx.Node:
    """The positions asked for, of all that the part of the input becomes."""
    need = chunk.needs[chunk.tensor(source)]
    assert need is not None
    first = need.axis.inner * factor * chunk.ranges(source)[1][0]
    if chunk.axis.outer > 1:
        return made
    return chunk.take(made, chunk.axis.dim, chunk.start * chunk.axis.inner - first, chunk.length)


def _space(call: Call) -> int:
    """Which spatial dimension is cut; negative for batch and channels."""
    return call.axis.dim - (len(call.shape) - {**_NEAREST, **_SMOOTH}[call.target])


def _upsampled(chunk: Local) -> fx.Node:
    """All that the part of the input becomes, then the positions asked for."""
    space, source = _space(chunk), _source(chunk)
    if space < 0:
        return chunk.again()
    factor = chunk.axis.extent // chunk.sizes(source)[chunk.axis.dim]
    changes = {}
    if chunk.args["output_size"] is not None:  # by scales, the size follows
        size = list(chunk.args["output_size"])
        size[space] = chunk[source].meta["val"].shape[chunk.axis.dim] * factor
        changes["output_size"] = size
    return _cropped(chunk, chunk.again(**changes), source, factor)


@rule(*_NEAREST, local=_upsampled)
def _nearest(call: Call) -> Needs:
    source = _source(call)
    if _space(call) < 0:
        return [call.same(source)]
    before, after = call.sizes(source)[call.axis.dim], call.axis.extent
    factor = after // before
    if after % before or not _exact(factor, after):
        raise call.refuse(f"{before} elements become {after}, which is no whole multiple")
    return [_enlarged(call, source, factor)]


def _exact(factor: int, size: int) -> bool:
    """Whether `floor(i * (1 / factor))`, in the float32 that the kernels compute in, is `i // factor` up to `size`."""
    index = torch.arange(size)
    return torch.equal((index.float() * torch.tensor(1 / factor)).long(), index // factor)


@rule(*_SMOOTH)
def _smooth(call: Call) -> Needs:
    if _space(call) >= 0:
        raise call.refuse("it interpolates between neighbours at uneven places")
    return [call.same(_source(call))]


def _shuffled(chunk: Local) -> fx.Node:
    if chunk.axis.dim < len(chunk.shape) - 2:
        return chunk.again()
    return _cropped(chunk, chunk.again(), "self", chunk.args["upscale_factor"])


@rule(aten.pixel_shuffle.default, local=_shuffled)
def _pixel_shuffle(call: Call) -> Needs:
    """`*B (C r r) H W -> *B C (H r) (W r)`."""
    axis, factor, ndim = call.axis, call.args["upscale_factor"], len(call.shape)
    if axis.dim >= ndim - 2:
        return [_enlarged(call, "self", factor)]
    if axis.dim == ndim - 3:
        return [call.need("self", replace(axis, inner=axis.inner * factor**2))]
    return [call.same("self")]


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(call: Call) -> Needs:
    """`*B C (H r) (W r) -> *B (C r r) H W`."""
    axis, factor, ndim = call.axis, call.args["downscale_factor"], len(call.shape)
    if axis.dim >= ndim - 2:
        return [call.need("self", replace(axis, inner=axis.inner * factor))]
    if axis.dim == ndim - 3:
        if axis.inner % factor**2:
            raise call.refuse("a channel of the input becomes several", *call.blocks(factor**2))
        return [call.need("self", replace(axis, inner=axis.inner // factor**2))]
    return [call.same("self")]


def _sides(pad: Sequence[int], ndim: int, dim: int) -> tuple[int, int]:
    """Elements before and after a dimension; the list begins with the last dimension."""
    place = 2 * (ndim - 1 - dim)
    return (pad[place], pad[place + 1]) if place < len(pad) else (0, 0)


def _padding(call: Call) -> tuple[str, list[int], str]:
    """The name of the argument that lists the padding, the list, and what the padding is filled with."""
    name = "padding" if "padding" in call.args else "pad"
    return name, list(call.args[name]), call.args.get("mode", _MODES.get(call.target, "constant"))


def _padded(chunk: Local) -> fx.Node:
    """Along the padded dimension only what of the padding lies in the chunk."""
    name, pad, mode = _padding(chunk)
    place = 2 * (len(chunk.shape) - 1 - chunk.axis.dim)
    if any(pad[place : place + 2]):
        pad[place : place + 2] = _copies_there(chunk) if mode == "replicate" else padding_there(chunk, "self")
    return chunk.again(**{name: pad})


def _copies_there(chunk: Local) -> tuple[int, int]:
    """How many copies of its ends an input's part is padded with; in padding alone the part is the end."""
    (low, high), (start, stop) = chunk.ranges("self")
    before = max(min(start, high - 1) - low, 0)
    return before, high - low - before - (stop - start)


_MODES = {
    aten.reflection_pad1d.default: "reflect",
    aten.reflection_pad2d.default: "reflect",
    aten.reflection_pad3d.default: "reflect",
    aten.replication_pad1d.default: "replicate",
    aten.replication_pad2d.default: "replicate",
    aten.replication_pad3d.default: "replicate",
}


@rule(aten.pad.default, aten.constant_pad_nd.default, *_MODES, local=_padded)
def _pad(call: Call) -> Needs:
    """Constants and copies of the ends are laid around the chunks that have them."""
    _, pad, mode = _padding(call)
    axis, (before, after) = call.axis, _sides(pad, len(call.shape), call.axis.dim)
    if not before and not after:
        return [call.same("self")]
    if mode not in ("constant", "replicate"):
        raise call.refuse(f"padding of mode {mode!r} copies elements from elsewhere")
    if axis.outer > 1:
        raise call.refuse("a position is in several places, and not all are padded", Axis(axis.dim, axis.extent))
    size = call.sizes("self")[axis.dim]
    return [(call.tensor("self"), Need(Axis(axis.dim, size), Reach(Fraction(axis.inner), before, -before)))]
