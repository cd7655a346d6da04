"""The last call of a pipeline's stage: behind its computing flows in what the next stage reads first."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lightcache_fx.passes.insert_transfers import LocalStay, Transfers
from lightcache_fx.plan import Plan
from lightcache_fx.schedule import program_name
from lightcache_fx.simulator import Engines, static_bytes
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.workload import Link, Residence, Stay


@dataclass(frozen=True)
class HandOver:
    """What the last call of a stage copies.

    Attributes:
        transfers: its own, less what it would fetch for a later call of its model, and with what the next stage needs;
            no weight of its own outlasts its last use.
        sizes: bytes on the device of each of the next stage's weights that it fetches, in the order of their need.
        peak_bytes: the most on the device during the call; never more than the plan's budget.
        in_time: names of those whose copies have ended when the call has, by prediction.
    """

    transfers: Transfers
    sizes: Mapping[str, int]
    peak_bytes: int
    in_time: frozenset[str]

    @property
    def num_bytes(self) -> int:
        """Of all weights that it fetches for the next stage."""
        return sum(self.sizes.values())


def plan_hand_over(swap: SwapSchedule, call: int, needs: Mapping[str, int]) -> HandOver:
    """Fetch of what the next stage needs so much as there is room for, behind one call of a period.

    Each copy begins where from then on there is room for it to the end of the call, and not long before it must, as
    copies of the call's own would queue behind it.

    Args:
        swap: the plan of the stage; the call is taken to be its last, so that what it would fetch for a later one stays
            away, and what it reads need not outlast its last use.
        call: number of the call in the period.
        needs: bytes on the device of the weights that the next stage finds there as it begins, in the order of need.
    """
    workload, link = swap.workload, swap.hardware.link
    begin, end = workload.starts[call : call + 2]
    held = _held_in_last_call(swap, begin, end)
    room = list(accumulate(reversed([swap.plan.budget - size for size in held]), min))[::-1]
    computing = _from_each_on([op.seconds for op in workload.ops[begin:end]])
    own = _from_each_on([_seconds_begun(swap, index) for index in range(begin, end)])
    spare = [seconds - copying for seconds, copying in zip(computing, own, strict=True)]
    places = _places(needs, room, spare, link)
    sizes = {name: needs[name] for name in places}
    for name, place in places.items():
        held[place:] = [size + sizes[name] for size in held[place:]]
    following = (
        LocalStay(name, "next", workload.ops[begin + place].name, (), handed_on=True) for name, place in places.items()
    )
    stays = (*_residents(swap, begin, end), *_without_later(swap.transfers[call].stays), *following)
    copied, free = dict[str, float](), 0.0
    for name, place in places.items():
        free = copied[name] = max(free, computing[0] - computing[place]) + link.arriving(sizes[name])
    in_time = frozenset(name for name, seconds in copied.items() if seconds <= computing[0])
    return HandOver(replace(swap.transfers[call], stays=stays), sizes, max(held), in_time)


def _places(needs: Mapping[str, int], room: Sequence[int], spare: Sequence[float], link: Link) -> dict[str, int]:
    """For each weight that there is room for, the op of the call before which its copy begins.

    Args:
        needs: bytes of the weights, in the order of need.
        room: bytes that are free from each op on to the end of the call.
        spare: seconds that the link has from each op on to the end of the call.
        link: the way to the device.
    """
    places: dict[str, int] = {}
    taken, copying, last = 0, sum(map(link.arriving, needs.values())), 0
    for name, size in needs.items():
        first = next((place for place, free in enumerate(room) if free >= taken + size), None)
        if first is None:
            break
        latest = max((place for place, seconds in enumerate(spare) if seconds >= copying), default=0)
        places[name] = last = max(first, latest, last)
        taken, copying = taken + size, copying - link.arriving(size)
    return places


def last_call(plan: Plan, calls: int) -> int:
    """The number in the period of a generation's last call.

    Args:
        plan: with its swaps.
        calls: of the model in the generation, of all guidance branches.
    """
    swap = plan.swap
    if swap is None or not swap.workload.cyclic:
        return 0
    last = max(1, calls // swap.branches) - 1
    schedule, step = plan.schedule, 0
    full = max(step for step in range(last + 1) if step == 0 or schedule.is_full(step, last + 1))
    if full < last and len(swap.names) > swap.branches:
        *before, name = (program_name(schedule.fresh(i, last + 1), len(schedule.each)) for i in range(full, last + 1))
        step = swap.step_for(name, before, schedule.steps_to_full(last, last + 1))
    return (step + 1) * swap.branches - 1


def saved_seconds(swap: SwapSchedule, found: Container[str]) -> float:
    """Predicted time that a stage saves as it begins, where weights are on the device already.

    Args:
        swap: of the stage.
        found: names of these weights.
    """
    workload, residence = swap.workload, swap.plan.residence
    count = len(workload.ops)
    stays = [
        stay
        for stay in residence.stays
        if stay.name not in found or stay.made or (stay.end < count if workload.cyclic else stay.begin > 0)
    ]
    resident = frozenset(name for name in residence.resident if name not in found)
    cold, warm = (
        Engines(workload, there, swap.hardware.link).period(cold=True).seconds
        for there in (residence, Residence(resident, tuple(stays)))
    )
    return max(0.0, cold - warm)


def _from_each_on(values: Sequence[float]) -> list[float]:
    """The sum of each value and all behind it."""
    return list(accumulate(reversed(values)))[::-1]


def _residents(swap: SwapSchedule, begin: int, end: int) -> Iterator[LocalStay]:
    """What stays on the device from call to call is handed to its last one, to be freed behind its last use."""
    workload = swap.workload
    for name, movable in workload.movables.items():
        reads = _reads(swap, name, begin, end)
        if movable.kind == "weight" and name in swap.plan.residence.resident and reads:
            yield LocalStay(name, "weight", None, tuple(workload.ops[i].name for i in reads))


def _reads(swap: SwapSchedule, name: str, begin: int, end: int) -> list[int]:
    return [index for index in swap.workload.readers[name] if begin <= index < end]


def _without_later(stays: Sequence[LocalStay]) -> Iterator[LocalStay]:
    """What is read in the call is freed behind its last use there, and what is not read is not fetched."""
    for stay in stays:
        if stay.kind != "weight" or not stay.handed_on:
            yield stay
        elif stay.reads:
            yield replace(stay, handed_on=False)


def _held_in_last_call(swap: SwapSchedule, begin: int, end: int) -> list[int]:
    """Bytes on the device during each op of a call, where no weight stays beyond its last use there."""
    workload = swap.workload
    held = static_bytes(workload, swap.plan.residence)[begin:end]
    gone = [(name, begin, begin) for name in swap.plan.residence.resident]
    for stay, shift in _stays_over(swap, begin, end):
        if stay.end + shift >= end:
            gone.append((stay.name, max(begin, stay.begin + shift), max(begin, stay.first + shift)))
    for name, since, first in gone:
        if workload.movables[name].kind == "weight":
            reads = _reads(swap, name, first, end)
            for index in range(reads[-1] + 1 if reads else since, end):
                held[index - begin] -= workload.movables[name].num_bytes
    return held


def _stays_over(swap: SwapSchedule, begin: int, end: int) -> Iterator[tuple[Stay, int]]:
    """The stays over some op of a call, and by how much their numbers are shifted there."""
    workload = swap.workload
    for stay in swap.plan.residence.stays:
        for shift in (-len(workload.ops), 0) if workload.cyclic else (0,):
            if stay.begin + shift < end and stay.end + shift >= begin:
                yield stay, shift


def _seconds_begun(swap: SwapSchedule, index: int) -> float:
    """Time of the copies to the device that begin just before an op of the period and are read in the same call."""
    workload, link = swap.workload, swap.hardware.link
    end = next(start for start in workload.starts if start > index)
    begun = (stay for stay in swap.plan.residence.stays if stay.begin == index and not stay.made and stay.first < end)
    return sum(link.arriving(workload.movables[stay.name].num_bytes) for stay in begun)
