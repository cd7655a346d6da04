"""What a swap plan costs: a discrete-event simulation of computing and of the two ways over the link.

Three engines work at the same time, as a GPU's do: one computes, in order; one copies to the device and one from it,
each first come, first served. Just before a call the copies that begin there are issued, and the call starts once
everything that it reads has arrived. As everything is a `max` or a sum of what was before, the periods of a cyclic
workload settle to a constant time (max-plus algebra; Baccelli et al., *Synchronization and Linearity*, 1992).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from lightcache_fx.swap_checks import validate
from lightcache_fx.workload import Link, Residence, Workload

__all__ = ["Cause", "Machine", "Period", "Simulation", "Stall", "held_bytes", "simulate", "static_bytes", "validate"]

Cause = Literal["link busy", "issued late", "cold", "offload"]

_NOISE = 1e-12
"""Seconds; what rounding of sums can make of nothing."""
_SAME = 1e-9
"""Relative; two periods so near take the same time."""


@dataclass(frozen=True)
class Stall:
    """Computing waits.

    Attributes:
        op: number of the call that waits; for the cause `offload` of something that leaves, the call behind which
            computing waits.
        name: of that call.
        seconds: for how long.
        movable: what it waits for longest.
        cause: `link busy`: other copies were still under way when this one was issued; `issued late`: there was no room
            earlier, and nothing before it; `cold`: it waited for what the first period loads; `offload`: it had to be
            copied from the device first.
    """

    op: int
    name: str
    seconds: float
    movable: str
    cause: Cause


@dataclass(frozen=True)
class Period:
    """One period as it went.

    Attributes:
        seconds: from just before its first call to just before the next period's.
        stalls: in order.
        to_device_seconds, from_device_seconds: what the copies that were issued in it take.
        to_device_bytes, from_device_bytes: what these carry.
    """

    seconds: float
    stalls: tuple[Stall, ...]
    to_device_seconds: float
    from_device_seconds: float
    to_device_bytes: int
    from_device_bytes: int

    @property
    def stalled_seconds(self) -> float:
        """Time in which nothing is computed."""
        return sum(stall.seconds for stall in self.stalls)


@dataclass(frozen=True)
class Simulation:
    """What a residence costs.

    Attributes:
        compute_seconds: of a period in which nothing waits.
        first: the period that starts with nothing on the device, and loads what is resident.
        steady: each of those that follow, once they take the same time.
        periods: how many were simulated.
        settled: whether the last two took the same time.
        bytes_by_op: the most on the device during each call of a steady period.
    """

    compute_seconds: float
    first: Period
    steady: Period
    periods: int
    settled: bool
    bytes_by_op: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """Of a steady period."""
        return self.steady.seconds

    @property
    def slowdown(self) -> float:
        """Time of a steady period that nothing is computed in, over the time without swapping."""
        return self.steady.stalled_seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def hidden(self) -> float:
        """Share of a steady period's copying that computing does not wait for."""
        copying = self.steady.to_device_seconds + self.steady.from_device_seconds
        return 1.0 - self.steady.stalled_seconds / copying if copying else 1.0

    @property
    def peak_bytes(self) -> int:
        """The most on the device."""
        return max(self.bytes_by_op, default=0)

    @property
    def peak_op(self) -> int:
        """The first call during which it is."""
        return self.bytes_by_op.index(self.peak_bytes) if self.bytes_by_op else 0


class Copy(NamedTuple):
    """A copy to the device in one period: the stay's number, when it starts and ends, and whether it had to queue."""

    stay: int
    start: float
    end: float
    queued: bool


def simulate(workload: Workload, residence: Residence, link: Link, *, periods: int = 16) -> Simulation:
    """Run period after period until two in a row take the same time, or the bound is reached.

    Args:
        workload: what is computed.
        residence: where everything is; `validate` says whether it is sound.
        link: the way to the device and back.
        periods: how many at most.
    """
    machine = Machine(workload, residence, link)
    first, steady, count, settled = machine.settle(periods)
    memory = tuple(static_bytes(workload, residence))
    return Simulation(workload.seconds, first, steady, count, settled, memory)


