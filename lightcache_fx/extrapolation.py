"""What extrapolated slots need beside their values: how far apart these are, and how far ahead a step is.

The derivatives of order j at full step n are divided differences, as in TaylorSeer (Liu et al. 2025):

    F0[n] = value            Fj[n] = (Fj-1[n] - Fj-1[n - 1]) / (step[n] - step[n - 1])

and `k` steps behind it the value is taken for the sum of `Fj[n] * k**j / j!`. Only values are kept, the newest in the
slot and older ones as its history; the differences are taken anew at each reuse step, so that full steps read nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

COEFFICIENTS = "coefficients"
COEFFICIENT_BYTES = 4
MAX_ORDER = 3


def num_coefficients(order: int) -> int:
    """A gap and a weight for each order."""
    return 2 * order


def coefficients_name(cache: int) -> str:
    """The input that the slots of a cache, by its place in the policy, are weighed by."""
    return f"{COEFFICIENTS}_{cache}" if cache else COEFFICIENTS


def older_name(slot: str, age: int) -> str:
    """The name of the value that a slot had so many full steps ago."""
    return f"{slot}_before_{age}"


def slot_and_age(name: str) -> tuple[str, int]:
    """What `older_name` was given."""
    slot, _, age = name.rpartition("_before_")
    return slot, int(age)


def coefficients(full_steps: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """The gaps between the last full steps, newest first, and the weight of each derivative.

    Args:
        full_steps: the indices of the full steps whose values are kept, newest first; at least one.
        step: the index of the step to extrapolate to.
        order: of the highest derivative. Those that there are too few values for have no weight.

    Returns:
        `order` gaps and `order` weights.
    """
    known = min(order, len(full_steps) - 1)
    gaps = [float(newer - older) for newer, older in pairwise(full_steps)][:known]
    ahead = step - full_steps[0]
    weights = [ahead**j / math.factorial(j) for j in range(1, known + 1)]
    rest = order - known
    return (*gaps, *[1.0] * rest, *weights, *[0.0] * rest)


def as_tensor(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Coefficients as programs take them: float32, on the device."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)
