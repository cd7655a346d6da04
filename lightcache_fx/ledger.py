"""Which of the models that share a device is there, which is expected next, and what was fetched for that one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lightcache_fx.program import BoundProgram
from lightcache_fx.runs import RunTracker
from lightcache_fx.stores import Copies


@dataclass
class Stretch:
    """Calls of one model in a row, within one generation.

    Attributes:
        tracker: the model's.
        num_steps: of the run that they are in, where that is known.
        calls: how many.
        first: the programs that the first of them ran, in order; none of a model that runs as it is.
    """

    tracker: RunTracker
    num_steps: int | None
    calls: int = 0
    first: list[BoundProgram] = field(default_factory=list)


class Ledger(threading.local):
    """Of models that share a device, which one has copies of weights there: each thread's last one called.

    Within a generation of a pipeline it notes the order in which they are called, and by that of the generation before
    it tells which one is expected next. What is fetched for that one is kept here, and dropped if another one comes.

    Attributes:
        is_shared: whether there are several.
        handed: the device's copies of weights of the model that is expected next.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.handed = Copies()
        self._handed_to: RunTracker | None = None
        self._present: RunTracker | None = None
        self._before: list[Stretch] = []
        self._now: list[Stretch] | None = None

    @contextmanager
    def generation(self) -> Iterator[None]:
        """One generation of the pipeline whose models these are; of one that fails nothing is learned."""
        self._now = []
        try:
            yield
            self._before = self._now
        finally:
            self._now = None
            self.let_go()

    def enter(self, tracker: RunTracker, num_steps: int | None = None) -> None:
        """A model is about to run: the copies of the one before, and those for any other, make room for its own."""
        if self._present is not None and self._present is not tracker:
            self._present.weight_copies.drop()
        if self._handed_to is not tracker:
            self.handed.drop()
        self._present = tracker
        if self._now is not None:
            if not self._now or self._now[-1].tracker is not tracker:
                self._now.append(Stretch(tracker, num_steps))
            self._now[-1].calls += 1

    def note(self, program: BoundProgram) -> None:
        """The model that is present is about to run one of its programs."""
        if self._now and self._now[-1].calls == 1:
            self._now[-1].first.append(program)

    def expected(self, num_steps: int | None, calls_left: int | None) -> Stretch | None:
        """The calls that are expected behind the present one, where they are another model's.

        The present call is the last of its model if it is the last of the run, or if the generation before, of as many
        steps, went on with another model there.

        Args:
            num_steps: of the run, where that is known.
            calls_left: how many calls of the model follow in the run, where that is known.
        """
        if not self._now:
            return None
        place, present = len(self._now) - 1, self._now[-1]
        if calls_left == 0:
            place = max((i for i, old in enumerate(self._before) if old.tracker is present.tracker), default=-2)
        elif place >= len(self._before) or not _alike(self._before[place], present, num_steps):
            return None
        following = self._before[place + 1 :][:1] if place >= 0 else []
        return following[0] if following and following[0].first else None

    def hand_to(self, tracker: RunTracker) -> Copies:
        """Where to put copies for the model that is expected next."""
        self._handed_to = tracker
        return self.handed

    def take_over(self, tracker: RunTracker) -> None:
        """Give the model that has entered what was fetched for it."""
        if self._handed_to is tracker:
            tracker.weight_copies.held.update(self.handed.held)
            self.let_go()

    def let_go(self) -> None:
        """Hold nothing for any model; copies under way end by themselves."""
        self.handed = Copies()
        self._handed_to = None


def _alike(old: Stretch, present: Stretch, num_steps: int | None) -> bool:
    return old.tracker is present.tracker and old.calls == present.calls and old.num_steps == num_steps
