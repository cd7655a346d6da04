"""Runs that check themselves: reuse steps beside full ones, and full steps from then on where they are too far off."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence

import torch

from lightcache_fx.caching import Guard

log = logging.getLogger(__name__)


class Watch:
    """What the guard of one model has seen.

    Attributes:
        runs: that have begun.
        checked: reuse steps that a full one ran beside.
        worst: the largest error of these.
        stopped: why nothing is reused any more; None as long as things are.
    """

    def __init__(self, rule: Guard, owner: str) -> None:
        self._rule = rule
        self._owner = owner
        self._lock = threading.Lock()
        self.runs = 0
        self.checked = 0
        self.worst = 0.0
        self.stopped: str | None = None

    def begin_run(self) -> bool:
        """Whether the run that begins is checked: the first, and every n-th after it."""
        with self._lock:
            self.runs += 1
            every = self._rule.every
            return self.runs == 1 if every is None else (self.runs - 1) % every == 0

    def is_near(self, reused: Sequence[torch.Tensor], full: Sequence[torch.Tensor], step: int) -> bool:
        """Whether what a reuse step returned is within the bound of what a full one does; otherwise says so, once.

        Args:
            reused: the reuse step's outputs.
            full: the full step's.
            step: its index, for messages.
        """
        error = max((relative_error(a, b) for a, b in zip(reused, full, strict=True)), default=0.0)
        with self._lock:
            self.checked += 1
            self.worst = max(self.worst, error) if not math.isnan(error) else error
            near = error <= self._rule.bound
            if not near and self.stopped is None:
                self.stopped = f"step {step} of run {self.runs} was off by {error:.3g}, beyond {self._rule.bound:g}"
                log.warning("guard: %s runs in full from here: %s", self._owner, self.stopped)
        return near

    def __str__(self) -> str:
        worst = f"{self.worst:.3g} at worst" if self.checked else "none yet"
        stopped = f"; in full since {self.stopped}" if self.stopped is not None else ""
        return f"guard: {self.checked} reuse steps checked, off by {worst}{stopped}"


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The root mean square of the difference over that of the reference; of tensors of no numbers, 0."""
    if not reference.is_floating_point() or not reference.numel():
        return 0.0
    difference, size = (value.double() - reference.double()).square().mean(), reference.double().square().mean()
    return float((difference / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
