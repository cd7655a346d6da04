"""What the planner decided, from a policy: which values are hoisted and kept, when, and what that costs. Printable."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import fx, nn

from lightcache_fx.capture import Capture
from lightcache_fx.cuts import CutChoice, GraphFacts, Slot, choose_cuts, kept_nodes, reuse_nodes
from lightcache_fx.extrapolation import COEFFICIENT_BYTES, num_coefficients
from lightcache_fx.graphs import copy_graph, num_bytes, outputs
from lightcache_fx.hoisting import HoistPlan, plan_hoisting
from lightcache_fx.passes.split_run_invariants import split_run_invariants
from lightcache_fx.policy import Policy
from lightcache_fx.probing import ProbePlan, plan_probe
from lightcache_fx.schedule import Schedules, fresh_of, program_name
from lightcache_fx.units import format_bytes

if TYPE_CHECKING:
    from lightcache_fx.chunk_planner import ChunkPlan
    from lightcache_fx.swapping import SwapSchedule

MAX_PERIOD = 8
"""Steps of a period that are planned one by one; of longer ones, reuse steps in the middle are alike."""
_MAX_CALLS = 16
"""Likewise, where a step has a call for each guidance branch."""
_MIN_PERIOD = 3
"""Steps: a full one, those in the middle, and the last before the next full one."""
_LEAST_SAVED = 0.05
"""Of a full step's FLOPs; a cut that saves less is told of."""


