"""`lightcache::group_stats`: the mean and the reciprocal deviation of GroupNorm, over the whole value, gathered in pieces.

With them GroupNorm is a scale and a shift for each channel, so it can be cut along space and time. The statistics are
never taken over a chunk alone: that is another function, not a rounding of this one.
"""

from __future__ import annotations

import torch

_PIECE = 2**20
"""Elements that are widened to float32 at a time, for each group of each sample at least one."""


@torch.library.custom_op("lightcache::group_stats", mutates_args=())
def group_stats(value: torch.Tensor, num_groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each group, float32, both (samples, groups).

    Piece by piece: means and squared deviations of the pieces are joined by the parallel update of Chan, Golub and
    LeVeque (1979), in float64.

    Args:
        value: (samples, channels, ...), any layout.
        num_groups: divides the channels.
        eps: as GroupNorm's.
    """
    samples, channels = value.shape[:2]
    grouped = value.unflatten(1, (num_groups, channels // num_groups))  # N G C/G ...
    shape = (samples, num_groups)
    count = 0
    mean = torch.zeros(shape, dtype=torch.float64, device=value.device)
    squares = torch.zeros(shape, dtype=torch.float64, device=value.device)
    for piece in _pieces(grouped):
        part = piece.float().flatten(2)
        variance, part_mean = torch.var_mean(part, dim=2, correction=0)
        number = part.shape[2]
        delta = part_mean.double() - mean
        total = count + number
        squares += variance.double() * number + delta.square() * (count * number / total)
        mean += delta * (number / total)
        count = total
    return mean.float(), (squares / count + eps).rsqrt().float()


def _pieces(grouped: torch.Tensor) -> list[torch.Tensor]:
    """Views of (samples, groups, channels, ...) along its longest inner dimension, of about `_PIECE` elements each."""
    dim = max(range(2, grouped.dim()), key=lambda d: grouped.shape[d])
    num_pieces = max(1, min(grouped.shape[dim], -(-grouped.numel() // _PIECE)))
    return list(grouped.tensor_split(num_pieces, dim=dim))


@group_stats.register_fake
def _(value: torch.Tensor, num_groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    shape = (value.shape[0], num_groups)
    return value.new_empty(shape, dtype=torch.float32), value.new_empty(shape, dtype=torch.float32)
