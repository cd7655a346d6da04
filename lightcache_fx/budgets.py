"""What is done to keep memory budgets: chunked regions, swapped weights and features, or both, at the least time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import fx

from lightcache_fx.capture import Capture
from lightcache_fx.chunk_planner import ChunkPlan, Request, plan_program
from lightcache_fx.errors import BudgetError
from lightcache_fx.graphs import describe, input_of, num_bytes, placeholders
from lightcache_fx.hardware import Hardware
from lightcache_fx.homes import Tier
from lightcache_fx.liveness import timeline
from lightcache_fx.passes.chunk_regions import chunked_copy
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Chunk, Swap
from lightcache_fx.program import whole_programs
from lightcache_fx.simulator import simulate
from lightcache_fx.swap_periods import may_move_history, period_of, planned_period, prologue_transfers
from lightcache_fx.swap_planner import floor_of
from lightcache_fx.swap_transfers import (
    leaving_after_use,
    none_dropped,
    taken_at_begin,
    transfers_of,
    when_needed,
)
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.units import format_bytes

log = logging.getLogger(__name__)

_PLAN_TRIES = 3
_GOOD_ENOUGH = 1.02
"""Over the time of everything resident and whole: a plan that takes so much ends the search for a faster one."""
Limit = Callable[[str], int | None]


def with_memory(
    capture: Capture,
    plan: Plan,
    *,
    cuda: bool | None = None,
    hardware: Hardware | None = None,
    takes_turns: bool = False,
) -> Plan:
    """The plan with the regions and transfers of each of its programs, where its policy asks for any.

    Args:
        capture: of the model.
        plan: what was decided before.
        cuda: predict memory for a CUDA device or for the CPU; by default for the one that the values are on.
        hardware: what the machine does in a second; by default as measured here, or typical of such a device.
        takes_turns: whether other models run on the device in turns with this one, so that its weights leave it then.

    Raises:
        BudgetError: a budget cannot be kept whatever is cut and swapped.
        RegionError: an explicit region that does not exist in any program, or that cannot be cut.
        SwapError: the machine cannot be measured because there is no room to swap to.
    """
    policy = plan.policy
    if policy.memory_budget is not None:
        within = _within(capture, plan, policy.memory_budget, cuda, hardware, takes_turns=takes_turns)
        assert within.swap is not None
        return within if within.swap.moves or takes_turns else replace(within, swap=None)
    plan = with_chunks(capture, plan, _nothing, cuda=cuda)
    if policy.swap is None:
        return plan
    return with_swaps(capture, plan, policy.swap, cuda=cuda, hardware=hardware)


def for_branches(capture: Capture, plan: Plan, before: Plan, *, takes_turns: bool = False) -> Plan:
    """The plan for a step of other guidance branches than an earlier plan was made for.

    What that one cut stays cut so wherever the budget can be kept with it: other chunks round otherwise, and a run
    should not change in its middle. So little is searched for.

    Args:
        capture: of the model.
        plan: what was decided before memory was looked at; its `branches` are those of a step.
        before: the plan with the memory of other branches.
        takes_turns: as for `with_memory`.

    Raises:
        BudgetError: a budget cannot be kept with so many branches.
        SwapError: as for `with_memory`.
    """
    swap, chunked = plan.policy.swap or Swap(), replace(plan, chunks=before.chunks)
    whole = before.swap.whole_seconds / before.branches * plan.branches if before.swap is not None else None
    try:
        found = with_swaps(
            capture, chunked, swap, budget=plan.policy.memory_budget, whole_seconds=whole, takes_turns=takes_turns
        )
    except BudgetError:
        if plan.policy.memory_budget is None:
            raise
        found = _within(capture, plan, plan.policy.memory_budget, None, None, takes_turns=takes_turns)
    if before.swap is None and found.swap is not None and not found.swap.moves and not takes_turns:
        found = replace(found, swap=None)
    note = f"a step has {plan.branches} calls of {plan.model}, as seen: planned anew with what each of them keeps"
    if plan.beside:
        note = (
            f"a step calls {plan.model} with other sizes too, as seen: planned anew beside the"
            f" {format_bytes(plan.beside)} that they keep"
        )
    return replace(found, notes=(*found.notes, note))


def _within(
    capture: Capture, plan: Plan, budget: int, cuda: bool | None, hardware: Hardware | None, *, takes_turns: bool
) -> Plan:
    """The fastest of: swapping as it is, everything resident and chunked to what is left, and swapping with chunks."""
    swap = plan.policy.swap or Swap()
    whole = period_of(capture, plan, swap, cuda, hardware).cycle.seconds
    found: list[tuple[float, Plan]] = []
    floors: list[BudgetError] = []
    for limit in _limits(capture, plan, budget):
        try:
            chunked = with_chunks(capture, plan, limit, cuda=cuda)
            planned = with_swaps(
                capture, chunked, swap, budget=budget, cuda=cuda, hardware=hardware, whole_seconds=whole,
                takes_turns=takes_turns,
            )  # fmt: skip
        except BudgetError as error:
            log.debug("within %s: %s", format_bytes(budget), error)
            floors.append(error)
            continue
        assert planned.swap is not None
        found.append((planned.swap.plan.simulation.seconds, planned))
        if found[-1][0] <= _GOOD_ENOUGH * whole:
            break
    if not found:
        raise _out_of_reach(capture, plan, budget, min(error.reached or 0 for error in floors), cuda, hardware)
    return min(found, key=lambda entry: entry[0])[1]


def _out_of_reach(
    capture: Capture, plan: Plan, budget: int, reached: int, cuda: bool | None, hardware: Hardware | None
) -> BudgetError:
    """Names the floor: what the most demanding call needs where everything is cut and swapped."""
    swap = plan.policy.swap or Swap()
    try:
        plan = with_chunks(capture, plan, {}.fromkeys(whole_programs(capture, plan), reached).get, cuda=cuda)
    except BudgetError as error:
        log.debug("the floor is that of whole activations: %s", error)
    workload = period_of(capture, plan, swap, cuda, hardware, history_away=may_move_history(plan, swap)).cycle
    floor, index = floor_of(workload)
    op = workload.ops[index]
    return BudgetError(
        f"memory_budget: {format_bytes(budget)} is less than the {format_bytes(floor)} that {plan.model} needs on the"
        f" device at once with its activations chunked and its weights swapped, of which {format_bytes(op.live_bytes)}"
        f" are activations and what always stays there; call %{op.name} sets it. Raise the budget to that, load the"
        f" model in half precision, or make the latent smaller",
        floor,
    )


def _limits(capture: Capture, plan: Plan, budget: int) -> Iterator[Limit]:
    """What activations may take: whatever they do, what is left beside few weights, and what is left beside all.

    The last comes last: it asks most of the activations, and a search for what cannot be reached takes longest.
    """
    yield _nothing
    wholes = whole_programs(capture, plan)
    largest = max((node for whole in wholes.values() for node in placeholders(whole.graph)), key=_weight_bytes)
    for share in (1.0, 0.75):
        few = int(share * (budget - plan.always_bytes - 2 * _weight_bytes(largest)))
        if few > 0:
            yield {}.fromkeys(wholes, few).get
    held = plan.weight_bytes + plan.always_bytes

    def beside_all(name: str) -> int:
        made = sum(slot.num_bytes for slot in (plan.made_by(name) if name in plan.programs else plan.slots))
        return budget - held - plan.slot_bytes * plan.branches + (made if name != "probe" else 0)

    if beside_all("reuse") > 0:
        yield beside_all


def with_swaps(
    capture: Capture,
    plan: Plan,
    swap: Swap,
    *,
    budget: int | None = None,
    cuda: bool | None = None,
    hardware: Hardware | None = None,
    whole_seconds: float | None = None,
    takes_turns: bool = True,
) -> Plan:
    """The plan with the transfers of each of its programs.

    Args:
        capture: of the model.
        plan: with its chunks.
        swap: what may be away.
        budget: bytes on the device; by default as `swap` says.
        cuda: as for `with_memory`.
        hardware: as for `with_memory`.
        whole_seconds: of a period with everything on the device and nothing cut; by default as the plan's chunks are.
        takes_turns: whether everything leaves the device with the last call of a model that is not called step by step.

    Raises:
        BudgetError: the budget is below what the most demanding call needs.
    """
    period, found = planned_period(capture, plan, swap, budget, cuda, hardware)
    cycle, link = period.cycle, period.hardware.link
    residence = found.residence
    if not cycle.cyclic and (takes_turns or residence.stays):
        residence = leaving_after_use(residence, cycle)
    if plan.highest_order or len(plan.schedule.each) > 1:
        residence = none_dropped(residence, cycle)
    if not swap.prefetch:
        residence = when_needed(residence, cycle)
    if residence != found.residence:
        resident = sum(cycle.movables[name].num_bytes for name in residence.resident)
        simulation = simulate(cycle, residence, link)
        found = replace(found, residence=residence, simulation=simulation, resident_bytes=resident)
    prologue, keeps_residents = prologue_transfers(plan.model, period, found)
    transfers = transfers_of(found.residence, cycle, period.branches)
    if not cycle.cyclic and swap.prefetch:
        transfers = tuple(taken_at_begin(of_call, cycle) for of_call in transfers)
    if period.history:
        read = [period.history[name].stays if name in period.history else () for name in period.names]
        transfers = tuple(replace(t, stays=(*t.stays, *more)) for t, more in zip(transfers, read, strict=True))
    tier: Tier = swap.to or ("host" if period.on_cuda else "disk")
    whole = cycle.seconds - period.waits if whole_seconds is None else whole_seconds
    schedule = SwapSchedule(
        period.names,
        period.weights,
        transfers,
        prologue,
        found,
        whole,
        cycle,
        period.hardware,
        tier,
        period.branches,
        keeps_residents,
        period.prologue,
        bool(period.history),
    )
    notes = plan.notes if schedule.warning is None else (*plan.notes, schedule.warning)
    return replace(plan, swap=schedule, notes=notes)


def with_chunks(capture: Capture, plan: Plan, limit: Limit, *, cuda: bool | None = None) -> Plan:
    """The plan with the regions of each of its programs, where its policy asks for chunks or activations are limited.

    Args:
        capture: of the model.
        plan: what was decided before.
        limit: the most bytes that the activations of a program may take, beside what the policy says of them.
        cuda: as for `with_memory`.

    Raises:
        BudgetError: a program's peak stays above the budget whatever is cut.
        RegionError: an explicit region that does not exist in any program, or that cannot be cut.
    """
    policy = plan.policy
    frames = policy.frames_at_a_time() if capture.layout.method != "forward" else None
    explicit = policy.chunk.regions if policy.chunk is not None else []
    chunks: dict[str, ChunkPlan] = {}
    notes: list[str] = []
    wholes = whole_programs(capture, plan)
    asked = _asked_of_activations(policy.chunk, wholes, cuda)
    is_share, best_effort = False, False
    if policy.chunk is not None:
        is_share, best_effort = isinstance(policy.chunk.budget, str), policy.chunk.best_effort
    for name, whole in wholes.items():
        must = limit(name)
        if policy.chunk is None and frames is None and must is None:
            continue
        regions = explicit if name != "prologue" else []
        layers = policy.chunk.layers if policy.chunk is not None and name != "prologue" else None
        budget = min((size for size in (asked, must) if size is not None), default=None)
        may_miss = best_effort or (name == "prologue" and is_share and must is None)  # a share is one of steps
        request = Request(budget, regions, frames, cuda, layers=layers, best_effort=best_effort)
        chunk = _plan_exactly(whole, request)
        if not chunk.fits and may_miss:
            if must is not None and chunk.peak_after > must:
                chunk = _plan_exactly(whole, replace(request, budget=must, best_effort=False))
            else:
                notes += [_short_of_budget(name, chunk)] if best_effort else []
                chunk = replace(chunk, budget=chunk.peak_after)
        if not chunk.fits:
            raise BudgetError(_explain_floor(plan, name, chunk, whole.graph), chunk.peak_after)
        chunks[name] = chunk
    if frames is not None and not any(chunk.regions for chunk in chunks.values()):
        notes += _unsliced(capture)
    return replace(plan, chunks=chunks, notes=(*plan.notes, *notes))


def _unsliced(capture: Capture) -> Iterator[str]:
    """Where a video was to be decoded slice by slice, and is decoded as a whole."""
    batch, *sizes = capture.layout.tensor_types[0].shape
    if capture.layout.method == "decode" and len(sizes) == 4 and sizes[1] > 1:
        yield (
            f"decode: the {sizes[1]} frames of {batch} video(s) depend on each other and are decoded at once; give a"
            f" budget, as in Decode(budget='60%'), which cuts space as well"
        )


def _short_of_budget(name: str, chunk: ChunkPlan) -> str:
    """What a plan says where its best effort was not enough."""
    reached, asked = format_bytes(chunk.peak_after), format_bytes(chunk.budget)
    return (
        f"{name}: its activations take {reached}, by best effort, not the {asked} that were asked for; whole they take"
        f" {format_bytes(chunk.peak_before)}"
    )


def _plan_exactly(whole: fx.GraphModule, request: Request) -> ChunkPlan:
    """A chunk plan whose peak is that of the finished graph's own timeline, planned again where that is too high."""
    budget = goal = request.budget
    for _ in range(_PLAN_TRIES):
        chunk = plan_program(whole.graph, replace(request, budget=goal))
        estimate = chunk.peak_after
        built = chunked_copy(whole.graph, chunk.chunking)
        exact = timeline(built.graph, cuda=request.cuda).peak_bytes
        allowed = max(chunk.budget, exact) if budget is None else budget  # nothing was asked: whatever comes is right
        chunk = replace(chunk, peak_after=exact, budget=allowed)
        if goal is None or budget is None or chunk.fits or estimate > goal:
            break
        goal = int(0.99 * goal * budget / chunk.peak_after)
    return chunk


