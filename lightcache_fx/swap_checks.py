"""Whether a residence is sound: nothing is read before it is there, nothing is copied for nobody."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from lightcache_fx.errors import SwapPlanError
from lightcache_fx.workload import Residence, Stay, Workload


def validate(workload: Workload, residence: Residence) -> None:
    """Check that the residence serves the workload, whatever the link.

    Raises:
        SwapPlanError: it does not, or the workload contradicts itself.
    """
    check_workload(workload)
    by_name: dict[str, list[Stay]] = {name: [] for name in workload.movables}
    unknown = sorted(name for name in residence.resident if name not in by_name)
    if unknown:
        raise SwapPlanError(f"resident {unknown[0]!r}: the workload has no such movable")
    before = 0
    for stay in residence.stays:
        _check_stay(workload, residence, stay, before)
        by_name[stay.name].append(stay)
        before = stay.begin
    for name, stays in by_name.items():
        if name not in residence.resident:
            _check_movable(workload, name, stays)


def check_workload(workload: Workload) -> None:
    """Check that the calls name what there is, and that what is read is made.

    Raises:
        SwapPlanError: the first contradiction.
    """
    for index, op in enumerate(workload.ops):
        for name in (*op.reads, *op.writes):
            if name not in workload.movables:
                raise SwapPlanError(f"call {index} ({op.name}) uses {name!r}, which is no movable of the workload")
        both = sorted(set(op.reads) & set(op.writes))
        if both:
            raise SwapPlanError(
                f"call {index} ({op.name}) both reads and makes {both[0]!r}; what is read before it is made again"
                f" cannot be told from what is made then: split the call"
            )
    for name, movable in workload.movables.items():
        reads, writes = workload.readers[name], workload.writers[name]
        if movable.kind == "weight" and writes:
            raise SwapPlanError(f"call {writes[0]} ({workload.ops[writes[0]].name}) makes the weight {name!r}")
        early = movable.kind == "slot" and reads and (not writes or (not workload.cyclic and reads[0] < writes[0]))
        if early:
            raise SwapPlanError(f"call {reads[0]} ({workload.ops[reads[0]].name}) reads the slot {name!r} unmade")


def _check_stay(workload: Workload, residence: Residence, stay: Stay, before: int) -> None:
    count = len(workload.ops)
    if stay.name not in workload.movables:
        raise SwapPlanError(f"{stay}: the workload has no such movable")
    if stay.name in residence.resident:
        raise SwapPlanError(f"{stay}: it is resident already")
    if not before <= stay.begin:
        raise SwapPlanError(f"{stay}: stays are in order of begin, and the one before has {before}")
    if not (0 <= stay.begin < count and stay.begin <= stay.first <= stay.end < stay.begin + count):
        raise SwapPlanError(f"{stay}: expected 0 <= begin < {count} and begin <= first <= end < begin + {count}")
    if stay.end >= count and not workload.cyclic:
        raise SwapPlanError(f"{stay}: it reaches into the next period, and each starts anew")
    op = workload.ops[stay.first % count]
    if stay.offloaded and not stay.made:
        raise SwapPlanError(f"{stay}: it came from where it is to be copied to")
    if stay.made and (stay.begin != stay.first or stay.name not in op.writes):
        raise SwapPlanError(f"{stay}: call {stay.begin} ({workload.ops[stay.begin].name}) does not make it")
    if not stay.made and stay.name not in op.reads:
        raise SwapPlanError(f"{stay}: copied for call {stay.first} ({op.name}), which does not read it")


def _check_movable(workload: Workload, name: str, stays: Sequence[Stay]) -> None:
    """Every use lies in one stay behind its first call, stays do not overlap, and slots come from where they went."""
    count, period = len(workload.ops), workload.cyclic
    made_at = [stay.begin for stay in stays if stay.made]
    unmade = sorted(set(workload.writers[name]) - set(made_at))
    if unmade:
        raise SwapPlanError(f"call {unmade[0]} ({workload.ops[unmade[0]].name}) makes {name!r}, which begins no stay")
    following = [*stays[1:], *(_later(stay, count) for stay in stays[:1] if period)]
    for stay, after in zip(stays, following, strict=False):
        if after.begin <= stay.end:
            raise SwapPlanError(f"{stay} overlaps {after}")
    covered: set[int] = set()
    for stay in stays:
        for index in _reads_within(workload.readers[name], stay.begin, stay.end, count):
            if index < stay.first:
                op = workload.ops[index % count]
                raise SwapPlanError(f"call {index % count} ({op.name}) reads {name!r} before {stay} has it")
            covered.add(index % count)
    missing = sorted(set(workload.readers[name]) - covered)
    if missing:
        op = workload.ops[missing[0]]
        raise SwapPlanError(f"call {missing[0]} ({op.name}) reads {name!r}, which is not on the device")
    if workload.movables[name].kind == "slot":
        _check_offloads(stays, cyclic=period)


def _check_offloads(stays: Sequence[Stay], *, cyclic: bool) -> None:
    for number, stay in enumerate(stays):
        ahead = [*stays[number + 1 :], *(stays[:number] if cyclic else ())]
        behind = [*reversed(stays[:number]), *(reversed(stays[number + 1 :]) if cyclic else ())]
        if stay.offloaded and not (ahead and not ahead[0].made):
            raise SwapPlanError(f"{stay}: copied from the device, and nothing fetches it before it is made again")
        if not stay.made and not next((other.offloaded for other in behind if other.made), False):
            raise SwapPlanError(f"{stay}: fetched, and never copied from the device since it was made")


def _reads_within(reads: Sequence[int], begin: int, end: int, count: int) -> list[int]:
    """The reads from `begin` to `end`, counted beyond the period's end as those are."""
    found = list(reads[bisect_left(reads, begin) : bisect_left(reads, end + 1)])
    return found + [read + count for read in reads[: bisect_left(reads, end - count + 1)]]


def _later(stay: Stay, count: int) -> Stay:
    return replace(stay, begin=stay.begin + count, first=stay.first + count, end=stay.end + count)
