"""Seconds computed by hand, a second simulation that is as plain as can be, and what is refused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightcache_fx.errors import SwapPlanError
from lightcache_fx.simulator import Simulation, simulate, static_bytes, validate
from lightcache_fx.swap_planner import floor_of, plan_swaps
from lightcache_fx.workload import Link, Residence, Stay, Workload
from swap_cases import SLOW, covers, links, rates, workload, workloads

many = settings(max_examples=150, deadline=None, derandomize=True)


def run(work: Workload, *stays: Stay, resident: tuple[str, ...] = (), link: Link = SLOW) -> Simulation:
    residence = Residence(frozenset(resident), stays)
    validate(work, residence)
    return simulate(work, residence, link)


def stalls(simulation: Simulation) -> list[tuple[int, float, str, str]]:
    return [(stall.op, stall.seconds, stall.movable, stall.cause) for stall in simulation.steady.stalls]


# By hand -------------------------------------------------------------------------------------------------------------

PLAIN = workload("a 4 1 - -\nb 4 1 w -\nc 4 1 - -", sizes={"w": 4})


def test_issued_late() -> None:
    found = run(PLAIN, Stay("w", 1, 1, 1))
    assert (found.seconds, stalls(found)) == (16, [(1, 4, "w", "issued late")])
    assert (found.hidden, found.slowdown) == (0, pytest.approx(1 / 3))
    assert found.steady.stalls[0].name == "b"


def test_in_time() -> None:
    found = run(PLAIN, Stay("w", 0, 1, 1))
    assert (found.seconds, found.first.seconds, found.steady.stalls, found.hidden) == (12, 12, (), 1)
    assert (found.steady.to_device_bytes, found.steady.to_device_seconds) == (4, 4)
    assert found.bytes_by_op == (5, 5, 1)
    assert (found.peak_bytes, found.peak_op) == (5, 0)
    assert found.settled


def test_link_busy() -> None:
    work = workload("a 4 0 - -\nb 4 0 v,w -", sizes={"v": 3, "w": 4})
    found = run(work, Stay("v", 0, 1, 1), Stay("w", 0, 1, 1))
    assert (found.seconds, stalls(found)) == (11, [(1, 3, "w", "link busy")])
    assert found.hidden == pytest.approx(4 / 7)


def test_cold_resident() -> None:
    found = run(workload("a 1 0 v -\nb 3 0 w -", sizes={"v": 2, "w": 5}), resident=("v", "w"))
    assert [(stall.op, stall.seconds, stall.cause) for stall in found.first.stalls] == [(0, 2, "cold"), (1, 4, "cold")]
    assert (found.first.seconds, found.first.to_device_bytes, found.first.to_device_seconds) == (10, 7, 7)
    assert (found.seconds, found.steady.to_device_bytes, found.slowdown) == (4, 0, 0)


def test_around_the_period() -> None:
    """The last call of a period fetches for the first of the next; the first period has to do so itself."""
    work = workload("a 4 0 w -\nb 4 0 - -", sizes={"w": 4})
    found = run(work, Stay("w", 1, 2, 2))
    assert (found.seconds, found.first.seconds) == (8, 12)
    assert [(stall.op, stall.seconds, stall.cause) for stall in found.first.stalls] == [(0, 4, "cold")]
    assert found.first.to_device_bytes == 2 * found.steady.to_device_bytes == 8


def test_cold_carried_over_its_first_use() -> None:
    """Carried in behind its first read, so the first period's copy is for the second, and for no call before."""
    work = workload("a 1 0 - -\nb 1 0 w -\nc 1 0 - -\nd 1 0 w -", sizes={"w": 4})
    found = run(work, Stay("w", 2, 3, 5))
    assert [(stall.op, stall.seconds, stall.cause) for stall in found.first.stalls] == [
        (1, 3, "cold"), (3, 3, "issued late"),
    ]  # fmt: skip
    assert stalls(found) == [(3, 3, "w", "issued late")]