def _asked_of_activations(chunk: Chunk | None, wholes: Mapping[str, fx.GraphModule], cuda: bool | None) -> int | None:
    """Bytes for the activations of each program; a share is one of what the step with the highest peak takes.

    What runs once a generation has no share of its own: much of its peak is what it hands to the steps.
    """
    asked = chunk.budget if chunk is not None else None
    if isinstance(asked, str):
        steps = [whole.graph for name, whole in wholes.items() if name != "prologue"]
        highest = max(timeline(graph, cuda=cuda).peak_bytes for graph in steps)
        return int(float(asked.removesuffix("%")) / 100 * highest)
    return asked


def _nothing(_: str) -> None:
    """No limit."""


def _is_weight(node: fx.Node) -> bool:
    return input_of(node).kind == "weight"


def _weight_bytes(node: fx.Node) -> int:
    return num_bytes(node) if _is_weight(node) else 0


def _explain_floor(plan: Plan, name: str, chunk: ChunkPlan, graph: fx.Graph) -> str:
    limit = next((describe(node) for node in graph.nodes if node.name == chunk.limit_node), f"%{chunk.limit_node}")
    return (
        f"budget: the activations of {plan.model}'s {name} program cannot be cut to {format_bytes(chunk.budget)}; the"
        f" least that chunking reaches is {format_bytes(chunk.peak_after)} (from {format_bytes(chunk.peak_before)}),"
        f" set by {limit}; raise the budget to that, or make the latent smaller"
    )
