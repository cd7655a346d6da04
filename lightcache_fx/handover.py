"""The last call of a pipeline's stage: behind its computing flows in what the next stage reads first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lightcache_fx.passes.insert_transfers import LocalStay, Transfers
from lightcache_fx.simulator import static_bytes
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.workload import Stay


@dataclass(frozen=True)
class HandOver:
    """What the last call of a stage copies.

    Attributes:
        transfers: its own, less what it would fetch for a later call of its model, and with what the next stage needs;
            no weight of its own outlasts its last use.
        sizes: bytes on the device of each of the next stage's weights that it fetches, in the order of their need.
        peak_bytes: the most on the device during the call; never more than the plan's budget.
    """

    transfers: Transfers
    sizes: Mapping[str, int]
    peak_bytes: int

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
    fetched: list[tuple[str, int]] = []
    taken, copying = 0, sum(map(link.arriving, needs.values()))
    for name, size in needs.items():
        first = next((place for place, free in enumerate(room) if free >= taken + size), None)
        if first is None:
            break
        in_time = max((place for place, seconds in enumerate(spare) if seconds >= copying), default=0)
        fetched.append((name, max(first, in_time, fetched[-1][1] if fetched else 0)))
        taken, copying = taken + size, copying - link.arriving(size)
    sizes = {name: needs[name] for name, _ in fetched}
    for name, place in fetched:
        held[place:] = [size + sizes[name] for size in held[place:]]
    following = (
        LocalStay(name, "next", workload.ops[begin + place].name, (), handed_on=True) for name, place in fetched
    )
    stays = (*_residents(swap, begin, end), *_without_later(swap.transfers[call].stays), *following)
    return HandOver(replace(swap.transfers[call], stays=stays), sizes, max(held))


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
