"""Guidance branches that are derived from the first of their step instead of being computed (FasterCache's CFG-Cache).

Where guidance calls the denoiser once for each of its branches, their outputs differ by little that changes slowly (Lv
et al. 2024). A branch that is derived returns what the first call of its step returned, plus what the two differed by
when both were computed last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightcache_fx.caching import Guidance
from lightcache_fx.errors import PolicyError
from lightcache_fx.stores import version_of

_LOW = 5
"""A frequency is low within this part of the smaller side around zero, as FasterCache has it."""


@dataclass
class Derived:
    """What a guidance branch has beside its stores, where others are derived from it or it is from others.

    Attributes:
        outputs: of the first branch of a step, as its call returned them.
        versions: by which a caller's writing to them is seen.
        differences: of another branch, to those, when it was computed last.
        missed: whether a step in which it was derived would have computed what is kept.
    """

    outputs: Sequence[torch.Tensor] = ()
    versions: Sequence[object] = ()
    differences: list[torch.Tensor] = field(default_factory=list)
    missed: bool = False

    def keep_outputs(self, outputs: Sequence[torch.Tensor]) -> None:
        """Of the first branch: what others are derived from in this step."""
        self.outputs, self.versions = outputs, [version_of(output) for output in outputs]

    def keep_differences(self, outputs: Sequence[torch.Tensor], first: Derived) -> None:
        """Of another branch, which was computed."""
        self.differences = []
        if first.is_as_returned() and _alike(outputs, first.outputs):
            self.differences = [output - other for output, other in zip(outputs, first.outputs, strict=True)]

    def from_first(self, first: Derived, rule: Guidance) -> list[torch.Tensor] | None:
        """What the branch is taken to return; None where it has to be computed."""
        if not self.differences or not first.is_as_returned() or not _alike(self.differences, first.outputs):
            return None
        differences = self.differences
        if (rule.low, rule.high) != (1.0, 1.0):
            differences = [weighted(difference, rule.low, rule.high) for difference in differences]
        return [output + difference for output, difference in zip(first.outputs, differences, strict=True)]

    def is_as_returned(self) -> bool:
        """Whether the first branch's outputs are there, and nobody has written to them."""
        now = [version_of(output) for output in self.outputs]
        return bool(now) and None not in now and now == list(self.versions)


def _alike(outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    pairs = list(zip(outputs, others, strict=False))
    same = all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in pairs)
    return len(outputs) == len(others) and same and all(a.is_floating_point() for a, _ in pairs)


def weighted(difference: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A difference with its low and high spatial frequencies, of the last two dimensions, weighted.

    Args:
        difference: (..., height, width).
        low: weight of the frequencies within a fifth of the smaller side around zero.
        high: of all others.

    Raises:
        PolicyError: it has no two dimensions of space behind batch and channels.
    """
    if difference.dim() < 4:
        raise PolicyError(
            f"guidance: low={low:g} and high={high:g} weigh frequencies of images, (..., height, width), but the model"
            f" returns {list(difference.shape)}; leave them at 1"
        )
    height, width = difference.shape[-2:]
    rows, columns = (torch.fft.fftfreq(size, device=difference.device) * size for size in (height, width))
    is_low = rows[:, None] ** 2 + columns**2 <= (min(height, width) // _LOW) ** 2
    spectrum = torch.fft.fft2(difference.float()) * torch.where(is_low, low, high)
    found: torch.Tensor = torch.fft.ifft2(spectrum).real.to(difference.dtype)
    return found
