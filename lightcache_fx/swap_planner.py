"""Which weights and cached features are on the device when, so that a budget is kept at the least waiting.

Between two uses a movable stays or is away. What stays takes memory from copying ahead; what is away takes time of the
link. From everything away, candidates are made for slower and slower links: at each, the plan is simulated, and where
computing waits for a busy stretch of the link, as many bytes of that stretch as would have filled the wait stay on the
device instead, spread evenly over it. `swap_placement` times the copies, and the simulator chooses. No candidate looks
at the link that is asked about, and a simulation is never slower with a faster link, so neither is a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightcache_fx.errors import BudgetError
from lightcache_fx.range_max import RangeMax
from lightcache_fx.simulator import Engines, Simulation, simulate, static_bytes, validate
from lightcache_fx.swap_checks import check_workload
from lightcache_fx.swap_placement import Placement, Request, Runs, Space, place
from lightcache_fx.units import format_bytes
from lightcache_fx.workload import Link, Residence, Workload

_RUNGS = ((0.125, 2), (0.25, 2), (0.5, 2), (1.0, 2), (2.0, 2), (8.0, 2), (8.0, 1), (8.0, 0))
"""Links for which candidates are made, as the time that copying everything away takes over the time of computing; and
the movables of typical size that room is left for, for copying ahead."""
_LEADS = (0.5, 1.0)
"""The share of a movable's bytes that may be held before they are wanted."""
_FEW = 2000
"""Gaps; where there are no more, candidates are made with each lead."""
_ROUNDS = 2
_PERIODS = 6
_FILLS = 4
_SMALL_SHARE = 0.02
"""Of the room above the floor: what the smallest movables may take, whose copies are mostly latency."""
_MISSES = 400
"""So many times in a row without room, and no more is looked for."""


@dataclass(frozen=True)
class SwapPlan:
    """Where everything is, and what that costs.

    Attributes:
        residence: what is resident, and the stays of all else.
        simulation: of it.
        budget: bytes on the device that were allowed.
        floor_bytes: the least that any plan could have.
        floor_op: number of the call that sets it.
        resident_bytes: of what never leaves.
        movable_bytes: of all that could.
    """

    residence: Residence
    simulation: Simulation
    budget: int
    floor_bytes: int
    floor_op: int
    resident_bytes: int
    movable_bytes: int

    @property
    def slowdown(self) -> float:
        """Time that is waited, over the time with everything on the device."""
        return self.simulation.slowdown

    @property
    def peak_bytes(self) -> int:
        """The most on the device."""
        return self.simulation.peak_bytes

    def as_dict(self) -> dict[str, Any]:
        """The facts, to print or to store."""
        steady = self.simulation.steady
        return {
            "budget_bytes": self.budget,
            "peak_bytes": self.peak_bytes,
            "peak_op": self.simulation.peak_op,
            "floor_bytes": self.floor_bytes,
            "floor_op": self.floor_op,
            "movable_bytes": self.movable_bytes,
            "resident_bytes": self.resident_bytes,
            "resident": len(self.residence.resident),
            "stays": len(self.residence.stays),
            "compute_seconds": self.simulation.compute_seconds,
            "period_seconds": self.simulation.seconds,
            "first_period_seconds": self.simulation.first.seconds,
            "slowdown": self.slowdown,
            "stalls": len(steady.stalls),
            "stalled_seconds": steady.stalled_seconds,
            "to_device_bytes": steady.to_device_bytes,
            "from_device_bytes": steady.from_device_bytes,
            "to_device_seconds": steady.to_device_seconds,
            "from_device_seconds": steady.from_device_seconds,
            "hidden": self.simulation.hidden,
        }


def floor_of(workload: Workload) -> tuple[int, int]:
    """The least that the device must hold at once, and the first call during which it is that much."""
    sizes = {name: movable.num_bytes for name, movable in workload.movables.items()}
    needs = [op.live_bytes + sum(sizes[name] for name in {*op.reads, *op.writes}) for op in workload.ops]
    most = max(needs, default=0)
    return most, needs.index(most) if needs else 0


