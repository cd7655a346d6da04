"""When each copy to the device begins, once it is decided between which uses a movable stays.

Copies are in the order in which they are needed. Each begins as early as there is memory for it and for all that are
needed before it, which no other beginning in this order beats: one that is needed later never takes room from one that
is needed earlier (as `Aggressive` of Cao, Felten, Karlin and Li, *A study of integrated prefetching and caching
strategies*, 1995, with a given choice of what stays). That does not look at the link. Then each is put off to where the
link, working backwards from the last call, has to begin with it, which frees memory and changes no call's start: where
a copy that was put off leads a busy stretch of the link, that stretch ends in time on a clock on which nothing waits,
and waiting only gives it more time.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from lightcache_fx.simulator import held_bytes
from lightcache_fx.workload import Link, Residence, Stay, Workload

HASTE = 1.25
"""Copies are placed as if they took so much longer, for predictions may be off."""
_MERGES = 3
_SHARE_FOR_OFFLOADS = 0.5
"""Of a period: the slowest way from the device for which memory is kept while a slot leaves."""


class Gap(NamedTuple):
    """Between two uses of a movable, the last one of a period and the first of the next included.

    Attributes:
        name: of the movable.
        num_bytes: of it.
        behind: the call before, in the period or, negative, in the one before.
        ahead: the call behind it, in the period.
        dead: a slot is made at `ahead`, so there is nothing to keep.
        crosses: it cannot be held by itself, as nothing stays over the boundary in it, unless it is resident.
        lower: the first call before which a copy for `ahead` may begin.
    """

    name: str
    num_bytes: int
    behind: int
    ahead: int
    dead: bool
    crosses: bool
    lower: int


class Space:
    """What there is to decide.

    Attributes:
        workload: what is planned.
        wrap: whether stays may cross from step to step.
        gaps: in the order of `ahead`, which is the order of copies.
        of: the numbers of each movable's gaps, in order.
        clock: when each call starts if nothing waits, and when the last one ends.
    """

    def __init__(self, workload: Workload, *, wrap: bool) -> None:
        self.workload, self.wrap = workload, wrap
        self.clock = [0.0, *accumulate(op.seconds for op in workload.ops)]
        found: list[tuple[int, int, Gap]] = []
        for rank, movable in enumerate(workload.movables.values()):
            writes = frozenset(workload.writers[movable.name])
            uses = sorted({*workload.readers[movable.name], *writes})
            for place, ahead in enumerate(uses):
                behind = uses[place - 1] if place else uses[-1] - len(workload.ops)
                lower, crosses = self._bounds(behind, ahead)
                gap = Gap(movable.name, movable.num_bytes, behind, ahead, ahead in writes, crosses, lower)
                found.append((ahead, rank, gap))
        self.gaps = [gap for _, _, gap in sorted(found, key=lambda entry: entry[:2])]
        self.of: dict[str, list[int]] = {}
        for number, gap in enumerate(self.gaps):
            self.of.setdefault(gap.name, []).append(number)

    def _bounds(self, behind: int, ahead: int) -> tuple[int, bool]:
        starts = self.workload.starts
        start = starts[bisect_right(starts, ahead) - 1] if not self.wrap else 0
        if not self.wrap or not self.workload.cyclic:
            return max(start, behind + 1), behind < start
        return behind + 1, False

    def nothing_held(self) -> bytearray:
        """A flag for each gap: whether its movable stays over it. One whose flags are all set is resident."""
        return bytearray(len(self.gaps))

    def unit(self, number: int, held: bytearray) -> list[int]:
        """What is held with a gap: itself, or all that is left of its movable where that can only be resident."""
        gap = self.gaps[number]
        return [number] if not gap.crosses else [other for other in self.of[gap.name] if not held[other]]


@dataclass(frozen=True)
class Placement:
    """Where everything is.

    Attributes:
        held: as `Space.nothing_held` has it; with what turned out to stay, because there was room to fetch it at once.
        residence: the same, as stays.
        free: of each gap that is not held: the first call behind the stay before, and where the next stay begins.
        numbers: of the gaps that the stays of the residence follow, in their order.
        cut_short: whether a slot would have stayed longer while it leaves, had its step not ended.
    """

    held: bytearray
    residence: Residence
    free: dict[int, tuple[int, int]]
    numbers: tuple[int, ...]
    cut_short: bool


@dataclass(frozen=True)
class Request:
    """How to place.

    Attributes:
        budget: bytes on the device.
        link: the way there and back.
        merge: whether what could be fetched as soon as it left stays instead.
        within_step: whether a slot that leaves does so before its step ends.
    """

    budget: int
    link: Link
    merge: bool = True
    within_step: bool = False


def place(space: Space, held: bytearray, request: Request) -> Placement:
    """The stays of all that is not held: each copy as early as memory allows and as late as the link allows."""
    held = bytearray(held)
    for _ in range(_MERGES):
        runs = Runs(space, held, request)
        begins = runs.earliest()
        staying = [number for number in runs.fetched if begins[number] <= runs.left[number]]
        staying = [number for number in staying if request.merge and not space.gaps[number].crosses]
        if not staying:
            break
        for number in staying:
            held[number] = 1
    else:
        runs = Runs(space, held, request)
        begins = runs.earliest()
    latest = runs.latest()
    return runs.placement({number: max(begins[number], latest[number]) for number in runs.fetched})


class Runs:
    """Stretches of uses over which movables stay, each behind a gap that is not held.

    Attributes:
        fetched: the gaps at whose end the movable is copied to the device, in order.
        end: by gap, the last call of the run behind it.
        left: by gap, the first call behind the run before it.
        base: bytes by call, without what is copied ahead of its use.
        cut_short: as `Placement` has it.
    """

    def __init__(self, space: Space, held: bytearray, request: Request) -> None:
        self.space, self.held, self.request = space, held, request
        self.count = len(space.workload.ops)
        self.end: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.offloaded: dict[int, int] = {}
        self.cut_short = False
        resident = 0
        for numbers in space.of.values():
            borders = [place for place, number in enumerate(numbers) if not held[number]]
            if not borders:
                resident += space.gaps[numbers[0]].num_bytes
            else:
                self._runs_of(numbers, borders)
        self.fetched = [number for number in sorted(self.end) if not space.gaps[number].dead]
        core = [(space.gaps[n].ahead, end, space.gaps[n].num_bytes) for n, end in self.end.items()]
        live = [op.live_bytes + resident for op in space.workload.ops]
        self.base = [a + b for a, b in zip(live, held_bytes(self.count, core), strict=True)]
        if self.offloaded:
            self._stay_while_leaving()

    def _runs_of(self, numbers: Sequence[int], borders: Sequence[int]) -> None:
        gaps = self.space.gaps
        for place, border in enumerate(borders):
            last = borders[place + 1] - 1 if place + 1 < len(borders) else borders[0] - 1
            number, following = numbers[border], numbers[borders[(place + 1) % len(borders)]]
            end = gaps[numbers[last]].ahead
            if end < gaps[number].ahead:
                end += self.count
            self.end[number] = end
            self.left[following] = gaps[following].behind + 1
            if gaps[number].dead and not gaps[following].dead:
                self.offloaded[number] = following

    def _stay_while_leaving(self) -> None:
        """Slots that leave stay until they are copied, by the clock on which nothing waits, as far as there is room.

        How far there is room is found with a link that does not depend on the one asked about, so that a faster one
        never lets something stay longer.
        """
        gaps, request = self.space.gaps, self.request
        order = sorted(self.offloaded, key=lambda number: gaps[number].ahead)
        total = max(1, sum(gaps[number].num_bytes for number in order))
        reference = Link(math.inf, total / (_SHARE_FOR_OFFLOADS * self.space.clock[-1] or 1.0), 0.0)
        wanted, needed = self._left_by(order, reference), self._left_by(order, request.link)
        for number in order:
            gap, following, end = gaps[number], gaps[self.offloaded[number]], self.end[number]
            ahead = following.ahead + (0 if following.ahead > gap.ahead else self.count)
            unbound = min(ahead - 1, wanted[number])
            bound = min(unbound, self._bound(gap.ahead))
            self.cut_short |= bound < unbound
            free = end
            while free < bound and self.base[(free + 1) % self.count] + gap.num_bytes <= request.budget:
                free += 1
                self.base[free % self.count] += gap.num_bytes
            used = max(end, min(free, needed[number]))
            for index in range(used + 1, free + 1):
                self.base[index % self.count] -= gap.num_bytes
            self.end[number] = used
            self.left[self.offloaded[number]] += used - end

    def _bound(self, index: int) -> int:
        workload = self.space.workload
        if not self.request.within_step and self.space.wrap:
            return index + self.count if workload.cyclic else self.count - 1
        return workload.starts[bisect_right(workload.starts, index)] - 1

    def _left_by(self, order: Sequence[int], link: Link) -> dict[int, int]:
        """The call during which each slot's copy from the device ends, if nothing waits."""
        clock, gaps = self.space.clock, self.space.gaps
        period, free = clock[-1], -math.inf
        ends: dict[int, int] = {}
        for offset in (-period, 0.0) if self.space.workload.cyclic else (0.0,):
            for number in order:
                free = max(free, clock[gaps[number].ahead + 1] + offset) + link.leaving(gaps[number].num_bytes)
                ends[number] = _at(clock, free, bisect_left) if period else gaps[number].ahead
        return ends

    def earliest(self) -> dict[int, int]:
        """The first call before which each copy may begin: there is room for it, and all needed before have begun.

        A copy fits from a call on if it does beside all that are needed before it and behind that call; so with the
        bytes of copies counted through, it fits behind the last call whose limit, the bytes that are needed by then and
        the room, is less than its own count. Calls behind which another has a lower limit never decide.
        """
        gaps, count, room = self.space.gaps, self.count, [self.request.budget - used for used in self.base]
        begins: dict[int, int] = {}
        queue: deque[tuple[int, int]] = deque()
        through, full, before = 0, -(2 * count) - 1, -2 * count
        periods = (-count, 0) if self.space.workload.cyclic and self.space.wrap else (0,)
        cursor = periods[0]
        for offset in periods:
            for number in self.fetched:
                gap = gaps[number]
                first = gap.ahead + offset
                for place in range(cursor, first):
                    limit = through + room[place]
                    while queue and queue[-1][0] >= limit:
                        queue.pop()
                    queue.append((limit, place))
                cursor = first
                through += gap.num_bytes
                while queue and queue[0][0] < through:
                    full = queue.popleft()[1]
                before = max(before, full + 1, max(gap.lower, self.left[number]) + offset)
                begins[number] = before
        return begins

    def latest(self) -> dict[int, int]:
        """The call at which the link has to begin with each copy at the latest, so that nothing waits."""
        gaps, clock, link = self.space.gaps, self.space.clock, self.request.link
        period, start = clock[-1], math.inf
        if not period:
            return dict.fromkeys(self.fetched, -self.count)
        places: dict[int, int] = {}
        for offset in (period, 0.0) if self.space.workload.cyclic else (0.0,):
            for number in reversed(self.fetched):
                gap = gaps[number]
                start = min(start, clock[gap.ahead] + offset) - HASTE * link.arriving(gap.num_bytes)
                places[number] = min(gap.ahead, _at(clock, start))
        return places

    def placement(self, begins: dict[int, int]) -> Placement:
        """As stays."""
        space, count = self.space, self.count
        stays: list[tuple[int, int, int, Stay]] = []
        free: dict[int, tuple[int, int]] = {}
        for number, end in self.end.items():
            gap = space.gaps[number]
            begin = gap.ahead if gap.dead else begins[number]
            free[number] = self.left[number], begin
            turn = count if begin < 0 else 0
            begin, first, end = begin + turn, gap.ahead + turn, end + turn
            stay = Stay(gap.name, begin, first, end, gap.dead, number in self.offloaded)
            stays.append((begin, first, number, stay))
        stays.sort(key=lambda entry: entry[:3])
        resident = frozenset(name for name, numbers in space.of.items() if all(self.held[n] for n in numbers))
        residence = Residence(resident, tuple(entry[3] for entry in stays))
        return Placement(self.held, residence, free, tuple(entry[2] for entry in stays), self.cut_short)


def _at(clock: Sequence[float], time: float, bisect: Callable[[Sequence[float], float], int] = bisect_right) -> int:
    """The last call that has started by a time, or with `bisect_left` before it; beyond the period, in others."""
    turns = math.floor(time / clock[-1])
    inside = min(max(time - turns * clock[-1], 0.0), clock[-1])
    return min(bisect(clock, inside) - 1, len(clock) - 2) + turns * (len(clock) - 1)