def test_queued_behind_cold() -> None:
    found = run(
        workload("a 1 0 - -\nb 1 0 w -\nc 1 0 v -", sizes={"v": 9, "w": 2}), Stay("w", 0, 1, 1), resident=("v",)
    )
    assert [(stall.op, stall.seconds, stall.cause) for stall in found.first.stalls] == [(1, 10, "cold")]
    assert stalls(found) == [(1, 1, "w", "issued late")]


def test_offload() -> None:
    work = workload("a 1 0 - s\nb 1 0 - -\nc 1 0 s -", sizes={"s": 5})
    found = run(work, Stay("s", 0, 0, 1, made=True, offloaded=True), Stay("s", 2, 2, 2))
    assert stalls(found) == [(1, 4, "s", "offload"), (2, 5, "s", "issued late")]
    assert found.seconds == 12
    assert (found.steady.from_device_bytes, found.steady.to_device_bytes) == (5, 5)
    assert (found.steady.from_device_seconds, found.first.to_device_bytes) == (5, 5)
    assert found.bytes_by_op == (5, 5, 5)


def test_offloads_queue() -> None:
    work = workload("a 1 0 - s,sb\nb 9 0 - -\nc 9 0 s,sb -", sizes={"s": 5, "sb": 3})
    made = [Stay(name, 0, 0, 0, made=True, offloaded=True) for name in ("s", "sb")]
    found = run(work, *made, Stay("s", 1, 2, 2), Stay("sb", 1, 2, 2), link=Link(1.0, 2.0, 0.5))
    assert stalls(found) == [(0, 5, "sb", "offload")]  # 5 / 2 + 0.5 + 3 / 2 + 0.5; the fetches take 5.5 + 3.5
    assert found.seconds == 24


def test_both_ways_at_once() -> None:
    work = workload("a 1 0 - s\nb 5 0 - -\nc 5 0 w -\nd 1 0 s -", sizes={"s": 5, "w": 5})
    found = run(work, Stay("s", 0, 0, 1, made=True, offloaded=True), Stay("w", 1, 2, 2), Stay("s", 2, 3, 3))
    assert (found.seconds, found.steady.stalls, found.hidden) == (12, (), 1)


def test_the_link_sets_the_pace() -> None:
    """10.1 s of copies in 10 s of computing, each begun 4 s early: that does not last, and the report knows."""
    lines = [f"op{i} 1 0 {'v' if i == 0 else 'w' if i == 5 else '-'} -" for i in range(10)]
    work = workload("\n".join(lines), sizes={"v": 50, "w": 51})
    found = run(work, Stay("v", 1, 10, 10), Stay("w", 6, 15, 15), link=Link(10.0, 1.0, 0.0))
    assert found.settled
    assert found.seconds == pytest.approx(10.1)


def test_each_period_starts_anew() -> None:
    found = run(replace(PLAIN, cyclic=False), Stay("w", 0, 1, 2), link=Link(0.5, 1.0, 0.0))
    assert (found.first.seconds, found.seconds) == (16, 16)


# Against the plainest simulation -------------------------------------------------------------------------------------


