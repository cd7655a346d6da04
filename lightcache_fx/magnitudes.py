"""Which steps are full by magnitudes that were measured before (MagCache, Ma et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch


class MagnitudeRule(NamedTuple):
    """As `caching.Magnitude`, hashable."""

    ratios: tuple[float, ...]
    threshold: float
    max_reuse: int
    retention: float


@lru_cache(maxsize=256)
def full_steps(rule: MagnitudeRule, num_steps: int, first: int = 1, last: int = 0) -> tuple[bool, ...]:
    """One boolean a step, true for full.

    Products and sums are taken in float32, as in diffusers' hook, so that the same steps are full.

    Args:
        rule: ratios, threshold and limits.
        num_steps: of the run; ratios of another number of steps are read at the nearest place.
        first: so many first steps are full whatever the ratios say.
        last: likewise at the end.
    """
    ratios = torch.tensor(at_steps(rule.ratios, num_steps), dtype=torch.float32)
    retained = int(rule.retention * num_steps + 0.5)
    product, error, reused = torch.ones(()), torch.zeros(()), 0
    found: list[bool] = []
    for step in range(num_steps):
        if step < retained:
            found.append(True)
            continue
        product, reused = product * ratios[step], reused + 1
        error = error + (1.0 - product).abs()
        held = step > 0 and first <= step < num_steps - last
        full = not (held and bool(error <= rule.threshold) and reused <= rule.max_reuse)
        if full:
            product, error, reused = torch.ones(()), torch.zeros(()), 0
        found.append(full)
    return tuple(found)


def at_steps(ratios: Sequence[float], num_steps: int) -> list[float]:
    """The ratios of so many steps, each the nearest of those that there are."""
    if num_steps == len(ratios):
        return list(ratios)
    if num_steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (num_steps - 1)
    places = torch.round(torch.arange(num_steps, dtype=torch.float32) * scale).long()
    return [ratios[place] for place in places.tolist()]