def static_bytes(workload: Workload, residence: Residence) -> list[int]:
    """The most on the device during each call: what is live, what is resident, and what stays over it."""
    sizes = {name: movable.num_bytes for name, movable in workload.movables.items()}
    ranges = ((stay.begin, stay.end, sizes[stay.name]) for stay in residence.stays)
    resident = sum(sizes[name] for name in residence.resident)
    held = held_bytes(len(workload.ops), ranges)
    return [op.live_bytes + resident + bytes_here for op, bytes_here in zip(workload.ops, held, strict=True)]


def held_bytes(count: int, ranges: Iterable[tuple[int, int, int]]) -> list[int]:
    """By call, the bytes of the ranges (first call, last call, bytes) over it; calls are counted modulo `count`."""
    change = [0] * (count + 1)
    for begin, end, size in ranges:
        if end >= count and begin < count:
            change[begin] += size
            change[count] -= size
            begin, end = 0, end - count
        elif begin >= count:
            begin, end = begin - count, end - count
        change[begin] += size
        change[end + 1] -= size
    return list(accumulate(change[:-1]))


class Machine:
    """The three engines; time goes on from period to period.

    Attributes:
        copies: to the device, of the last period, in order.
        waits: of the last period: the number of the stay that was waited for, and for how long.
    """

    def __init__(self, workload: Workload, residence: Residence, link: Link) -> None:
        self.workload, self.residence = workload, residence
        movables, count = workload.movables, len(workload.ops)
        stays = residence.stays
        self.copies: list[Copy] = []
        self.waits: list[tuple[int, float]] = []
        self._now = self._to_free = self._from_free = 0.0
        self._behind_cold = False
        self._pushed = False
        self._arrival = [0.0] * len(stays)
        self._cause: list[Cause] = ["cold"] * len(stays)
        self._left = [0.0] * len(stays)
        self._home: dict[str, float] = {}
        self._arriving = [0.0 if stay.made else link.arriving(movables[stay.name].num_bytes) for stay in stays]
        self._leaving = [link.leaving(movables[stay.name].num_bytes) if stay.offloaded else 0.0 for stay in stays]
        self._is_slot = [movables[stay.name].kind == "slot" for stay in stays]
        fetched = [number for number, stay in enumerate(stays) if not stay.made]
        offloaded = [number for number, stay in enumerate(stays) if stay.offloaded]
        self._issues = _by_op(count, [(stays[number].begin, number) for number in fetched])
        self._reads = _by_op(count, [(stays[number].first % count, number) for number in fetched])
        self._offloads = _by_op(count, [(stays[number].begin, number) for number in offloaded])
        self._closes = _by_op(count, [(stays[number].end % count, number) for number in offloaded])
        self._link = link

    def settle(self, periods: int) -> tuple[Period, Period, int, bool]:
        """The first period, a steady one, how many were run, and whether they have settled.

        An engine with more to copy than fits a period falls behind a little in each, and it may be many periods before
        computing first waits for it; where that is seen, the engine is set back by a whole period at once.
        """
        first = before = self.period(cold=True)
        for number in range(2, max(2, periods) + 1):
            period = self.period()
            if abs(period.seconds - before.seconds) <= _SAME * period.seconds and number > 2:
                behind = (period.to_device_seconds, period.from_device_seconds)
                if self._pushed or max(behind) <= period.seconds * (1 + _SAME):
                    return first, period, number, True
                self._to_free = max(self._to_free, self._now) + behind[0]
                self._from_free = max(self._from_free, self._now) + behind[1]
                self._pushed = True
            before = period
        return first, before, max(2, periods), False

    def period(self, *, cold: bool = False) -> Period:
        """Run one period."""
        started, ops = self._now, self.workload.ops
        self.copies, self.waits = [], []
        stalls: list[Stall] = []
        cold_reads, cold_bytes = self._load() if cold else ({}, 0)
        cold_seconds = self._to_free if cold else 0.0
        now, out_bytes, out_seconds = self._now, 0, 0.0
        for index, op in enumerate(ops):
            if issues := self._issues[index]:
                self._issue(issues, now)
            if reads := self._reads[index]:
                latest = max(reads, key=self._arrival.__getitem__)
                wait, name, cause = self._arrival[latest] - now, self.residence.stays[latest].name, self._cause[latest]
                if wait > _NOISE:
                    self.waits.append((latest, wait))
            else:
                wait, name, cause = 0.0, "", "cold"
            if cold and (late := max(cold_reads.get(index, ()), default=None)) and late[0] - now > wait:
                wait, name, cause = late[0] - now, late[1], "cold"
            if wait > _NOISE:
                stalls.append(Stall(index, op.name, wait, name, cause))
                now += wait
            now += op.seconds
            for number in self._offloads[index]:
                self._from_free = max(now, self._from_free) + self._leaving[number]
                self._left[number] = self._home[self.residence.stays[number].name] = self._from_free
                out_bytes += self.workload.movables[self.residence.stays[number].name].num_bytes
                out_seconds += self._leaving[number]
            if closes := self._closes[index]:
                latest = max(closes, key=self._left.__getitem__)
                wait = self._left[latest] - now
                if wait > _NOISE:
                    stalls.append(Stall(index, op.name, wait, self.residence.stays[latest].name, "offload"))
                    now += wait
        self._now = now
        movables, stays = self.workload.movables, self.residence.stays
        in_bytes = cold_bytes + sum(movables[stays[copy.stay].name].num_bytes for copy in self.copies)
        in_seconds = cold_seconds + sum(self._arriving[copy.stay] for copy in self.copies)
        return Period(now - started, tuple(stalls), in_seconds, out_seconds, in_bytes, out_bytes)

    def _issue(self, numbers: list[int], now: float) -> None:
        """Copies to the device, issued now; a slot that was never made is simply not there."""
        for number in numbers:
            ready = now
            if self._is_slot[number]:
                home = self._home.get(self.residence.stays[number].name)
                if home is None:
                    self._arrival[number] = now
                    continue
                ready = max(now, home)
            queued = self._to_free > ready
            start = self._to_free if queued else ready
            self._behind_cold &= queued
            self._to_free = self._arrival[number] = start + self._arriving[number]
            if queued:
                self._cause[number] = "cold" if self._behind_cold else "link busy"
            else:
                self._cause[number] = "offload" if ready > now else "issued late"
            self.copies.append(Copy(number, start, self._to_free, queued))

    def _load(self) -> tuple[dict[int, list[tuple[float, str]]], int]:
        """What the first period starts with: the copies of what is resident and of what the period before would leave.

        Returns:
            When each arrives, by the first call that reads it; and their bytes.
        """
        ops, movables = self.workload.ops, self.workload.movables
        count, uses = len(ops), self.workload.readers
        wanted: list[tuple[int, int, str]] = []
        weights = [name for name in self.residence.resident if movables[name].kind == "weight" and uses[name]]
        wanted += [(uses[name][0], -1, name) for name in weights]
        for number, stay in enumerate(self.residence.stays):
            if not stay.made and stay.end >= count and not self._is_slot[number]:
                first = max(stay.first - count, 0)
                place = bisect_left(uses[stay.name], first)
                if place < len(uses[stay.name]) and uses[stay.name][place] <= stay.end - count:
                    wanted.append((uses[stay.name][place], number, stay.name))
        arrivals: dict[int, list[tuple[float, str]]] = {}
        for index, number, name in sorted(wanted):
            self._to_free += self._link.arriving(movables[name].num_bytes)
            arrivals.setdefault(index, []).append((self._to_free, name))
            if number >= 0:
                self._arrival[number] = self._to_free
        self._behind_cold = bool(wanted)
        return arrivals, sum(movables[name].num_bytes for _, _, name in wanted)


def _by_op(count: int, entries: list[tuple[int, int]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(count)]
    for index, number in entries:
        found[index].append(number)
    return found
