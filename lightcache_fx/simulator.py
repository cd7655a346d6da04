"""What a swap plan costs: a discrete-event simulation of computing and of the two ways over the link.

Three engines work at the same time, as a GPU's do: one computes, in order; one copies to the device and one from it,
each first come, first served. Computing waits for a copy from the device before the stay ends, so a fetch, which begins
behind that, never has to. Just before a call the copies that begin there are issued, and the call starts once
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

__all__ = ["Cause", "Engines", "Period", "Simulation", "Stall", "held_bytes", "simulate", "static_bytes", "validate"]

Cause = Literal["link busy", "issued late", "cold", "offload"]

_COLD: Cause = "cold"
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
            earlier, and nothing before it; `cold`: it waited for what the first period loads; `offload`: its copy from
            the device had not ended when its memory was to be free.
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
    engines = Engines(workload, residence, link)
    first, steady, count, settled = engines.settle(periods)
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


class Engines:
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
        self._arrival = [0.0] * len(stays)
        self._cause: list[Cause] = ["cold"] * len(stays)
        self._left = [0.0] * len(stays)
        self._home: set[str] = set()
        self._arriving = [0.0 if stay.made else link.arriving(movables[stay.name].num_bytes) for stay in stays]
        self._leaving = [link.leaving(movables[stay.name].num_bytes) if stay.offloaded else 0.0 for stay in stays]
        self._is_slot = [movables[stay.name].kind == "slot" for stay in stays]
        fetched = [number for number, stay in enumerate(stays) if not stay.made]
        offloaded = [number for number, stay in enumerate(stays) if stay.offloaded]
        self._issues = _by_op((stays[number].begin, number) for number in fetched)
        self._reads = _by_op((stays[number].first % count, number) for number in fetched)
        self._offloads = _by_op((stays[number].begin, number) for number in offloaded)
        self._closes = _by_op((stays[number].end % count, number) for number in offloaded)
        self._events = sorted({*self._issues, *self._reads, *self._offloads, *self._closes})
        self._clock = [0.0, *accumulate(op.seconds for op in workload.ops)]
        self._link = link

    def settle(self, periods: int) -> tuple[Period, Period, int, bool]:
        """The first period, a steady one, how many were run, and whether they have settled.

        An engine with more to copy than fits the period has not: it falls behind a little in each, until computing
        waits for it. That is seldom seen, as the first period starts with nothing copied ahead.
        """
        first = before = self.period(cold=True)
        for number in range(2, max(2, periods) + 1):
            period = self.period()
            keeps_up = max(period.to_device_seconds, period.from_device_seconds) <= period.seconds * (1 + _SAME)
            if number > 2 and keeps_up and abs(period.seconds - before.seconds) <= _SAME * period.seconds:
                return first, period, number, True
            before = period
        return first, before, max(2, periods), False

    def period(self, *, cold: bool = False) -> Period:
        """Run one period."""
        started, clock = self._now, self._clock
        self.copies, self.waits = [], []
        stalls: list[Stall] = []
        cold_reads, loaded_bytes = self._load() if cold else ({}, 0)
        loaded_seconds = self._to_free if cold else 0.0
        out: list[int] = []
        at = 0  # computing has come to just before this call
        for index in sorted({*self._events, *cold_reads}) if cold else self._events:
            self._now += clock[index] - clock[at]
            at = index
            if issues := self._issues.get(index):
                self._issue(issues)
            reads = self._reads.get(index)
            if reads or index in cold_reads:
                stalls += self._wait_for(index, reads or [], cold_reads.get(index, []))
            offloads, closes = self._offloads.get(index), self._closes.get(index)
            if offloads or closes:
                self._now += clock[index + 1] - clock[index]
                at = index + 1
                out += offloads or []
                stalls += self._leave(index, offloads or [], closes or [])
        self._now += clock[-1] - clock[at]
        arrived = [copy.stay for copy in self.copies]
        return Period(
            seconds=self._now - started,
            stalls=tuple(stalls),
            to_device_seconds=loaded_seconds + sum(self._arriving[number] for number in arrived),
            from_device_seconds=sum(self._leaving[number] for number in out),
            to_device_bytes=loaded_bytes + sum(map(self.num_bytes, arrived)),
            from_device_bytes=sum(map(self.num_bytes, out)),
        )

    def num_bytes(self, number: int) -> int:
        """Of what a stay is of."""
        return self.workload.movables[self.residence.stays[number].name].num_bytes

    def _wait_for(self, index: int, reads: list[int], loaded: list[tuple[float, str]]) -> list[Stall]:
        """Let all that a call reads for the first time arrive."""
        wait, name, cause = 0.0, "", _COLD
        if reads:
            latest = max(reads, key=self._arrival.__getitem__)
            wait, name, cause = (
                self._arrival[latest] - self._now,
                self.residence.stays[latest].name,
                self._cause[latest],
            )
            if wait > _NOISE:
                self.waits.append((latest, wait))
        if loaded and (late := max(loaded))[0] - self._now > wait:
            wait, name, cause = late[0] - self._now, late[1], _COLD
        return self._stalled(index, wait, name, cause)

    def _leave(self, index: int, offloads: list[int], closes: list[int]) -> list[Stall]:
        """Copy from the device what a call has made, and let go of what stayed until behind it."""
        for number in offloads:
            self._from_free = max(self._now, self._from_free) + self._leaving[number]
            self._left[number] = self._from_free
            self._home.add(self.residence.stays[number].name)
        if not closes:
            return []
        latest = max(closes, key=self._left.__getitem__)
        return self._stalled(index, self._left[latest] - self._now, self.residence.stays[latest].name, "offload")

    def _stalled(self, index: int, wait: float, name: str, cause: Cause) -> list[Stall]:
        if wait <= _NOISE:
            return []
        self._now += wait
        return [Stall(index, self.workload.ops[index].name, wait, name, cause)]

    def _issue(self, numbers: list[int]) -> None:
        """Copies to the device, issued now; a slot that was never made is simply not there."""
        now = self._now
        for number in numbers:
            if self._is_slot[number] and self.residence.stays[number].name not in self._home:
                self._arrival[number] = now
                continue
            queued = self._to_free > now
            start = self._to_free if queued else now
            self._behind_cold &= queued
            self._to_free = self._arrival[number] = start + self._arriving[number]
            self._cause[number] = ("cold" if self._behind_cold else "link busy") if queued else "issued late"
            self.copies.append(Copy(number, start, self._to_free, queued))

    def _load(self) -> tuple[dict[int, list[tuple[float, str]]], int]:
        """What the first period starts with: the copies of what is resident and of what the period before would leave.

        Returns:
            When each arrives, by the first call that reads it; and their bytes.
        """
        ops, movables = self.workload.ops, self.workload.movables
        count, uses = len(ops), self.workload.readers
        wanted: list[tuple[int, str]] = []
        weights = [name for name in self.residence.resident if movables[name].kind == "weight" and uses[name]]
        wanted += [(uses[name][0], name) for name in weights]
        for number, stay in enumerate(self.residence.stays):
            if not stay.made and stay.end >= count and not self._is_slot[number]:
                first = max(stay.first - count, 0)
                place = bisect_left(uses[stay.name], first)
                if place < len(uses[stay.name]) and uses[stay.name][place] <= stay.end - count:
                    wanted.append((uses[stay.name][place], stay.name))
        arrivals: dict[int, list[tuple[float, str]]] = {}
        for index, name in sorted(wanted):
            self._to_free += self._link.arriving(movables[name].num_bytes)
            arrivals.setdefault(index, []).append((self._to_free, name))
        self._behind_cold = bool(wanted)
        return arrivals, sum(movables[name].num_bytes for _, name in wanted)


def _by_op(entries: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, number in entries:
        found.setdefault(index, []).append(number)
    return found