def plan_swaps(workload: Workload, budget: int, link: Link, *, wrap: bool = True, hold: bool = True) -> SwapPlan:
    """Keep the budget at the least predicted time, and of that at the fewest bytes copied.

    Args:
        workload: what is computed.
        budget: bytes on the device, at any moment.
        link: the way there and back.
        wrap: whether something may be on the device, or on its way there, from one step to the next without being
            resident.
        hold: whether something may stay between two uses; without, everything leaves after each.

    Raises:
        BudgetError: not even one call at a time fits.
        SwapPlanError: the workload contradicts itself.
    """
    check_workload(workload)
    floor, floor_op = floor_of(workload)
    if budget < floor:
        raise BudgetError(_explain_floor(workload, budget, floor, floor_op), floor)
    total = sum(movable.num_bytes for movable in workload.movables.values())
    if hold and total + max((op.live_bytes for op in workload.ops), default=0) <= budget:
        residence = Residence(frozenset(workload.movables))
    elif not workload.ops:
        residence = Residence(frozenset())
    else:
        residence = _best(workload, budget, link, wrap=wrap, hold=hold).residence
    validate(workload, residence)
    simulation = simulate(workload, residence, link)
    resident = sum(workload.movables[name].num_bytes for name in residence.resident)
    return SwapPlan(residence, simulation, budget, floor, floor_op, resident, total)


def _explain_floor(workload: Workload, budget: int, floor: int, index: int) -> str:
    op = workload.ops[index]
    movables = sum(workload.movables[name].num_bytes for name in {*op.reads, *op.writes})
    program = next(step.program for step, end in zip(workload.steps, workload.starts[1:], strict=True) if index < end)
    return (
        f"budget: {format_bytes(budget)} is less than the {format_bytes(floor)} that call {index} ({op.name}) of the"
        f" {program} program needs on the device at once: {format_bytes(op.live_bytes)} of activations and"
        f" {format_bytes(movables)} of weights and cached values; raise the budget to that, cut its activations into"
        f" more chunks, or load the model in half precision"
    )


@dataclass(frozen=True)
class _Found:
    """A plan, and what it is chosen by."""

    residence: Residence
    held: bytearray
    request: Request
    stalled: float
    key: tuple[float, int]


def _best(workload: Workload, budget: int, link: Link, *, wrap: bool, hold: bool) -> _Found:
    """The best candidate; with `wrap`, that without it is one."""
    space = Space(workload, wrap=wrap)
    search = _Search(space, budget)
    best: _Found | None = None
    seen: bytearray | None = None
    for held in search.candidates() if hold else [space.nothing_held()]:
        if held == seen:
            continue
        seen = held
        found = _evaluated(space, held, Request(budget, link, merge=hold))
        if best is not None and not best.stalled and found.stalled:
            break  # holding more takes more room from copying ahead than it saves
        best = found if best is None or found.key < best.key else best
    if best is None:
        raise AssertionError("there is always the candidate that holds nothing")
    if best.stalled and wrap:
        best = min(best, _best(workload, budget, link, wrap=False, hold=hold), key=lambda found: found.key)
    for _ in range(_FILLS if hold and not best.stalled else 0):
        filled = _evaluated(space, search.filled(best), best.request)
        if filled.key >= best.key:
            break
        best = filled  # with fewer copies the link can begin later, which may leave room for more
    return best


def _evaluated(space: Space, held: bytearray, request: Request) -> _Found:
    """The candidate with slots leaving within their step and, if that is something else, whenever it suits."""
    placements = [place(space, held, replace(request, within_step=True))]
    if space.wrap and placements[0].cut_short:
        placements.append(place(space, held, request))
    results = []
    for placement, within_step in zip(placements, (True, False), strict=False):
        _, steady, _, _ = Engines(space.workload, placement.residence, request.link).settle(_PERIODS)
        seconds = round(steady.stalled_seconds / (space.clock[-1] or 1.0), 12)
        key = (seconds, steady.to_device_bytes + steady.from_device_bytes)
        asked = replace(request, within_step=within_step)
        results.append(_Found(placement.residence, placement.held, asked, steady.stalled_seconds, key))
    return min(results, key=lambda found: found.key)


