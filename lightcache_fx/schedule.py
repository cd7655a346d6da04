"""Which steps are full and, where several things are kept, which of them a step computes afresh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightcache_fx.caching import Adaptive, Cache, Guidance, Magnitude
from lightcache_fx.errors import ScheduleError
from lightcache_fx.magnitudes import MagnitudeRule, full_steps

_LOOK_AHEAD = 64
_MOST_STEPS = 1024


def _rule(magnitude: Magnitude) -> MagnitudeRule:
    return MagnitudeRule(tuple(magnitude.ratios), magnitude.threshold, magnitude.max_reuse, magnitude.retention)


@dataclass(frozen=True)
class Schedule:
    """Step index -> full or reuse. Step 0 is always full.

    Attributes: as in `Cache`; without a cache every step is full. Where steps decide for themselves (`adaptive`), those
    are full here that are so whatever they would decide.
    """

    interval: int | None = 1
    steps: frozenset[int] | None = None
    mask: tuple[bool, ...] | None = None
    magnitude: MagnitudeRule | None = None
    adaptive: Adaptive | None = None
    first: int = 1
    last: int = 0
    num_steps: int | None = None

    @classmethod
    def of(cls, cache: Cache | None) -> Schedule:
        """The schedule that a policy asks for."""
        if cache is None:
            return cls()
        return cls(
            interval=cache.interval,
            steps=frozenset(cache.steps) if cache.steps is not None else None,
            mask=tuple(cache.mask) if cache.mask is not None else None,
            magnitude=_rule(cache.magnitude) if cache.magnitude is not None else None,
            adaptive=cache.adaptive,
            first=cache.first,
            last=cache.last,
            num_steps=cache.num_steps,
        )

    @classmethod
    def of_guidance(cls, guidance: Guidance) -> Schedule:
        """The schedule of the steps that compute all guidance branches."""
        return cls(guidance.interval, first=guidance.first, last=guidance.last, num_steps=guidance.num_steps)

    def check(self, num_steps: int | None) -> None:
        """Raise a `ScheduleError` where the schedule does not fit a run of `num_steps` steps (None: not known)."""
        total = num_steps or self.num_steps
        if (self.last or self.magnitude is not None) and total is None:
            given = f"last={self.last}" if self.last else "magnitude"
            raise ScheduleError(
                f"{given}: the number of steps is not known here; use transform_pipeline, which tells it, or give"
                f" Cache(num_steps=...)"
            )
        if self.num_steps is not None and num_steps is not None and self.num_steps != num_steps:
            raise ScheduleError(
                f"num_steps={self.num_steps}, but the run has {num_steps} steps; leave it out or make them equal"
            )
        if total is None:
            return
        if self.mask is not None and len(self.mask) != total:
            raise ScheduleError(
                f"mask has {len(self.mask)} entries, but the run has {total} steps; give one entry a step"
            )
        if self.steps is not None and max(self.steps) >= total:
            raise ScheduleError(f"steps names step {max(self.steps)}, but the run has {total} steps (counted from 0)")

    def is_full(self, step: int, num_steps: int | None = None) -> bool:
        """Whether step `step` (from 0) computes everything.

        Raises:
            ScheduleError: the step is beyond the mask's end.
        """
        total = num_steps or self.num_steps
        if self.mask is not None and step >= len(self.mask):
            raise ScheduleError(
                f"mask has {len(self.mask)} entries, but step {step} (counted from 0) was called; give one entry a"
                f" step, second"
                f" evaluations of second-order schedulers included"
            )
        if step < self.first or (total is not None and step >= total - self.last):
            return True
        if self.mask is not None:
            return self.mask[step]
        if self.steps is not None:
            return step in self.steps
        if self.magnitude is not None:
            return self._by_magnitude(self.magnitude, num_steps)[step]
        return self.adaptive is None and step % (self.interval or 1) == 0

    def _by_magnitude(self, rule: MagnitudeRule, num_steps: int | None) -> tuple[bool, ...]:
        self.check(num_steps)
        total = num_steps or self.num_steps
        assert total is not None  # as checked
        return full_steps(rule, total, self.first, self.last)

    def longest_interval(self, at_most: int) -> int:
        """The most steps from one full step to the next or to the run's end; `at_most` where that is not known."""
        if self.interval is not None:
            return min(self.interval, at_most)
        if (rule := self.magnitude or self.adaptive) is not None:
            return at_most if rule.max_reuse is None else min(rule.max_reuse + 1, at_most)
        total = self.num_steps or (len(self.mask) if self.mask is not None else max(self.steps or ()) + at_most)
        full = [step for step in range(total) if self.is_full(step)]
        return min(max(b - a for a, b in pairwise([*full, total])), at_most)

    def steps_to_full(self, step: int, num_steps: int | None = None) -> int | None:
        """How many steps after `step` the next full one is; None where the run ends before, or is not known to last."""
        if self.adaptive is not None:
            return None
        total = num_steps or self.num_steps or (len(self.mask) if self.mask is not None else None)
        last = total if total is not None else step + _LOOK_AHEAD
        return next((later - step for later in range(step + 1, last) if self.is_full(later, num_steps)), None)

    def describe(self) -> str:
        """`every 3rd step full`-like, for tables."""
        if self.mask is not None:
            text = f"full at {[i for i, full in enumerate(self.mask) if full]} of {len(self.mask)} steps"
        elif self.steps is not None:
            text = f"full at steps {sorted(self.steps)}"
        elif self.magnitude is not None:
            text = f"full where magnitudes have changed by {self.magnitude.threshold:g}"
        elif self.adaptive is not None:
            text = f"full where the indicator has changed by {self.adaptive.threshold:g}"
        else:
            text = "every step full" if self.interval == 1 else f"one step in {self.interval} full"
        edges = [f"first {self.first}"] if self.first > 1 else []
        edges += [f"last {self.last}"] if self.last else []
        return text + (f", and the {' and '.join(edges)}" if edges else "")


