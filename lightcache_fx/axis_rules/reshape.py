"""Reshapes: an axis of the output is found in the input by its place in row-major order.

Elements of a tensor are numbered in row-major order, which no reshape changes. An axis is the digit of that number
which counts `size` blocks of `stride` elements each; a reshape groups the same digits into other dimensions. Where an
axis straddles two dimensions of the input, finer axes may lie within one each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.axis_rules.registry import Call, Local, Needs, aten, rule


def axis_of_digit(sizes: Sequence[int], stride: int, count: int) -> Axis | None:
    """The axis of a tensor of these sizes that counts `count` blocks of `stride` elements in row-major order."""
    below = 1
    for dim in reversed(range(len(sizes))):
        inner, rest = divmod(stride, below)
        if rest == 0 and inner and sizes[dim] % (inner * count) == 0:
            return Axis(dim, count, sizes[dim] // (inner * count), inner)
        below *= sizes[dim]
    return None


def stride_of(sizes: Sequence[int], axis: Axis) -> int:
    """Elements from one position of an axis to the next, in row-major order."""
    return axis.inner * math.prod(sizes[axis.dim + 1 :])


def finer_axes(sizes: Sequence[int], axis: Axis, source: Sequence[int]) -> list[Axis]:
    """Factors of an axis of `sizes` that lie within one dimension of `source` each; the largest first."""
    found: list[tuple[int, int]] = []  # positions and how many positions of the axis each stands for
    for inner in (divisor for divisor in range(1, axis.size) if axis.size % divisor == 0):
        count = max(_counts(source, stride_of(sizes, axis) * inner, axis.size // inner), default=1)
        if count > 1 and not any(inner % i == 0 and (i * n) % (inner * count) == 0 for n, i in found):
            found.append((count, inner))
    found.sort(reverse=True)
    return [Axis(axis.dim, n, axis.outer * (axis.size // (n * i)), i * axis.inner) for n, i in found]


def _counts(sizes: Sequence[int], stride: int, most: int) -> Iterator[int]:
    """For each dimension that a digit of this stride can begin in: how many positions it can have there."""
    below = 1
    for size in reversed(sizes):
        inner, rest = divmod(stride, below)
        if rest == 0 and inner and size % inner == 0:
            yield math.gcd(most, size // inner)
        below *= size


def _reshaped(chunk: Local) -> fx.Node:
    """A chunk of a view may be no view, so it is always a reshape."""
    return chunk.emit(aten.reshape.default, chunk["self"], chunk.local_shape)


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_copy.default,
    local=_reshaped,
)
def _reshape(call: Call) -> Needs:
    """`(b f) c -> b f c`, and back."""
    source = call.sizes("self")
    axis = axis_of_digit(source, stride_of(call.shape, call.axis), call.axis.size)
    if axis is None:
        finer = finer_axes(call.shape, call.axis, source)
        raise call.refuse(f"it straddles dimensions of the input, {list(source)}", *finer)
    return [call.need("self", axis)]


@rule(aten.view_as.default, aten.reshape_as.default, local=_reshaped)
def _reshape_as(call: Call) -> Needs:
    return _reshape(call)
