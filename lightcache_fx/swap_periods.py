"""A period of a plan's programs as the swap planner sees it, and its plan: what is away, and when it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightcache_fx.capture import Capture
from lightcache_fx.errors import BudgetError
from lightcache_fx.graphs import input_of, num_bytes, placeholders
from lightcache_fx.hardware import Hardware, hardware_of
from lightcache_fx.liveness import timeline
from lightcache_fx.passes.chunk_regions import chunked_copy
from lightcache_fx.passes.insert_transfers import Transfers
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Swap
from lightcache_fx.program import whole_programs
from lightcache_fx.swap_planner import SwapPlan, floor_of, plan_swaps
from lightcache_fx.swap_transfers import leaving_after_use, places_of_slots, taken_at_begin, transfers_of
from lightcache_fx.swapping import (
    HistoryReads,
    behind_probe,
    fixed_inputs,
    least_movable,
    priced,
    without,
    workload_of,
)
from lightcache_fx.workload import Link, Residence, Step, Workload

_BISECTIONS = 6
_NO_TIME = 1.01
"""Swapping that takes up to so many times as long counts as costing no time."""


@dataclass(frozen=True)
class Period:
    """What a plan's programs are to the swap planner.

    Attributes:
        names: the program of each call.
        cycle: these calls.
        prologue: the call that runs once a generation, where there is one.
        hardware: what it is priced for.
        on_cuda: whether that is a CUDA device.
        branches: how many calls a denoising step has.
        history: by program, the older values of slots that it fetches by itself.
        waits: seconds of the cycle in which reads wait for those.
        all_stays: whether there is room for what the prologue reads beside the steps; their calls count it then.
    """

    names: tuple[str, ...]
    cycle: Workload
    prologue: Workload | None
    hardware: Hardware
    on_cuda: bool
    branches: int
    history: Mapping[str, HistoryReads] = field(default_factory=dict)
    waits: float = 0.0
    all_stays: bool = False

    @property
    def workloads(self) -> list[Workload]:
        """All of them."""
        return [self.cycle] if self.prologue is None else [self.cycle, self.prologue]

    @property
    def weights(self) -> frozenset[str]:
        """The weights that may be away."""
        movables = (movable for workload in self.workloads for movable in workload.movables.values())
        return frozenset(movable.name for movable in movables if movable.kind == "weight")

    @property
    def everything(self) -> int:
        """Bytes of all that may be away, beside what is live at most."""
        movables = {name: m.num_bytes for workload in self.workloads for name, m in workload.movables.items()}
        return sum(movables.values()) + max(op.live_bytes for workload in self.workloads for op in workload.ops)


def planned_period(
    capture: Capture, plan: Plan, swap: Swap, budget: int | None, cuda: bool | None, hardware: Hardware | None
) -> tuple[Period, SwapPlan]:
    """A period and its plan: older values of slots are away where the budget, or the least at no time, wants that.

    Args:
        capture: of the model.
        plan: with its chunks.
        swap: what may be away.
        budget: bytes on the device; None for what `swap` says, and where that says nothing, the least at no time.
        cuda: as for `with_memory`.
        hardware: as for `with_memory`.

    Raises:
        BudgetError: the budget is below what the most demanding call needs.
    """
    resident = period_of(capture, plan, swap, cuda, hardware)
    periods, link = [resident], resident.hardware.link
    if may_move_history(plan, swap):
        periods.append(period_of(capture, plan, swap, cuda, resident.hardware, history_away=True))
    if budget is None and swap.budget is None:
        found = [(period, _planned(plan.model, period.cycle, _swap_budget(swap, period), link)) for period in periods]
        in_time = [pair for pair in found if pair[1].simulation.seconds <= _NO_TIME * resident.cycle.seconds]
        return _kept_whole(plan.model, *min(in_time or found[:1], key=lambda pair: pair[1].budget))
    asked = _swap_budget(swap, resident) if budget is None else budget
    found, refusals = [], []
    for period in periods:
        try:
            found.append((period, _planned(plan.model, period.cycle, asked, link)))
        except BudgetError as error:
            refusals.append(error)
    if not found:
        raise refusals[-1]  # the one that needs least
    return _kept_whole(plan.model, *min(found, key=lambda pair: pair[1].simulation.seconds))


def _kept_whole(model: str, period: Period, found: SwapPlan) -> tuple[Period, SwapPlan]:
    """Where there is room for everything, what the prologue alone reads stays on the device beside the steps."""
    if period.prologue is None or period.everything > found.budget:
        return period, found
    movables = period.prologue.movables.items()
    beside = _beside(period.cycle, sum(m.num_bytes for name, m in movables if name not in period.cycle.movables))
    return replace(period, cycle=beside, all_stays=True), _planned(model, beside, found.budget, period.hardware.link)


def may_move_history(plan: Plan, swap: Swap) -> bool:
    """Whether there are older values of slots that may be away."""
    return plan.history_bytes > 0 and swap.features


def prologue_transfers(model: str, period: Period, found: SwapPlan) -> tuple[Transfers, bool]:
    """What the prologue copies, and whether it has room beside the weights that stay on the device for the steps.

    Where it has, a branch's prologue does not cost fetching them anew; the room is what the steps take at their peak.
    """
    if period.prologue is None or period.all_stays:
        return Transfers(), True
    slots, link = _slot_bytes_between(found.residence, period.cycle, period.branches), period.hardware.link
    beside, keeps_residents = _beside(period.prologue, slots + found.resident_bytes), True
    try:
        once = _planned(model, beside, found.peak_bytes, link)
    except BudgetError:
        beside, keeps_residents = _beside(period.prologue, slots), False
        once = _planned(model, beside, found.budget, link)
    (transfers,) = transfers_of(leaving_after_use(once.residence, beside), beside)
    return taken_at_begin(transfers, beside), keeps_residents


def _slot_bytes_between(residence: Residence, cycle: Workload, branches: int) -> int:
    """Bytes of the slots that earlier branches have on the device while a later one's prologue runs, at most."""
    sizes = {name: movable.num_bytes for name, movable in cycle.movables.items()}
    found = [0]
    for call in range(1, branches):
        earlier = enumerate(places_of_slots(residence, cycle, call, branches)[:call])
        found.append(sum(sizes[f"{s}@{b}"] for b, slots in earlier for s, place in slots.items() if place.is_present))
    return max(found)


