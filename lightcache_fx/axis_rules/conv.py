"""Convolution and pooling: space is cut with a halo, and only the chunks at the border are padded.

Layouts: x is `B C *S` or `C *S`, the weight `O C/groups *K`; S are the spatial sizes, K the kernel's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx

from lightcache_fx.axes import Axis, Need, Reach
from lightcache_fx.axis_rules.registry import Call, Local, Needs, aten, rule


@dataclass(frozen=True)
class Window:
    """How a window moves along one dimension: each output reads `span` elements from `stride * index - before` on."""

    span: int
    stride: int
    before: int = 0
    after: int = 0

    def need(self, call: Call, source: str, dim: int) -> tuple[fx.Node, Need]:
        """What a cut of the output along `dim` needs of the same dimension of an input."""
        axis, size = call.axis, call.sizes(source)[dim]
        factored = axis.outer > 1 or axis.inner > 1
        tiles = self.span == self.stride and size == axis.extent * self.stride and not self.before
        if tiles and (factored or self.stride == 1):
            return call.need(source, Axis(dim, axis.size, axis.outer, axis.inner * self.stride))
        if axis.outer > 1:
            raise call.refuse("a position is in several places, and each has neighbours", Axis(dim, axis.extent))
        reach = Reach(Fraction(axis.inner * self.stride), self.before, self.span - self.stride - self.before)
        return call.tensor(source), Need(Axis(dim, size), reach)


def padding_there(chunk: Local, source: str) -> tuple[int, int]:
    """How many elements to pad an input's part with at either end; where all is padding, the part is taken away."""
    (low, high), (start, stop) = chunk.ranges(source)
    if high <= start:
        return high - low, start - stop
    if low >= stop:
        return start - stop, high - low
    return start - low, high - stop


def _each(value: int | Sequence[int], count: int) -> list[int]:
    """One number for each spatial dimension; a single one is for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _convolution_windows(call: Call) -> list[Window]:
    """The windows of a convolution's spatial dimensions."""
    kernel = call.sizes("weight")[2:]
    stride, dilation = (_each(call.args[name], len(kernel)) for name in ("stride", "dilation"))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = call.args["padding"]
    if padding == "same":  # an odd element of padding goes behind
        pads = [((span - 1) // 2, span // 2) for span in spans]
    else:
        counts = [0] * len(kernel) if padding == "valid" else _each(padding, len(kernel))
        pads = [(count, count) for count in counts]
    return [Window(span, s, *pad) for span, s, pad in zip(spans, stride, pads, strict=True)]


def _first_space(call: Call) -> int:
    """The first spatial dimension of a convolution's input and output."""
    return len(call.shape) - len(call.sizes("weight")) + 2


def _convolved(chunk: Local) -> fx.Node:
    """The convolution; along the cut dimension its padding is laid around the chunk where there is any."""
    windows, first = _convolution_windows(chunk), _first_space(chunk)
    if chunk.axis.dim < first:
        return chunk.again()
    pads = {first + i: (w.before, w.after) for i, w in enumerate(windows) if w.before != w.after}
    left = [0 if first + i in pads else w.before for i, w in enumerate(windows)]
    pads[chunk.axis.dim] = padding_there(chunk, "input")
    left[chunk.axis.dim - first] = 0
    args: dict[str, Any] = {**chunk.args, "input": chunk.pad(chunk["input"], pads), "padding": left}
    names = ("input", "weight", "bias", "stride", "padding", "dilation")
    if "transposed" in args:
        return chunk.again(input=args["input"], padding=left)
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[len(windows)]
    return chunk.emit(target, *(args[name] for name in names), args["groups"])


@rule(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    local=_convolved,
)
def _conv(call: Call) -> Needs:
    first = _first_space(call)
    if call.axis.dim >= first:
        return [_convolution_windows(call)[call.axis.dim - first].need(call, "input", call.axis.dim)]
    if call.axis.dim < first - 1:
        return [call.same("input")]
    if call.args["groups"] != 1:
        raise call.refuse("the output channels of a convolution in groups read different inputs")
    return [(call.tensor("input"), None), call.same("weight", 0), *call.optional("bias", 0)]


@rule(aten.convolution.default, local=_convolved)
def _convolution(call: Call) -> Needs:
    return _conv_transpose(call) if call.args["transposed"] else _conv(call)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(call: Call) -> Needs:
    if call.axis.dim >= _first_space(call) - 1:
        raise call.refuse("of a transposed convolution only the batch is cut")
    return [call.same("input")]


@rule(
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
)
def _pool(call: Call) -> Needs:
    """Batch, channels, and space where nothing is padded."""
    count = int(call.target.name().removesuffix("d")[-1])
    space = call.axis.dim - (len(call.shape) - count)
    if space < 0:
        return [call.same("self")]
    kernel = _each(call.args["kernel_size"], count)
    stride = _each(call.args["stride"], count) if call.args["stride"] else kernel
    padding, dilation = _each(call.args["padding"], count), _each(call.args.get("dilation", 1), count)
    if padding[space] or call.args["ceil_mode"]:
        raise call.refuse("windows at the border count what is there")
    window = Window(dilation[space] * (kernel[space] - 1) + 1, stride[space])
    return [window.need(call, "self", call.axis.dim)]


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
def _adaptive_pool(call: Call) -> Needs:
    count = len(call.args["output_size"])
    if call.axis.dim >= len(call.shape) - count:
        raise call.refuse("its windows overlap irregularly")
    return [call.same("self")]
