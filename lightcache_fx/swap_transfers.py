"""From a swap plan back to programs: what each of them copies when, and what is on the device when it begins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lightcache_fx.passes.insert_transfers import LocalStay, MadeSlot, Transfers
from lightcache_fx.stores import SlotPlace
from lightcache_fx.workload import Movable, Residence, Stay, Workload


def transfers_of(residence: Residence, workload: Workload, branches: int = 1) -> tuple[Transfers, ...]:
    """What the program of each call of the period copies.

    A slot of another guidance branch than the call's own is in the hands of that branch: a program only begins its copy
    to the device.

    Args:
        residence: that was planned.
        workload: what for; its steps are calls of the model.
        branches: how many calls a denoising step has.
    """
    period = len(workload.ops)
    shifts = (-period, 0) if workload.cyclic else (0,)
    found = []
    for call, (begin, end) in enumerate(zip(workload.starts, workload.starts[1:], strict=False)):
        here = [
            (stay, shift)
            for shift in shifts
            for stay in residence.stays
            if stay.begin + shift < end and stay.end + shift >= begin
        ]
        stays = []
        for stay, shift in here:
            begins, own = stay.begin + shift >= begin, _is_own(workload.movables[stay.name], call % branches)
            if begins if not own else not (stay.made and begins):
                stays.append(_local(stay, shift, call, workload, own=own))
        made = {stay.name: stay for stay, shift in here if stay.made and begin <= stay.begin + shift < end}
        written = [workload.movables[name] for op in workload.ops[begin:end] for name in op.writes]
        slots = tuple(_made(slot.plain_name, made.get(slot.name), end, workload) for slot in written)
        found.append(Transfers(tuple(stays), slots))
    return tuple(found)


def places_of_slots(
    residence: Residence, workload: Workload, call: int, branches: int = 1
) -> tuple[Mapping[str, SlotPlace], ...]:
    """Where the slots of each guidance branch are when a call of the period begins, by their names in programs.

    Of other branches than the call's own, what is to leave during the call is away already: its program cannot free it.
    """
    begin, end = workload.starts[call : call + 2]
    sent_away = {stay.name for stay in residence.stays if stay.offloaded}
    present = set(residence.resident)
    for stay, shift in _shifted(residence, workload):
        least = begin if _is_own(workload.movables[stay.name], call % branches) else end
        if stay.begin + shift < begin and stay.end + shift >= least:
            present.add(stay.name)
    found: list[dict[str, SlotPlace]] = [{} for _ in range(branches)]
    for name, movable in workload.movables.items():
        if movable.kind == "slot":
            place = SlotPlace(name in residence.resident, name in sent_away, name in present)
            found[movable.branch or 0][movable.plain_name] = place
    return tuple(found)


def _shifted(residence: Residence, workload: Workload) -> Iterator[tuple[Stay, int]]:
    """Each stay, and where it reaches into the next period, as that period sees it."""
    for stay in residence.stays:
        yield stay, 0
        if stay.end >= len(workload.ops):
            yield stay, -len(workload.ops)


def _is_own(movable: Movable, place: int) -> bool:
    """Whether a program of the call at this place in its denoising step can have it: a weight, or a slot of its own."""
    return movable.branch is None or movable.branch == place


def _local(stay: Stay, shift: int, call: int, workload: Workload, *, own: bool) -> LocalStay:
    first, last = stay.begin + shift, stay.end + shift
    ops, movable = workload.ops, workload.movables[stay.name]
    begin, end = workload.starts[call : call + 2]
    reads = tuple(ops[i].name for i in range(max(begin, first), min(end, last + 1)) if stay.name in ops[i].reads)
    prefetch = ops[first].name if first >= begin and not stay.made else None
    name, branch = (movable.plain_name, None) if own else (movable.name, movable.branch)
    for_later = prefetch is not None and not reads
    ahead = _calls_until(stay.first + shift, call, workload) if for_later else 0
    return LocalStay(name, movable.kind, prefetch, reads, last >= end, ahead, branch)


def _calls_until(op: int, call: int, workload: Workload) -> int:
    """How many calls of the model there are from one of the period to the one that has an op, maybe periods later."""
    turns, place = divmod(op, len(workload.ops))
    return turns * len(workload.steps) + bisect_right(workload.starts, place) - 1 - call


def _made(name: str, stay: Stay | None, end: int, workload: Workload) -> MadeSlot:
    if stay is None:  # resident: plain state
        return MadeSlot(name, None, handed_on=False)
    release = workload.ops[min(stay.end, end - 1)].name if stay.offloaded else None
    return MadeSlot(name, release, handed_on=stay.end >= end)


def leaving_after_use(residence: Residence, workload: Workload) -> Residence:
    """The same for a program that is not repeated: what was to stay is fetched at its begin, in order of first use."""
    uses: dict[str, list[int]] = {}
    for index, op in enumerate(workload.ops):
        for name in (*op.reads, *op.writes):
            uses.setdefault(name, []).append(index)
    fetched = [Stay(name, 0, uses[name][0], uses[name][-1]) for name in residence.resident]
    stays = sorted([*residence.stays, *fetched], key=lambda stay: (stay.begin, stay.first, stay.name))
    return Residence(frozenset(), tuple(stays))


def taken_at_begin(transfers: Transfers, workload: Workload) -> Transfers:
    """The same, but the caller begins the copies at the begin of a program, which the model before may have begun."""
    begin = workload.ops[0].name
    return replace(
        transfers,
        stays=tuple(
            replace(stay, prefetch=None) if stay.prefetch == begin and stay.kind == "weight" and stay.reads else stay
            for stay in transfers.stays
        ),
    )


def none_dropped(residence: Residence, workload: Workload) -> Residence:
    """The same, but every slot that leaves the device has a copy at home, for whatever comes behind the period.

    A full step makes history of it, and of several caches a step that is not in the period may read it.
    """
    movables = workload.movables
    stays = [
        replace(stay, offloaded=True) if stay.made and movables[stay.name].kind == "slot" else stay
        for stay in residence.stays
    ]
    return Residence(residence.resident, tuple(stays))


def when_needed(residence: Residence, workload: Workload) -> Residence:
    """The same, but every copy to the device is begun just before the call that needs it."""
    period = len(workload.ops)
    stays = []
    for stay in residence.stays:
        turns = 0 if stay.made else stay.first // period
        begin, end = stay.first - turns * period, stay.end - turns * period
        stays.append(stay if stay.made else Stay(stay.name, begin, begin, end))
    return Residence(residence.resident, tuple(sorted(stays, key=lambda stay: (stay.begin, stay.name))))