@dataclass(frozen=True)
class Schedules:
    """The schedules of all caches of a policy, each by its place there. Without any, every step is full."""

    each: tuple[Schedule, ...] = ()

    @classmethod
    def of(cls, caches: Sequence[Cache]) -> Schedules:
        """The schedules that a policy asks for."""
        return cls(tuple(map(Schedule.of, caches)))

    def fresh(self, step: int, num_steps: int | None = None) -> tuple[int, ...]:
        """The caches that are computed afresh at step `step` (from 0); the others are reused.

        Raises:
            ScheduleError: as `Schedule.is_full`.
        """
        return tuple(place for place, one in enumerate(self.each) if one.is_full(step, num_steps))

    def is_full(self, step: int, num_steps: int | None = None) -> bool:
        """Whether step `step` computes everything."""
        return len(self.fresh(step, num_steps)) == len(self.each)

    def check(self, num_steps: int | None) -> None:
        """As `Schedule.check`, for each of them."""
        for one in self.each:
            one.check(num_steps)

    def longest_interval(self, at_most: int) -> int:
        """As `Schedule.longest_interval`, of the one whose is longest."""
        return max((one.longest_interval(at_most) for one in self.each), default=1)

    def steps_to_full(self, step: int, num_steps: int | None = None) -> int | None:
        """As `Schedule.steps_to_full`; None where there are several, whose steps are not told apart by that."""
        return self.each[0].steps_to_full(step, num_steps) if len(self.each) == 1 else None

    def combinations(self) -> list[tuple[int, ...]]:
        """What the steps of a run compute afresh, step by step, up to where that repeats.

        Where the number of steps is not known, what its last ones may compute besides (`last`) comes at the end.
        """
        known = next((one.num_steps for one in self.each if one.num_steps is not None), None)
        known = known or next((len(one.mask) for one in self.each if one.mask is not None), None)
        if known is not None:
            return [self.fresh(step, known) for step in range(known)]
        fixed = max((max(one.steps) + 1 for one in self.each if one.steps is not None), default=0)
        fixed = max(fixed, *(one.first for one in self.each)) if self.each else 0
        repeating = math.lcm(*(one.interval for one in self.each if one.interval is not None))
        open_end = [self.fresh(step) for step in range(fixed + min(repeating, _MOST_STEPS) + 1)]
        ends = sorted({one.last for one in self.each if one.last})
        last = [{place for place, one in enumerate(self.each) if one.last >= end} for end in ends]
        return open_end + [tuple(sorted({*fresh, *end})) for end in last for fresh in dict.fromkeys(open_end)]

    def describe(self) -> str:
        """As `Schedule.describe`, one after the other."""
        return "; ".join(one.describe() for one in self.each) or Schedule().describe()


def program_name(fresh: Sequence[int], count: int) -> str:
    """The program of a step that computes these of `count` caches afresh: `full`, `reuse`, or `fresh0and2`."""
    if len(fresh) == count:
        return "full"
    return "fresh" + "and".join(map(str, fresh)) if fresh else "reuse"


def fresh_of(name: str, count: int) -> tuple[int, ...]:
    """What `program_name` was given."""
    if name == "full":
        return tuple(range(count))
    return () if name == "reuse" else tuple(int(place) for place in name.removeprefix("fresh").split("and"))
