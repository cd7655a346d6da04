"""GroupNorm's statistics over the whole value, gathered row by row, so that rows may come strip after strip.

`lightcache::row_moments` has one entry for each position of a dimension, so a region that is cut along this dimension
makes its part of them like any other output, and the value itself need not be kept. `join_moments` makes the mean and
the deviation of all rows from them. They are never those of a chunk alone: that would be another function, not a
rounding of this one.
"""

from __future__ import annotations

import torch

_PIECE = 2**20
"""Elements that are widened to float32 at a time, at least one row."""


@torch.library.custom_op("lightcache::row_moments", mutates_args=())
def row_moments(value: torch.Tensor, num_groups: int, dim: int) -> torch.Tensor:
    """Mean and variance of each group in each row, float32: (rows, samples, groups, 2).

    Args:
        value: (samples, channels, ...), any layout.
        num_groups: divides the channels.
        dim: the dimension of `value`, 2 or higher, whose positions are the rows.
    """
    grouped = value.unflatten(1, (num_groups, -1)).movedim(dim + 1, 0)  # rows N G C/G ...
    pieces = max(1, min(len(grouped), grouped.numel() // _PIECE))
    moments: torch.Tensor = grouped.new_empty((len(grouped), grouped.shape[1], num_groups, 2), dtype=torch.float32)
    inner = list(range(3, grouped.dim()))
    for rows, result in zip(grouped.tensor_split(pieces), moments.tensor_split(pieces), strict=True):
        variance, mean = torch.var_mean(rows.float(), dim=inner, correction=0)
        result[..., 0] = mean
        result[..., 1] = variance
    return moments


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