def _beside(workload: Workload, held_bytes: int) -> Workload:
    """The same calls, with so many bytes more on the device all the time."""
    steps = tuple(
        Step(step.program, tuple(replace(op, live_bytes=op.live_bytes + held_bytes) for op in step.ops))
        for step in workload.steps
    )
    return replace(workload, steps=steps)


def period_of(
    capture: Capture,
    plan: Plan,
    swap: Swap,
    cuda: bool | None,
    hardware: Hardware | None,
    *,
    history_away: bool = False,
) -> Period:
    """The period of a plan.

    Args:
        capture: of the model.
        plan: with its chunks.
        swap: what may be away.
        cuda: as for `with_memory`.
        hardware: as for `with_memory`.
        history_away: whether older values of slots are away but where they are read.
    """
    graphs = {
        name: chunked_copy(whole.graph, plan.chunks[name].chunking).graph if name in plan.chunks else whole.graph
        for name, whole in whole_programs(capture, plan).items()
    }
    on_cuda = timeline(graphs["full"], cuda=cuda).cuda
    hardware = hardware or hardware_of(graphs["full"], cuda=on_cuda, folder=swap.folder)
    least, fixed = least_movable(plan.weight_bytes), set[str]()
    for graph in graphs.values():
        fixed |= fixed_inputs(graph, least=least, weights=swap.weights, features=swap.features)
    if "probe" in graphs:  # which runs before it is known what comes
        fixed |= {input_of(n).name for n in placeholders(graphs["probe"]) if input_of(n).kind == "weight"}
    programs = {name: priced(name, graph, hardware.machine, fixed, cuda=cuda) for name, graph in graphs.items()}
    history: dict[str, HistoryReads] = {}
    waits: dict[str, float] = {}
    if history_away:
        rounding, link = timeline(graphs["full"], cuda=cuda).rounding, hardware.link
        reads = {name: HistoryReads.of(graphs[name], rounding) for name in plan.programs}
        history = {name: read for name, read in reads.items() if read.stays}
        waits = {name: read.waits(programs[name], link) for name, read in history.items()}
        programs |= {name: read.beside(programs[name], link) for name, read in history.items()}
    weights = {
        input_of(n).name: num_bytes(n)
        for graph in graphs.values()
        for n in placeholders(graph)
        if input_of(n).kind == "weight"
    }
    if (probe := programs.get("probe")) is not None:
        programs |= {name: behind_probe(programs[name], probe) for name in ("full", "reuse")}
    movable = {name for program in programs.values() for name in program.movables}
    repeated = capture.layout.is_repeated
    branches = plan.branches
    held = plan.always_bytes + sum(size for name, size in weights.items() if name not in movable)
    held -= branches * plan.history_bytes if history_away else 0
    held += branches * sum(slot.num_bytes for slot in plan.slots if slot.name in fixed)
    for name in plan.programs:  # while it makes what it keeps, the device does not have that already
        programs[name] = without(programs[name], sum(s.num_bytes for s in plan.made_by(name) if s.name in fixed))
    steps = plan.period if repeated else ("full",)
    cycle = workload_of([programs[name] for name in steps], held, cyclic=repeated, branches=branches)
    names = tuple(name for name in steps for _ in range(branches))
    prologue = workload_of([programs["prologue"]], held, cyclic=False) if "prologue" in programs else None
    waited = sum(waits.get(name, 0.0) for name in names)
    return Period(names, cycle, prologue, hardware, on_cuda, branches, history, waited)


def _planned(model: str, workload: Workload, budget: int, link: Link) -> SwapPlan:
    try:
        return plan_swaps(workload, budget, link)
    except BudgetError as error:
        raise BudgetError(f"{model}: {error}", error.reached) from None


def _swap_budget(swap: Swap, period: Period) -> int:
    """Bytes as asked for; where nothing is, the least at which swapping takes no time, by prediction."""
    if isinstance(swap.budget, int):
        return swap.budget
    if not period.cycle.cyclic:  # it begins with nothing on the device, and waits for that whatever the budget
        return period.everything
    if isinstance(swap.budget, str):
        return int(float(swap.budget.removesuffix("%")) / 100 * period.everything)
    low, high = max(floor_of(workload)[0] for workload in period.workloads), period.everything
    for _ in range(_BISECTIONS):
        middle = (low + high) // 2
        if plan_swaps(period.cycle, middle, period.hardware.link).slowdown <= _NO_TIME - 1:
            high = middle
        else:
            low = middle
    return high
