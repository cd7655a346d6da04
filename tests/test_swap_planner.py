"""Plans computed by hand, and what holds for every plan of random workloads."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightcache_fx.errors import BudgetError, SwapPlanError
from lightcache_fx.simulator import Engines
from lightcache_fx.swap_placement import Request, Runs, Space
from lightcache_fx.swap_planner import SwapPlan, floor_of, plan_swaps
from lightcache_fx.workload import Link, Residence, Stay, Workload
from swap_cases import SLOW, covers, links, workload, workloads

many = settings(max_examples=200, deadline=None, derandomize=True)
extras = st.integers(0, 25)


def stalled(plan: SwapPlan) -> float:
    return plan.simulation.steady.stalled_seconds


def stays(plan: SwapPlan, name: str) -> list[tuple[int, int, int]]:
    return [(stay.begin, stay.first, stay.end) for stay in plan.residence.stays if stay.name == name]


# By hand -------------------------------------------------------------------------------------------------------------


def test_two_layers_of_a_step() -> None:
    """Two weights, and memory for one and the calls: each is copied while the call without weights runs."""
    work = workload("a 1 1 v -\nb 9 1 - -\nc 1 1 w -\nd 9 1 - -", sizes={"v": 4, "w": 4})
    plan = plan_swaps(work, 5, SLOW)
    assert plan.residence == Residence(frozenset(), (Stay("w", 1, 2, 2), Stay("v", 3, 4, 4)))
    assert (plan.simulation.seconds, plan.slowdown, plan.peak_bytes) == (20, 0, 5)
    assert plan.simulation.first.seconds == 24
    assert plan.simulation.steady.to_device_bytes == 8


def test_first_calls_of_a_step_without_wrapping() -> None:
    """Nothing is there when a step starts, so its first call waits for its weight."""
    work = workload("a 1 1 v -\nb 9 1 - -\nc 1 1 w -\nd 9 1 - -", sizes={"v": 4, "w": 4})
    plan = plan_swaps(work, 5, SLOW, wrap=False)
    assert plan.residence == Residence(frozenset(), (Stay("v", 0, 0, 0), Stay("w", 1, 2, 2)))
    assert [(stall.op, stall.seconds, stall.cause) for stall in plan.simulation.steady.stalls] == [
        (0, 4, "issued late")
    ]
    assert plan.slowdown == pytest.approx(4 / 20)


REUSED = ("a 1 2 u -\nb 1 2 v -\nc 1 2 w -", "d 5 9 - -", "e 5 4 - -")


def test_reuse_steps_hide_the_next_full_step() -> None:
    """Three weights of 4 s in 3 s of computing; `d` leaves no room, behind it two are copied beside `e`."""
    work = workload(*REUSED, sizes={"u": 4, "v": 4, "w": 4})
    plan = plan_swaps(work, 12, SLOW, hold=False)
    assert [stays(plan, name) for name in "uvw"] == [[(4, 5, 5)], [(4, 6, 6)], [(1, 2, 2)]]
    # u and v take 8 s from 8 s on, at most: v waits 2 s (13 + 1 → 16), and w, from 16 - 2 on, another 3 s.
    assert [(stall.op, stall.seconds, stall.cause) for stall in plan.simulation.steady.stalls] == [
        (1, 2, "link busy"), (2, 3, "link busy"),
    ]  # fmt: skip
    later = plan_swaps(work, 12, SLOW, hold=False, wrap=False)
    assert later.slowdown == pytest.approx(10 / 13)  # 4 + 3 + 3


def test_holds_what_fits() -> None:
    """Beside `e` there is room for three, beside `d` for two: two stay for good, and the third is copied in time."""
    work = workload(*REUSED, sizes={"u": 4, "v": 4, "w": 4})
    plan = plan_swaps(work, 17, SLOW)
    assert plan.residence == Residence(frozenset("uv"), (Stay("w", 4, 7, 7),))
    assert (stalled(plan), plan.resident_bytes, plan.simulation.steady.to_device_bytes) == (0, 8, 4)
    less = plan_swaps(work, 16, SLOW)
    assert less.residence == Residence(frozenset("u"), (Stay("v", 4, 6, 6), Stay("w", 4, 7, 7)))
    # From 8 s on, v takes until 12 and w until 16; c could start at 15.
    assert [(stall.op, stall.seconds, stall.cause) for stall in less.simulation.steady.stalls] == [(2, 1, "link busy")]


def test_a_slot_leaves_and_comes_back() -> None:
    """Made in the full step, away while `b` takes all the memory; it stays until its copy has ended, in `x`."""
    work = workload("a 1 1 - s\nx 6 1 - -\nb 1 6 - -\ny 6 1 - -", "c 1 1 s -", sizes={"s": 5})
    plan = plan_swaps(work, 6, SLOW, hold=False)
    made = Stay("s", 0, 0, 1, made=True, offloaded=True)
    assert plan.residence.stays in ((made, Stay("s", 3, 4, 4)), (made, Stay("s", 2, 4, 4)))
    assert (plan.slowdown, plan.simulation.steady.from_device_bytes) == (0, 5)
    assert plan.peak_bytes == 6
    assert plan_swaps(work, 6, SLOW).residence == plan.residence
    room = plan_swaps(work, 11, SLOW)
    assert room.residence == Residence(frozenset({"s"}))


def test_a_slot_leaves_at_once() -> None:
    """Its memory is free as soon as its copy has ended, though nothing else wants it so early."""
    work = workload("a 1 1 - s\nw 1 1 - -\nx 1 1 - -\ny 9 1 - -\nb 1 6 - -\nz 9 1 - -\nc 1 1 s -", sizes={"s": 5})
    plan = plan_swaps(work, 6, Link(1.0, 2.5, 0.0))
    assert stays(plan, "s")[0] == (0, 0, 2)
    assert plan.slowdown == 0


def test_a_slot_that_has_no_room_to_leave_in() -> None:
    """`b` needs its memory at once, so computing waits behind `a` for the copy from the device."""
    work = workload("a 1 1 - s\nb 9 6 - -\nc 6 1 - -\nd 1 1 s -", sizes={"s": 5})
    plan = plan_swaps(work, 6, SLOW)
    assert [(stall.op, stall.seconds, stall.cause) for stall in plan.simulation.steady.stalls] == [(0, 5, "offload")]
    assert stays(plan, "s") == [(0, 0, 0), (2, 3, 3)]


def test_a_slot_whose_readers_are_near_stays() -> None:
    work = workload("a 1 1 - s\nb 1 1 s -\nc 1 1 s -\nd 1 6 - -", sizes={"s": 5})
    plan = plan_swaps(work, 6, SLOW)
    assert plan.residence.stays == (Stay("s", 0, 0, 2, made=True),)
    assert plan.slowdown == 0


def test_what_stays_is_spread() -> None:
    """The link has time for six weights of eight, and memory to copy two ahead: the two that stay are apart."""
    work = workload("\n".join(f"o{i} 3 0 w{i} -" for i in range(8)), sizes={f"w{i}": 4 for i in range(8)})
    plan = plan_swaps(work, 20, SLOW)
    assert (plan.slowdown, plan.simulation.steady.to_device_seconds) == (0, 24)
    first, second = sorted(int(name[1:]) for name in plan.residence.resident)
    assert 2 <= second - first <= 6
    assert stalled(plan_swaps(work, 20, SLOW, hold=False)) == pytest.approx(8)


def test_fewer_copies_where_nothing_waits() -> None:
    """What is left of the memory saves copies, though the link could do them all."""
    work = workload("\n".join(f"o{i} 9 0 w{i} -" for i in range(8)), sizes={f"w{i}": 4 for i in range(8)})
    plan = plan_swaps(work, 28, SLOW)
    assert (plan.slowdown, plan.resident_bytes) == (0, 24)


def test_below_the_floor() -> None:
    work = workload("a 1 1 - -", "b 1 3 w,v s\nc 1 9 - -", sizes={"w": 4, "v": 5, "s": 6})
    assert floor_of(work) == (18, 1)
    with pytest.raises(BudgetError) as caught:
        plan_swaps(work, 17, SLOW)
    assert caught.value.reached == 18
    assert str(caught.value) == (
        "budget: 17 B is less than the 18 B that call 1 (b) of the p1 program needs on the device at once: 3 B of"
        " activations and 15 B of weights and cached values; raise the budget to that, cut its activations into more"
        " chunks, or load the model in half precision"
    )
    assert plan_swaps(work, 18, SLOW).peak_bytes == 18


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(SwapPlanError, match="makes the weight"):
        plan_swaps(workload("a 1 0 - w", sizes={"w": 1}), 9, SLOW)


def test_nothing_to_plan() -> None:
    assert plan_swaps(Workload((), {}), 0, SLOW).simulation.seconds == 0
    plan = plan_swaps(workload("a 0 0 v -\nb 0 1 w -", sizes={"v": 2, "w": 2}), 3, SLOW)
    assert plan.simulation.seconds == 4
    assert plan.slowdown == 0  # there is nothing to compare with


def test_facts() -> None:
    work = workload(*REUSED, sizes={"u": 4, "v": 4, "w": 4})
    facts = plan_swaps(work, 17, SLOW).as_dict()
    assert facts == {
        "budget_bytes": 17, "peak_bytes": 17, "peak_op": 3, "floor_bytes": 9, "floor_op": 3, "movable_bytes": 12,
        "resident_bytes": 8, "resident": 2, "stays": 1, "compute_seconds": 13, "period_seconds": 13,
        "first_period_seconds": 23, "slowdown": 0, "stalls": 0, "stalled_seconds": 0, "to_device_bytes": 4,
        "from_device_bytes": 0, "to_device_seconds": 4, "from_device_seconds": 0, "hidden": 1,
    }  # fmt: skip


# Whatever the workload -----------------------------------------------------------------------------------------------


@many
@given(workloads(), links, extras, st.booleans(), st.booleans())
def test_sound(work: Workload, link: Link, extra: int, wrap: bool, hold: bool) -> None:
    """Read on the device, within the budget at every call, copied for somebody: said once more and independently."""
    budget, count = floor_of(work)[0] + extra, len(work.ops)
    plan = plan_swaps(work, budget, link, wrap=wrap, hold=hold)
    sizes = {name: movable.num_bytes for name, movable in work.movables.items()}
    there: list[Counter[str]] = []
    for index, op in enumerate(work.ops):
        present = Counter(dict.fromkeys(plan.residence.resident, 1))
        present.update(stay.name for stay in plan.residence.stays if covers(stay, index, count))
        assert max(present.values(), default=1) == 1
        assert op.live_bytes + sum(sizes[name] for name in present) <= budget
        assert {*op.reads, *op.writes} <= set(present)
        there.append(present)
    for stay in plan.residence.stays:
        reads = [index for index in range(count) if stay.name in work.ops[index].reads]
        assert stay.made or any(covers(stay, index, count, since=stay.first) for index in reads)
        assert not any(
            covers(stay, index, count) and not covers(stay, index, count, since=stay.first) for index in reads
        )
        if stay.made:
            assert stay.name in work.ops[stay.begin].writes
        if not work.cyclic:
            assert stay.end < count
        if not wrap:
            step = [sum(start <= index for start in work.starts) for index in (stay.begin, stay.end)]
            assert step[0] == step[1]
            assert stay.end < count


@many
@given(workloads(), links, extras, st.booleans(), st.booleans(), st.sampled_from([1.1, 1.5, 2.0, 4.0, 16.0]))
def test_more_bandwidth_is_not_slower(
    work: Workload, link: Link, extra: int, wrap: bool, hold: bool, times: float
) -> None:
    budget = floor_of(work)[0] + extra
    slow = plan_swaps(work, budget, link, wrap=wrap, hold=hold)
    for faster in (
        Link(link.to_device * times, link.from_device * times, link.latency),
        Link(link.to_device * times, link.from_device, link.latency),
        Link(link.to_device, link.from_device * times, link.latency / times),
    ):
        assert stalled(plan_swaps(work, budget, faster, wrap=wrap, hold=hold)) <= stalled(slow) + 1e-9


@many
@given(workloads(), links, extras, st.integers(1, 12))
def test_more_memory_is_not_slower(work: Workload, link: Link, extra: int, more: int) -> None:
    """Not guaranteed: candidates depend on the budget. It holds for all these."""
    budget = floor_of(work)[0] + extra
    assert stalled(plan_swaps(work, budget + more, link)) <= stalled(plan_swaps(work, budget, link)) + 1e-9


@many
@given(workloads(), links, extras)
def test_more_freedom_is_not_slower(work: Workload, link: Link, extra: int) -> None:
    budget = floor_of(work)[0] + extra
    plan = plan_swaps(work, budget, link)
    for less in ({"wrap": False}, {"hold": False}, {"wrap": False, "hold": False}):
        assert stalled(plan) <= stalled(plan_swaps(work, budget, link, **less)) + 1e-9


def test_the_plan_within_steps_is_a_candidate() -> None:
    """One where what is found across steps is slower than what is found within them."""
    idle = "\n".join(f"i{i} 0 0 - -" for i in range(4))
    sizes = {"w0": 4, "w1": 5, "w2": 1, "w3": 1}
    work = workload("a 0 0 w0,w3 -", f"b 0 0 w1 -\nc 0 0 w3 -\n{idle}", sizes=sizes, cyclic=False)
    link = Link(0.25, 0.25, 0.0)
    assert stalled(plan_swaps(work, 9, link)) <= stalled(plan_swaps(work, 9, link, wrap=False)) == 28


@many
@given(workloads(), links, extras)
@example(
    workload(
        "a 0 0 w0,w2 -",
        "b 0 0 w1 s\nc 0 0 - -\nd 1 0 - -\ne 0 0 w2 -\nf 1 0 - -",
        sizes={"w0": 1, "w1": 1, "w2": 7, "w3": 1, "w4": 1, "s": 2},
    ),
    Link(8.0, 0.25, 0.0),
    1,
)
def test_no_needless_copy(work: Workload, link: Link, extra: int) -> None:
    """Where nothing waits, nothing that is copied would have had room to stay instead."""
    work = replace(work, cyclic=True)
    budget, count = floor_of(work)[0] + extra, len(work.ops)
    plan = plan_swaps(work, budget, link)
    for stay in plan.residence.stays if stalled(plan) == 0 else ():
        mine = [other for other in plan.residence.stays if other.name == stay.name]
        size = work.movables[stay.name].num_bytes
        away = []
        index = stay.begin - 1
        while not any(covers(other, index % count, count) for other in mine):
            away.append(index % count)
            index -= 1
        used = [plan.simulation.bytes_by_op[place] for place in away]
        assert stay.made or max(used, default=0) + size > budget


@many
@given(workloads(), links, extras)
def test_the_same_again(work: Workload, link: Link, extra: int) -> None:
    budget = floor_of(work)[0] + extra
    again = Workload(work.steps, dict(work.movables), work.cyclic)
    assert plan_swaps(work, budget, link) == plan_swaps(again, budget, link)


@many
@given(workloads(), links)
def test_everything_fits(work: Workload, link: Link) -> None:
    most = max(op.live_bytes for op in work.ops) + sum(movable.num_bytes for movable in work.movables.values())
    for budget in (most, 10 * most):
        plan = plan_swaps(work, budget, link)
        assert plan.residence == Residence(frozenset(work.movables))
        assert (plan.slowdown, plan.simulation.steady.to_device_bytes) == (0, 0)


@many
@given(workloads(), extras, st.booleans(), st.booleans())
def test_a_link_that_takes_no_time(work: Workload, extra: int, wrap: bool, hold: bool) -> None:
    plan = plan_swaps(work, floor_of(work)[0] + extra, Link(math.inf, math.inf, 0.0), wrap=wrap, hold=hold)
    assert plan.slowdown == 0
    assert plan.simulation.seconds == pytest.approx(work.seconds)


@many
@given(workloads(), links, extras)
def test_latest_changes_no_start(work: Workload, link: Link, extra: int) -> None:
    """Putting copies off to where the link needs them takes the time of copying as early as memory allows."""
    space = Space(work, wrap=True)
    runs = Runs(space, space.nothing_held(), Request(floor_of(work)[0] + extra, link, within_step=True))
    early, late = runs.earliest(), runs.latest()
    both = [runs.placement(early), runs.placement({n: max(early[n], late[n]) for n in runs.fetched})]
    first, second = (Engines(work, placement.residence, link).settle(40)[1] for placement in both)
    assert second.seconds == pytest.approx(first.seconds, abs=1e-9)
    assert second.to_device_bytes == first.to_device_bytes
