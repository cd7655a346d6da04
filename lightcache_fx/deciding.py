"""Whether a step goes on in full, by how much its indicator has changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightcache_fx.caching import Adaptive
from lightcache_fx.errors import ScheduleError


class LateNumber:
    """A number on the device that is asked for later: its copy is begun now, and only that is waited for then."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            copy = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
            tensor = copy
        self._tensor = tensor

    def read(self) -> float:
        """Its value."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._tensor)


@dataclass
class Decision:
    """What decides about one guidance branch's next step.

    Attributes:
        summed: of the changes since the last full step.
        newest: the change that was measured last, where steps decide one step late.
    """

    summed: float = 0.0
    newest: LateNumber | None = None

    def is_full(self, rule: Adaptive, measured: torch.Tensor, step: int, reused: int, label: str) -> bool:
        """Whether a step that may be reused is full.

        Args:
            rule: the policy's.
            measured: what the step's probe says of its change.
            step: its index, for messages.
            reused: how many steps have been since the last full one.
            label: of the indicator, for messages.

        Raises:
            ScheduleError: the change is no number.
        """
        late, self.newest = self.newest, LateNumber(measured) if rule.ahead else None
        if rule.max_reuse is not None and reused >= rule.max_reuse:
            return True
        change = _newest(late) if rule.ahead else float(measured)
        if not math.isfinite(change):
            raise ScheduleError(
                f"adaptive: at step {step} the change of {label} is {change}; expected a number. The indicator is zero,"
                f" or not finite: look at the model's outputs in this dtype, or name another indicator"
            )
        if rule.polynomial is not None:
            change = _value_of(rule.polynomial, change)
        if rule.since == "full":
            return change > rule.threshold
        self.summed += change
        return self.summed >= rule.threshold

    def begin_full(self) -> None:
        """Forget what has been summed: a full step comes."""
        self.summed, self.newest = 0.0, None


def _newest(late: LateNumber | None) -> float:
    """What was measured last; nothing has changed right behind a full step."""
    return 0.0 if late is None else late.read()


def _value_of(polynomial: list[float], x: float) -> float:
    """By Horner's rule; the highest power comes first."""
    total = 0.0
    for coefficient in polynomial:
        total = total * x + coefficient
    return total