@dataclass(frozen=True)
class Plan:
    """The decisions for one signature; passes only carry them out.

    Attributes:
        model: class name of the model.
        policy: what the user asked for.
        schedule: which steps are full.
        hoist: what is computed once a generation.
        cut: what is kept between steps, or None.
        candidates: for `cut="auto"`, every cut that was considered, by reuse FLOPs.
        full_flops: FLOPs of a full step after hoisting.
        weight_bytes: bytes of the weights that the model reads.
        notes: what a user should know before trusting the result.
        chunks: the regions of each program, where the policy asks for chunks or a budget.
        swap: what is copied when, where the policy asks for swapping or has a budget that needs it.
        branches: how many calls a step has, one for each branch of guidance: budgets count the slots and hoisted values
            of all of them.
        probe: where a step is split behind what it decides by, where the policy lets steps decide.
        output_bytes: bytes of what the model returns, where guidance branches are derived from each other's.
        combined_flops: FLOPs of the programs that compute some of what is kept, by name.
        beside: bytes that calls of other signatures in a step (a prompt of another length) keep on the device.
    """

    model: str
    policy: Policy
    schedule: Schedules
    hoist: HoistPlan
    cut: CutChoice | None
    candidates: tuple[CutChoice, ...]
    full_flops: int
    weight_bytes: int
    notes: tuple[str, ...] = ()
    chunks: Mapping[str, ChunkPlan] = field(default_factory=dict)
    swap: SwapSchedule | None = None
    branches: int = 1
    beside: int = 0
    probe: ProbePlan | None = None
    combined_flops: Mapping[str, int] = field(default_factory=dict)
    output_bytes: int = 0

    @cached_property
    def programs(self) -> tuple[str, ...]:
        """The programs of steps: `full`, and `reuse` where anything is kept; of several caches, what steps combine."""
        count = len(self.schedule.each)
        if self.cut is None:
            return ("full",)
        combined = [program_name(fresh, count) for fresh in self.schedule.combinations()] if count > 1 else []
        return tuple(dict.fromkeys(("full", *combined, "reuse")))

    @property
    def period(self) -> tuple[str, ...]:
        """The programs of the steps from one full step to the next; of a long interval, so many as are told apart.

        Of several caches, the longest such stretch, and one step more for each program that is not in it.
        """
        if self.cut is None:
            return ("full",)
        longest = max(_MIN_PERIOD, min(MAX_PERIOD, _MAX_CALLS // self.branches))
        count = len(self.schedule.each)
        if count > 1:
            combined = [program_name(fresh, count) for fresh in self.schedule.combinations()]
            full = [step for step, name in enumerate(combined) if name == "full"]
            begin, end = max(pairwise([*full, len(combined)]), key=lambda ends: ends[1] - ends[0])
            steps = combined[begin : min(end, begin + longest)]
            return (*steps, *(name for name in dict.fromkeys(combined) if name not in steps))
        return ("full", *["reuse"] * (self.schedule.longest_interval(longest) - 1))

    def order_of(self, cache: int) -> int:
        """Of the Taylor expansion that reuse steps read a cache's slots by."""
        return self.policy.caches[cache].order

    @property
    def highest_order(self) -> int:
        """Of the expansions of all caches."""
        return max((cache.order for cache in self.policy.caches), default=0)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All that is kept between steps."""
        return self.cut.slots if self.cut is not None else ()

    def made_by(self, name: str) -> tuple[Slot, ...]:
        """The slots that a program of steps makes."""
        fresh = fresh_of(name, len(self.schedule.each))
        return tuple(slot for slot in self.slots if slot.cache in fresh)

    def read_by(self, name: str) -> tuple[Slot, ...]:
        """The slots that a program of steps reads."""
        fresh = fresh_of(name, len(self.schedule.each))
        return tuple(slot for slot in self.slots if slot.cache not in fresh)

    @property
    def slot_bytes(self) -> int:
        """Bytes of what a full step keeps: exactly the cut's."""
        return self.cut.kept_bytes if self.cut is not None else 0

    @property
    def history_bytes(self) -> int:
        """Bytes of what earlier full steps kept, where slots are extrapolated."""
        return sum(self.order_of(slot.cache) * slot.num_bytes for slot in self.slots)

    @property
    def indicator_bytes(self) -> int:
        """Bytes of what steps compare with, where they decide for themselves."""
        return self.probe.indicator_bytes if self.probe is not None else 0

    @property
    def kept_bytes(self) -> int:
        """Bytes held between steps because of caching."""
        return self.slot_bytes + self.history_bytes + self.indicator_bytes

    @property
    def always_bytes(self) -> int:
        """Bytes on the device all the time beside weights and slots, of all branches and of other signatures."""
        each = self.hoist.num_bytes + self.history_bytes + self.indicator_bytes + self.output_bytes
        numbers = sum(COEFFICIENT_BYTES * num_coefficients(cache.order) for cache in self.policy.caches)
        return self.branches * each + self.handed_bytes + numbers + self.beside

    @property
    def handed_bytes(self) -> int:
        """Bytes that the probe of a step hands over to its rest."""
        return self.probe.handed_bytes if self.probe is not None else 0

    def reuse_flops(self) -> int:
        """FLOPs of a reuse step; those of a full step where nothing is cached."""
        return self.cut.reuse_flops if self.cut is not None else self.full_flops

    def flops_of(self, name: str) -> int:
        """FLOPs of a step that a program computes."""
        return self.combined_flops.get(name, self.full_flops if name == "full" else self.reuse_flops())

    def flop_bound_speedup(self, num_steps: int) -> float:
        """Full FLOPs of `num_steps` steps over those that the schedule leaves: what caching can gain at most."""
        count = len(self.schedule.each)
        names = [program_name(self.schedule.fresh(step, num_steps), count) for step in range(num_steps)]
        spent = sum(map(self.flops_of, names))
        return num_steps * self.full_flops / spent if spent else 1.0

    def speedup_of(self, num_full: int, num_steps: int) -> float:
        """As `flop_bound_speedup`, with so many full steps, in all others of which everything is reused."""
        spent = num_full * self.full_flops + (num_steps - num_full) * self.reuse_flops()
        return num_steps * self.full_flops / spent if spent else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and YAML."""
        cut = self.cut
        return {
            "model": self.model,
            "schedule": self.schedule.describe(),
            "branches": self.branches,
            "hoisted": {"values": len(self.hoist.values), "bytes": self.hoist.num_bytes, "flops": self.hoist.flops},
            "full": {"flops": self.full_flops, "weight_bytes": self.weight_bytes},
            "reuse": None if cut is None else {"flops": cut.reuse_flops, "weight_bytes": cut.reuse_weight_bytes},
            "cut": None
            if cut is None
            else {"label": cut.label, "kept_bytes": self.kept_bytes, "slots": len(cut.slots)},
            "chunks": {name: _chunk_facts(chunk) for name, chunk in self.chunks.items()},
            "swap": None if self.swap is None else {"steps": list(self.swap.names), **self.swap.plan.as_dict()},
            "notes": list(self.notes),
        }

    def tables(self) -> list[Table]:
        """Rich tables: the programs, the cut, what was hoisted and, for `auto`, the candidates."""
        programs = Table(title=f"{self.model}: {self.schedule.describe()}", title_justify="left")
        for column in ("program", "GFLOP", "of full", "weights read", "state"):
            programs.add_column(column, justify="left" if column == "program" else "right")
        if self.hoist.values:
            held = f"{format_bytes(self.hoist.num_bytes)} in {len(self.hoist.values)} hoisted values"
            programs.add_row("prologue (once a run)", *_work(self.hoist.flops, self.full_flops), "", held)
        kept = f"{format_bytes(self.kept_bytes)} in {len(self.cut.slots)} slots" if self.cut else ""
        kept += f", extrapolated by order {self.highest_order}" if self.highest_order else ""
        programs.add_row("full", *_work(self.full_flops, self.full_flops), format_bytes(self.weight_bytes), kept)
        if self.probe is not None:
            decides = f"{format_bytes(self.probe.indicator_bytes)} kept, {format_bytes(self.handed_bytes)} handed over"
            programs.add_row(f"probe: {self.probe.label}", *_work(self.probe.flops, self.full_flops), "", decides)
        for name, flops in self.combined_flops.items():
            made = f"{format_bytes(sum(slot.num_bytes for slot in self.made_by(name)))} made afresh"
            programs.add_row(name, *_work(flops, self.full_flops), "", made)
        if self.cut is not None:
            programs.add_row(
                f"reuse: {self.cut.label}",
                *_work(self.cut.reuse_flops, self.full_flops),
                format_bytes(self.cut.reuse_weight_bytes),
                "",
            )
        tables = [programs]
        if self.chunks:
            tables += [_peak_table(self.chunks), _region_table(self.chunks)]
        if self.swap is not None:
            tables.append(_swap_table(self.swap))
        if self.candidates:
            tables.append(_candidate_table(self.candidates, self.full_flops))
        return tables

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, force_terminal=False, highlight=False)
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()


def _chunk_facts(chunk: ChunkPlan) -> dict[str, Any]:
    return {
        "peak_before": chunk.peak_before,
        "peak_after": chunk.peak_after,
        "budget": chunk.budget,
        "overhead": chunk.overhead,
        "limit_node": chunk.limit_node,
        "split_norms": len(chunk.split_norms),
        "recomputed": len(chunk.recomputed),
        "regions": [f"{r.first} .. {r.last}: {r.axis} in {r.count} chunks" for r in chunk.regions],
    }


def _peak_table(chunks: Mapping[str, ChunkPlan]) -> Table:
    table = Table(title="activations", title_justify="left")
    for column in ("program", "peak before", "peak after", "budget", "regions", "predicted overhead", "peak left at"):
        table.add_column(column, justify="left" if column in ("program", "peak left at") else "right")
    for name, chunk in chunks.items():
        sizes = map(format_bytes, (chunk.peak_before, chunk.peak_after, chunk.budget))
        table.add_row(name, *sizes, str(len(chunk.regions)), f"{chunk.overhead:.1%}", f"%{chunk.limit_node}")
    return table


def _region_table(chunks: Mapping[str, ChunkPlan]) -> Table:
    table = Table(title="regions", title_justify="left")
    for column in ("program", "from", "to", "cut", "chunks"):
        table.add_column(column, justify="right" if column == "chunks" else "left", overflow="fold")
    for name, chunk in chunks.items():
        for region in chunk.regions:
            table.add_row(name, f"%{region.first}", f"%{region.last}", str(region.axis), str(region.count))
    return table


def _period_text(swap: SwapSchedule) -> str:
    steps = f"{len(swap.names) // swap.branches} steps"
    return steps if swap.branches == 1 else f"{steps}, each with a call for each of {swap.branches} guidance branches"


def _swap_table(swap: SwapSchedule) -> Table:
    plan, steady = swap.plan, swap.plan.simulation.steady
    link, ops = swap.hardware.link, swap.workload.ops
    table = Table(title=f"swapped to {swap.tier}, in a period of {_period_text(swap)}", title_justify="left")
    table.add_column("")
    table.add_column("", overflow="fold")
    resident, movable = format_bytes(plan.resident_bytes), format_bytes(plan.movable_bytes)
    table.add_row("on the device", f"{format_bytes(plan.peak_bytes)} at most, within {format_bytes(plan.budget)}")
    table.add_row("the least possible", f"{format_bytes(plan.floor_bytes)}, set by %{ops[plan.floor_op].name}")
    table.add_row("stay there", f"{resident} of the {movable} that can be away")
    if swap.history_away:
        table.add_row("older values", "away, but where they are read")
    copied = f"{format_bytes(steady.to_device_bytes)} there, {format_bytes(steady.from_device_bytes)} back"
    table.add_row("copied", f"{copied}; {link.to_device / 1e9:.1f} and {link.from_device / 1e9:.1f} GB/s")
    waited, hidden = f"{1e3 * steady.stalled_seconds:.1f} ms waiting ({plan.slowdown:.1%})", plan.simulation.hidden
    predicted = f"{1e3 * plan.simulation.seconds:.1f} ms, of which {waited}; {hidden:.0%} of copying is hidden"
    table.add_row("predicted", predicted)
    for stall in sorted(steady.stalls, key=lambda stall: -stall.seconds)[:3]:
        table.add_row("waits", f"{1e3 * stall.seconds:.2f} ms at %{stall.name} for {stall.movable}: {stall.cause}")
    return table


def _candidate_table(candidates: tuple[CutChoice, ...], full_flops: int) -> Table:
    table = Table(title="candidate cuts, by reuse FLOPs", title_justify="left")
    for column in ("cut", "kept", "GFLOP", "of full", "weights read"):
        table.add_column(column, justify="left" if column == "cut" else "right")
    for cut in candidates:
        table.add_row(
            cut.label,
            format_bytes(cut.kept_bytes),
            *_work(cut.reuse_flops, full_flops),
            format_bytes(cut.reuse_weight_bytes),
        )
    return table


def _work(flops: int, full_flops: int) -> tuple[str, str]:
    return f"{flops / 1e9:.3f}", f"{flops / full_flops:.1%}" if full_flops else "-"


def make_plan(capture: Capture, policy: Policy, module: nn.Module) -> Plan:
    """Decide everything that the passes carry out.

    Raises:
        CutError: the policy's cut cannot be made in this graph.
    """
    graph = capture.graph_module.graph
    facts = GraphFacts(graph, capture.marks)
    hoist = plan_hoisting(facts, policy.max_hoisted_bytes) if policy.hoist else HoistPlan()
    step_graph, _ = copy_graph(graph)
    split_run_invariants(step_graph, plan=hoist)
    step = GraphFacts(step_graph, capture.marks, known_flops={node.name: count for node, count in facts.flops.items()})
    choice, candidates = choose_cuts(step, policy.caches, module)
    adaptive = policy.adaptive
    probe = plan_probe(step, adaptive, choice, module) if adaptive is not None and choice is not None else None
    notes = []
    if choice is not None and not choice.reads_latent and any(cache.interval != 1 for cache in policy.caches):
        notes.append(
            f"a reuse step of cut {choice.label} does not read the current latent: it repeats the last full step's"
            f" prediction; for a transformer Residual(first=..., last=...) keeps the latent"
        )
    if choice is not None and choice.reuse_flops > (1 - _LEAST_SAVED) * (whole := step.total_flops()):
        share = f"only {1 - choice.reuse_flops / whole:.1%} of a step's" if choice.reuse_flops < whole else "no"
        notes.append(f"cut {choice.label} saves {share} FLOPs; cut='auto' finds where more is saved")
    if policy.decode is not None and policy.decode.approximate and capture.layout.method == "decode":
        notes.append("approximate: frames of different slices are decoded as if they were of different videos")
    plan = Plan(
        model=type(module).__name__,
        policy=policy,
        schedule=Schedules.of(policy.caches),
        hoist=hoist,
        cut=choice,
        candidates=tuple(candidates),
        full_flops=step.total_flops(),
        weight_bytes=step.weight_bytes(),
        notes=tuple(notes),
        probe=probe,
        branches=(policy.calls_per_step or 1) if capture.layout.is_repeated else 1,
        output_bytes=sum(num_bytes(n) for n in outputs(graph) if isinstance(n, fx.Node)) if policy.guidance else 0,
    )
    notes += _notes_of_nesting(plan, step)
    return replace(plan, combined_flops=_combined_flops(plan, step), notes=tuple(notes))


def _combined_flops(plan: Plan, facts: GraphFacts) -> dict[str, int]:
    """FLOPs of the programs that compute some of what is kept."""
    nodes = {node.name: node for node in facts.graph.nodes}
    found = {}
    for name in plan.programs:
        if name not in ("full", "reuse"):
            kept, made = (kept_nodes(slots, nodes) for slots in (plan.read_by(name), plan.made_by(name)))
            found[name] = sum(facts.flops.get(node, 0) for node in reuse_nodes(facts.graph, kept, made))
    return found


def _notes_of_nesting(plan: Plan, facts: GraphFacts) -> Iterator[str]:
    """Which caches keep something inside of what another one saves."""
    nodes, caches = {node.name: node for node in facts.graph.nodes}, range(len(plan.policy.caches))
    of_cache = [kept_nodes([slot for slot in plan.slots if slot.cache == place], nodes) for place in caches]
    for outer, kept in enumerate(of_cache):
        computed = reuse_nodes(facts.graph, kept)
        for inner, others in enumerate(of_cache):
            if inner != outer and not any(node in computed for node, _ in others):
                yield (
                    f"what cache {inner} keeps lies in what cache {outer} saves: steps that reuse the latter compute"
                    f" the former all the same where its schedule says so"
                )
