"""How a value can be cut: one factor of one dimension, and how a range of an output reaches back to its inputs.

A dimension of a flattened tensor is often a product, `(batch frames)` or `(batch height width)`. An `Axis` names one
factor of one dimension, so that frames can be cut inside `(batch frames)`: the dimension is laid out as
outer x size x inner, and position `p` of the axis is the elements `[:, p, :]` of it.

A region is computed chunk by chunk over ranges `[start, stop)` of its output's axis. What a chunk needs of an input is
given by a `Reach`: the same range for a pointwise operation, a wider one (a halo) for a convolution, a scaled one for
upsampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass(frozen=True)
class Axis:
    """One way to cut a value: dimension `dim`, laid out as `outer` x `size` x `inner`, is cut along `size`."""

    dim: int
    size: int
    outer: int = 1
    inner: int = 1

    @property
    def extent(self) -> int:
        """The length of the whole dimension."""
        return self.outer * self.size * self.inner

    def local_extent(self, length: int) -> int:
        """The length of the dimension when only `length` positions of the axis are there."""
        return self.outer * length * self.inner

    def narrow(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Positions `[start, stop)` of a tensor: a view, or a copy where the axis has both outer and inner parts."""
        if self.outer == 1:
            return tensor.narrow(self.dim, start * self.inner, (stop - start) * self.inner)
        # The dimension may hold fewer positions than `size` when the tensor is itself a chunk.
        split = tensor.unflatten(self.dim, (self.outer, -1, self.inner))
        taken: torch.Tensor = split.narrow(self.dim + 1, start, stop - start).flatten(self.dim, self.dim + 2)
        return taken

    def __str__(self) -> str:
        factors = [str(self.outer)] * (self.outer > 1) + [f"[{self.size}]"] + [str(self.inner)] * (self.inner > 1)
        return f"dim {self.dim}: {' x '.join(factors)}"


@dataclass(frozen=True)
class Reach:
    """What a range of an output needs of an input: `[floor(start * scale) - before, ceil(stop * scale) + after)`.

    The identity is `Reach()`. A convolution with stride s, padding p, dilation d and kernel k has scale s, before p and
    after d (k - 1) + 1 - s - p. Upsampling twice has scale 1/2. What lies outside of the input is left out, so that
    only the first and last chunks are padded. A range that lies outside altogether, in padding, is given the nearest
    position: a chunk of an input is never empty.
    """

    scale: Fraction = Fraction(1)
    before: int = 0
    after: int = 0

    def unclamped(self, start: int, stop: int) -> tuple[int, int]:
        """The range that is needed, padding included."""
        num, den = self.scale.numerator, self.scale.denominator
        return start * num // den - self.before, -(-stop * num // den) + self.after

    def of(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """The part of it that exists in an input with `size` positions."""
        low, high = self.unclamped(start, stop)
        low = min(max(low, 0), size - 1)
        return low, max(low + 1, min(high, size))


@dataclass(frozen=True)
class Need:
    """What a cut output needs of one tensor input: the positions `reach` gives along `axis`."""

    axis: Axis
    reach: Reach = Reach()