def plain_times(work: Workload, residence: Residence, link: Link, periods: int) -> list[float]:
    """When each period has ended; every stay of every period is an entry of its own."""
    count, sizes = len(work.ops), {name: movable.num_bytes for name, movable in work.movables.items()}
    copies: list[tuple[int, int, Stay, int]] = []  # issued before the call, order, stay, turn
    first_use = {name: reads[0] for name, reads in work.readers.items() if reads}
    cold = [
        (first_use[name], Stay(name, 0, first_use[name], periods * count))
        for name in residence.resident
        if name in first_use and work.movables[name].kind == "weight"
    ]
    for stay in residence.stays:
        if not stay.made and work.movables[stay.name].kind == "weight":
            rest = [
                g - count for g in range(max(stay.first, count), stay.end + 1) if stay.name in work.ops[g - count].reads
            ]
            cold += [(rest[0], replace(stay, begin=0, first=rest[0], end=stay.end - count))] if rest else []
    copies += [(-1, number, stay, 0) for number, (_, stay) in enumerate(sorted(cold, key=lambda e: (e[0], e[1].name)))]
    made_first = {name: writes[0] for name, writes in work.writers.items() if writes}
    for turn in range(periods):
        for number, stay in enumerate(residence.stays):
            if not stay.made and (turn or stay.begin >= made_first.get(stay.name, 0)):
                copies.append((turn * count + stay.begin, number, stay, turn))
    copies.sort(key=lambda entry: entry[:2])
    now = to_free = from_free = 0.0
    arrivals: dict[int, list[float]] = defaultdict(list)
    releases: dict[int, list[float]] = defaultdict(list)
    ends: list[float] = []
    for g in range(periods * count):
        while copies and copies[0][0] <= g:
            _, _, stay, turn = copies.pop(0)
            to_free = max(now, to_free) + link.arriving(sizes[stay.name])
            arrivals[turn * count + stay.first].append(to_free)
        now = max([now, *arrivals[g]]) + work.ops[g % count].seconds
        for stay in residence.stays:
            if stay.offloaded and stay.begin == g % count:
                from_free = max(now, from_free) + link.leaving(sizes[stay.name])
                releases[g - stay.begin + stay.end].append(from_free)
        now = max([now, *releases[g]])
        if (g + 1) % count == 0:
            ends.append(now)
    return ends


@many
@given(workloads(), links, st.integers(0, 20), st.booleans(), st.booleans())
def test_as_the_plainest(work: Workload, link: Link, extra: int, wrap: bool, hold: bool) -> None:
    budget = floor_of(work)[0] + extra
    plan = plan_swaps(work, budget, link, wrap=wrap, hold=hold)
    found, residence = plan.simulation, plan.residence
    assert found.settled
    ends = plain_times(work, residence, link, 60)
    assert found.first.seconds == pytest.approx(ends[0], abs=1e-9)
    # Behind by so little a period that 60 do not show it: then the link alone sets the pace.
    copying = max(found.steady.to_device_seconds, found.steady.from_device_seconds)
    assert found.seconds == pytest.approx(max(ends[-1] - ends[-2], copying), abs=1e-9)
    assert found.seconds == pytest.approx(work.seconds + found.steady.stalled_seconds, abs=1e-9)
    assert 0 <= found.hidden <= 1


@many
@given(workloads(), links, st.integers(0, 20), st.booleans())
def test_every_byte(work: Workload, link: Link, extra: int, hold: bool) -> None:
    residence = plan_swaps(work, floor_of(work)[0] + extra, link, hold=hold).residence
    found = simulate(work, residence, link)
    sizes = {name: movable.num_bytes for name, movable in work.movables.items()}
    assert found.steady.to_device_bytes == sum(sizes[stay.name] for stay in residence.stays if not stay.made)
    assert found.steady.from_device_bytes == sum(sizes[stay.name] for stay in residence.stays if stay.offloaded)
    for index, op in enumerate(work.ops):
        there = [stay.name for stay in residence.stays if covers(stay, index, len(work.ops))]
        assert len(there) == len(set(there))
        held = sum(sizes[name] for name in {*there, *residence.resident})
        assert static_bytes(work, residence)[index] == op.live_bytes + held


@many
@given(workloads(), links, st.integers(0, 20), st.booleans(), rates, rates)
def test_a_faster_link_is_not_slower(
    work: Workload, link: Link, extra: int, hold: bool, to_device: float, from_device: float
) -> None:
    """The same residence on another link."""
    residence = plan_swaps(work, floor_of(work)[0] + extra, link, hold=hold).residence
    slow = simulate(work, residence, link)
    fast = simulate(work, residence, Link(link.to_device + to_device, link.from_device + from_device, link.latency))
    assert fast.seconds <= slow.seconds + 1e-9
    assert fast.first.seconds <= slow.first.seconds + 1e-9


