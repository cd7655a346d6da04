"""GroupNorm's statistics over the whole value, gathered row by row, so that rows may come strip after strip.

`lightcache::row_moments` has one entry for each position of a dimension, so a region that is cut along this dimension
makes its part of them like any other output, and the value itself need not be kept. `join_moments` makes the mean and
the deviation of all rows from them. They are never those of a chunk alone: that would be another function, not a
rounding of this one.
"""

from __future__ import annotations

import torch

_PIECE = {"cpu": 2**18}
_LARGE_PIECE = 2**22
"""Elements that are widened to float32 and centred at a time, at least one row; on a CPU as few as caches hold."""
_SCALARS = 12  # what `mean` divides by
_PIECES = 8
"""At least so many pieces, that what they take is small beside the value."""


@torch.library.custom_op("lightcache::row_moments", mutates_args=())
def row_moments(value: torch.Tensor, num_groups: int, dim: int) -> torch.Tensor:
    """Mean and variance of each group in each row, float32: (rows, samples, groups, 2).

    Each channel's mean, then its centred squares' (two passes, as far as a piece reaches), then the group's from its
    channels' (Chan, Golub and LeVeque 1979).

    Args:
        value: (samples, channels, ...), any layout.
        num_groups: divides the channels.
        dim: the dimension of `value`, 2 or higher, whose positions are the rows.
    """
    order = sorted(range(value.dim()), key=lambda d: -value.stride()[d])  # as memory is walked
    place = [order.index(d) for d in range(value.dim())]
    inner = [place[d] for d in range(2, value.dim()) if d != dim]
    moments: torch.Tensor = value.new_empty((value.shape[dim], value.shape[0], num_groups, 2), dtype=torch.float32)
    pieces = _num_pieces(value, dim)
    for rows, result in zip(value.tensor_split(pieces, dim), moments.tensor_split(pieces), strict=True):
        wide = rows.permute(order).float()
        means = wide.mean(inner, keepdim=True) if inner else wide
        variances = (wide - means).square_().mean(inner, keepdim=True) if inner else torch.zeros_like(means)

        def by_group(each: torch.Tensor, like: torch.Tensor = result) -> torch.Tensor:
            """(rows, samples, groups, channels of a group)."""
            return each.permute(place).movedim(dim, 0).reshape(*like.shape[:3], -1)

        torch.mean(by_group(means), -1, out=result[..., 0])
        spread = by_group(means) - result[..., :1]
        torch.mean(by_group(variances) + spread.square_(), -1, out=result[..., 1])
    return moments


def _num_pieces(value: torch.Tensor, dim: int) -> int:
    most = _PIECE.get(value.device.type, _LARGE_PIECE)
    return min(value.shape[dim], max(_PIECES, value.numel() // most))


def moments_workspace(value: torch.Tensor, dim: int) -> int:
    """Bytes that `row_moments` holds beside its argument and its result."""
    rows = -(-value.shape[dim] // _num_pieces(value, dim))
    elements = rows * (value.numel() // value.shape[dim])
    channels = rows * value.shape[0] * value.shape[1]
    copies = 1 + (value.dtype != torch.float32)
    return 4 * (copies * elements + 4 * channels) + _SCALARS


@row_moments.register_fake
def _(value: torch.Tensor, num_groups: int, dim: int) -> torch.Tensor:
    return value.new_empty((value.shape[dim], value.shape[0], num_groups, 2), dtype=torch.float32)


@torch.library.custom_op("lightcache::join_moments", mutates_args=())
def join_moments(moments: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) over all rows, float32, both (samples, groups).

    The variance of rows of equal size is the mean of their variances plus the variance of their means (Chan, Golub and
    LeVeque 1979), here in float64.

    Args:
        moments: as `row_moments` gives them.
        eps: as GroupNorm's.
    """
    means, variances = moments.double().unbind(-1)
    mean = means.mean(dim=0)
    variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
    return mean.float(), (variance + eps).rsqrt().float()


@join_moments.register_fake
def _(moments: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    shape = moments.shape[1:3]
    return moments.new_empty(shape), moments.new_empty(shape)