class _Search:
    """Makes candidates: which gaps are held."""

    def __init__(self, space: Space, budget: int) -> None:
        self.space, self.budget = space, budget
        self.away = sum(gap.num_bytes for gap in space.gaps if not gap.dead)
        self.typical = _typical([gap.num_bytes for gap in space.gaps if not gap.dead])

    def candidates(self) -> Iterator[bytearray]:
        """From nothing held to as much as fits, for slower and slower links."""
        held = self.space.nothing_held()
        yield held
        held = self._small_ones(held)
        yield held
        small = held
        for lead in _LEADS if len(self.space.gaps) <= _FEW else _LEADS[:1]:
            held = small
            for share, reserve in _RUNGS:
                rate = self.away / (share * self.space.clock[-1] or 1.0)
                request = Request(self.budget, Link(rate or 1.0, rate or 1.0, 0.0))
                held = self._for_link(held, request, reserve * self.typical, lead)
                yield held

    def _small_ones(self, held: bytearray) -> bytearray:
        """The smallest movables resident, as long as that takes little of the room above the floor."""
        held = bytearray(held)
        runs = Runs(self.space, held, Request(self.budget, Link(1.0, 1.0)))
        left = int(_SMALL_SHARE * (self.budget - max(runs.base)))
        movables = self.space.workload.movables
        for name in sorted(self.space.of, key=lambda name: movables[name].num_bytes):
            left -= movables[name].num_bytes
            if left < 0:
                break
            for number in self.space.of[name]:
                held[number] = 1
        return held

    def _for_link(self, held: bytearray, request: Request, reserve: int, lead: float) -> bytearray:
        """More held, until nothing waits with this link, or nothing more fits, or holding more is slower."""
        before = float("inf")
        best = held
        for _ in range(_ROUNDS):
            placement = place(self.space, held, request)
            engines = Engines(self.space.workload, placement.residence, request.link)
            _, steady, _, _ = engines.settle(_PERIODS)
            if steady.stalled_seconds >= before:
                break
            before, best = steady.stalled_seconds, placement.held
            wanted = _bytes_to_save(engines, placement, request.link)
            held = self._spread(placement, wanted, request, reserve, lead)
            if held == placement.held:
                break
        return best

    def _spread(
        self, placement: Placement, wanted: list[tuple[int, float]], request: Request, reserve: int, lead: float
    ) -> bytearray:
        """Hold gaps so that, counted through, the bytes held keep up with the bytes wanted of the copies in order."""
        space, held = self.space, bytearray(placement.held)
        runs = Runs(space, held, request)
        memory = RangeMax(runs.base)
        owed, misses = 0.0, 0
        for number, share in wanted:
            gap = space.gaps[number]
            owed += share
            if owed <= 0 or owed < (1 - lead) * gap.num_bytes or held[number]:
                continue
            unit = space.unit(number, held)
            ranges = [(runs.left[other], space.gaps[other].ahead) for other in unit]
            if max(memory.most(*some) for some in ranges) + gap.num_bytes + reserve > self.budget:
                misses += 1
                if misses > _MISSES:
                    break
                continue
            misses = 0
            for other, some in zip(unit, ranges, strict=True):
                held[other] = 1
                memory.add(*some, gap.num_bytes)
            owed -= gap.num_bytes
        return held

    def filled(self, found: _Found) -> bytearray:
        """What else fits beside every stay as it is, the largest first: fewer copies, and none that begins later."""
        space = self.space
        placement = place(space, found.held, found.request)
        held = bytearray(placement.held)
        memory = RangeMax(static_bytes(space.workload, placement.residence))
        away = [number for number in placement.free if not space.gaps[number].dead]
        for number in sorted(away, key=lambda number: (-space.gaps[number].num_bytes, number)):
            if held[number]:
                continue
            unit, size = space.unit(number, held), space.gaps[number].num_bytes
            ranges = [placement.free[other] for other in unit]
            if max(memory.most(*some) for some in ranges) + size <= self.budget:
                for other, some in zip(unit, ranges, strict=True):
                    held[other] = 1
                    memory.add(*some, size)
        return held


def _typical(sizes: list[int]) -> int:
    """The size such that half of the bytes are in larger ones."""
    left = sum(sizes) / 2
    for size in sorted(sizes):
        left -= size
        if left <= 0:
            return size
    return 0


def _bytes_to_save(engines: Engines, placement: Placement, link: Link) -> list[tuple[int, float]]:
    """Of each copy's gap, in order of copies: its share of the bytes without which nothing would have waited.

    What a wait would have carried is shared by the copies of the busy stretch that led to it, from its start or from
    the copy that was waited for before.
    """
    copies = engines.copies
    place_of = {copy.stay: place for place, copy in enumerate(copies)}
    sizes = [engines.num_bytes(copy.stay) for copy in copies]
    wanted = [0.0] * len(copies)
    waited = {place_of[stay] for stay, _ in engines.waits if stay in place_of}
    for stay, seconds in engines.waits:
        if stay not in place_of:
            continue
        last = place = place_of[stay]
        stretch = [last]
        while copies[place].queued and len(stretch) < len(copies):
            place = (place - 1) % len(copies)
            if place in waited:
                break
            stretch.append(place)
        bytes_there = sum(sizes[place] for place in stretch) or 1
        for place in stretch:
            wanted[place] += seconds * link.to_device * sizes[place] / bytes_there
    return [(placement.numbers[copy.stay], wanted[place]) for place, copy in enumerate(copies)]
