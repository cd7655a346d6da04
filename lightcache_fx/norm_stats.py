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

    Along the last dimension the mean first, then the centred squares' (two passes, as far as a piece reaches), then
    the group's of all of these (Chan, Golub and LeVeque 1979).

    Args:
        value: (samples, channels, ...), any layout.
        num_groups: divides the channels.
        dim: the dimension of `value`, 2 or higher, whose positions are the rows.
    """
    order = sorted(range(value.dim()), key=lambda d: -value.stride()[d])  # as memory is walked
    place = [order.index(d) for d in range(value.dim())]
    walked = value.permute(order)
    if dim == value.dim() - 1:
        means, variances = walked.float(), walked.new_zeros(walked.shape, dtype=torch.float32)
    else:
        means, variances = _line_moments(walked, place[-1], place[dim], _num_pieces(value, dim))

    def by_group(each: torch.Tensor) -> torch.Tensor:
        """(rows, samples, groups, all that is joined)."""
        return each.permute(place).movedim(dim, 0).reshape(value.shape[dim], value.shape[0], num_groups, -1)

    means = by_group(means)  # one after the other, so that three of them are held at most
    variances = by_group(variances)
    joined = means.mean(-1)
    variance = (means - joined.unsqueeze(-1)).square_().add_(variances).mean(-1)
    return torch.stack([joined, variance], dim=-1)


def _line_moments(value: torch.Tensor, inner: int, rows: int, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance along dimension `inner`, kept with one position, in so many pieces along `rows`."""
    shape = [1 if d == inner else size for d, size in enumerate(value.shape)]
    means, variances = (value.new_empty(shape, dtype=torch.float32) for _ in range(2))
    parts = (tensor.tensor_split(pieces, rows) for tensor in (value, means, variances))
    for part, mean, variance in zip(*parts, strict=True):
        wide = part.float()
        torch.mean(wide, inner, keepdim=True, out=mean)
        torch.mean((wide - mean).square_(), inner, keepdim=True, out=variance)
    return means, variances


def _num_pieces(value: torch.Tensor, dim: int) -> int:
    most = _PIECE.get(value.device.type, _LARGE_PIECE)
    return min(value.shape[dim], max(_PIECES, value.numel() // most))


def moments_workspace(value: torch.Tensor, num_groups: int, dim: int) -> int:
    """Bytes that `row_moments` holds beside its argument and its result."""
    rows = value.shape[dim]
    elements = -(-rows // _num_pieces(value, dim)) * (value.numel() // rows)
    copies = 1 + (value.dtype != torch.float32)
    lines = value.numel() // (1 if dim == value.dim() - 1 else value.shape[-1])
    before_the_result = 4 * (copies * elements + 2 * lines - 2 * rows * value.shape[0] * num_groups) + _SCALARS
    return max(before_the_result, 4 * 3 * lines)


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