# What is refused -----------------------------------------------------------------------------------------------------

SLOTS = workload("a 1 0 w s\nb 1 0 s -\nc 1 0 w,s -", sizes={"w": 1, "s": 1})
W, MADE, FETCHED = Stay("w", 2, 2, 3), Stay("s", 0, 0, 0, made=True, offloaded=True), Stay("s", 1, 1, 2)


@pytest.mark.parametrize(
    ("stays", "says"),
    [
        ([MADE, FETCHED], "call 0 (a) reads 'w', which is not on the device"),
        ([Stay("s", 0, 0, 0, made=True), W], "call 1 (b) reads 's', which is not on the device"),
        ([MADE, FETCHED, replace(W, end=2)], "call 0 (a) reads 'w', which is not on the device"),
        ([MADE, W, FETCHED], "in order of begin"),
        ([MADE, Stay("w", 1, 1, 3), FETCHED], "copied for call 1 (b), which does not read it"),
        ([MADE, FETCHED, Stay("w", 2, 3, 3)], "call 2 (c) reads 'w' before"),
        ([MADE, Stay("w", 0, 0, 2), FETCHED, W], "overlaps"),
        ([MADE, Stay("w", 0, 0, 0), FETCHED, W], "overlaps"),
        ([Stay("s", 0, 0, 1, made=True, offloaded=True), FETCHED, W], "overlaps"),
        ([Stay("s", 0, 0, 2, made=True, offloaded=True), W], "nothing fetches it before it is made again"),
        ([replace(MADE, offloaded=False), FETCHED, W], "never copied from the device since it was made"),
        ([Stay("s", 1, 1, 2, made=True), W], "call 1 (b) does not make it"),
        ([FETCHED, W], "call 0 (a) makes 's', which begins no stay"),
        ([MADE, replace(FETCHED, offloaded=True), W], "came from where it is to be copied to"),
        ([MADE, FETCHED, Stay("w", 2, 2, 5)], "end < begin + 3"),
        ([MADE, FETCHED, Stay("x", 2, 2, 2)], "no such movable"),
    ],
)  # fmt: skip
def test_refused(stays: list[Stay], says: str) -> None:
    validate(SLOTS, Residence(frozenset(), (MADE, FETCHED, W)))
    with pytest.raises(SwapPlanError) as caught:
        validate(SLOTS, Residence(frozenset(), tuple(stays)))
    assert says in str(caught.value)


def test_resident_is_refused() -> None:
    with pytest.raises(SwapPlanError, match="resident already"):
        validate(SLOTS, Residence(frozenset({"s", "w"}), (W,)))
    with pytest.raises(SwapPlanError, match="no such movable"):
        validate(SLOTS, Residence(frozenset({"s", "w", "x"})))
    with pytest.raises(SwapPlanError, match="next period"):
        validate(replace(SLOTS, cyclic=False), Residence(frozenset({"s"}), (W,)))


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (workload("a 1 0 s s", sizes={"s": 1}), "both reads and makes 's'"),
        (workload("a 1 0 - w", sizes={"w": 1}), "makes the weight 'w'"),
        (workload("a 1 0 s -", sizes={"s": 1}), "reads the slot 's' unmade"),
        (workload("a 1 0 s -\nb 1 0 - s", sizes={"s": 1}, cyclic=False), "reads the slot 's' unmade"),
        (workload("a 1 0 w -", sizes={}), "uses 'w', which is no movable"),
    ],
)
def test_contradictions(work: Workload, says: str) -> None:
    with pytest.raises(SwapPlanError, match=says):
        validate(work, Residence(frozenset(work.movables)))
