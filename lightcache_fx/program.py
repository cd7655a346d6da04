"""Programs: pure functions `(inputs, state) -> (outputs, state)` held as graphs, one per kind of denoising step."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lightcache_fx.capture import Capture
from lightcache_fx.chunk_planner import ChunkPlan, Request, plan_program
from lightcache_fx.cuts import Slot
from lightcache_fx.errors import BudgetError
from lightcache_fx.flops import total_flops
from lightcache_fx.graphs import GraphInput, copy_graph, describe, input_of, num_bytes, outputs, placeholders
from lightcache_fx.liveness import timeline
from lightcache_fx.module_state import weight_slots
from lightcache_fx.passes.base import Pass, run_passes
from lightcache_fx.passes.chunk_regions import chunked_copy
from lightcache_fx.passes.read_cache import read_cache
from lightcache_fx.passes.remove_dead_code import remove_dead_code
from lightcache_fx.passes.remove_marks import remove_marks
from lightcache_fx.passes.split_run_invariants import prologue_of, split_run_invariants
from lightcache_fx.passes.write_cache import write_cache
from lightcache_fx.plan import Plan
from lightcache_fx.units import format_bytes

_PLAN_TRIES = 3


@dataclass(frozen=True)
class Program:
    """One static program.

    Attributes:
        name: `prologue`, `full` or `reuse`.
        graph_module: the graph; its placeholders carry `GraphInput` bindings.
        inputs: the bindings in order.
        num_outputs: how many of the returned tensors are the model's; the rest is state.
    """

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[GraphInput, ...]
    num_outputs: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that one run of the program reads."""
        return sum(num_bytes(n) for n in placeholders(self.graph_module.graph) if input_of(n).kind == "weight")

    @property
    def flops(self) -> int:
        """FLOPs of one run."""
        return total_flops(self.graph_module.graph)


def build_programs(capture: Capture, plan: Plan) -> dict[str, Program]:
    """Carry out a plan: the captured graph becomes `full`, and `prologue` and `reuse` where the plan asks for them."""
    num_outputs = len(outputs(capture.graph_module.graph))
    programs = {}
    for name, graph in _whole_graphs(capture, plan).items():
        if name in plan.chunks:
            plan.chunks[name].chunking.apply(graph)
        programs[name] = _program(name, capture, graph, num_outputs=0 if name == "prologue" else num_outputs)
    return programs


def with_chunks(capture: Capture, plan: Plan, *, cuda: bool | None = None) -> Plan:
    """The plan with the regions of each of its programs, where its policy asks for chunks or has a budget.

    Args:
        capture: of the model.
        plan: what was decided before.
        cuda: predict memory for a CUDA device or for the CPU; by default for the one that the values are on.

    Raises:
        BudgetError: a program's peak stays above the budget whatever is cut.
        RegionError: an explicit region that does not exist in any program, or that cannot be cut.
    """
    policy = plan.policy
    frames = policy.frames_at_a_time() if capture.layout.method != "forward" else None
    if policy.chunk is None and policy.memory_budget is None and frames is None:
        return plan
    explicit = policy.chunk.regions if policy.chunk is not None else []
    chunks = {}
    for name, graph in _whole_graphs(capture, plan).items():
        regions = explicit if name != "prologue" else []
        whole = fx.GraphModule(_modules(capture, graph), graph)
        layers = policy.chunk.layers if policy.chunk is not None and name != "prologue" else None
        request = Request(_budget(plan, name, whole.graph, cuda), regions, frames, cuda, layers=layers)
        chunks[name] = _plan_exactly(whole, request)
        if not chunks[name].fits:
            raise BudgetError(_explain_floor(plan, name, chunks[name], graph), chunks[name].peak_after)
    return replace(plan, chunks=chunks)


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


def _budget(plan: Plan, name: str, graph: fx.Graph, cuda: bool | None) -> int | None:
    """Bytes for the activations of a program."""
    asked = plan.policy.chunk.budget if plan.policy.chunk is not None else None
    if isinstance(asked, str):
        asked = int(float(asked.removesuffix("%")) / 100 * timeline(graph, cuda=cuda).peak_bytes)
    if plan.policy.memory_budget is None:
        return asked
    held = plan.weight_bytes + plan.hoist.num_bytes + (plan.kept_bytes if name == "reuse" else 0)
    left = plan.policy.memory_budget - held
    if left <= 0:
        raise BudgetError(
            f"memory_budget: {format_bytes(plan.policy.memory_budget)} is less than the {format_bytes(held)} that"
            f" {plan.model} holds beside activations: weights {format_bytes(plan.weight_bytes)}, hoisted values"
            f" {format_bytes(plan.hoist.num_bytes)}, cached values {format_bytes(plan.kept_bytes)}; raise it, load the"
            f" model in half precision, or offload it"
        )
    return left if asked is None else min(left, asked)


def _explain_floor(plan: Plan, name: str, chunk: ChunkPlan, graph: fx.Graph) -> str:
    limit = next((describe(node) for node in graph.nodes if node.name == chunk.limit_node), f"%{chunk.limit_node}")
    return (
        f"budget: the activations of {plan.model}'s {name} program cannot be cut to {format_bytes(chunk.budget)}; the"
        f" least that chunking reaches is {format_bytes(chunk.peak_after)} (from {format_bytes(chunk.peak_before)}),"
        f" set by {limit}; raise the budget to that, or make the latent smaller"
    )


def _whole_graphs(capture: Capture, plan: Plan) -> dict[str, fx.Graph]:
    """The programs' graphs before anything is chunked."""
    slots = plan.cut.slots if plan.cut is not None else ()
    graphs = {}
    if plan.hoist.values:
        graphs["prologue"] = prologue_of(capture.graph_module.graph, plan=plan.hoist)
        run_passes(graphs["prologue"], [("remove_marks", remove_marks)])
    for name, passes in _pipelines(plan, slots).items():
        graphs[name], _ = copy_graph(capture.graph_module.graph)
        run_passes(graphs[name], passes, keeps_outputs=name != "full")
    return graphs


def _pipelines(plan: Plan, slots: Sequence[Slot]) -> dict[str, list[tuple[str, Pass]]]:
    """The passes of each program, in order."""
    split: tuple[str, Pass] = ("split_run_invariants", partial(split_run_invariants, plan=plan.hoist))
    clean: list[tuple[str, Pass]] = [
        ("remove_marks", remove_marks),  # last: slots are named after marked places
        ("remove_dead_code", remove_dead_code),
    ]
    pipelines: dict[str, list[tuple[str, Pass]]] = {
        "full": [split, ("write_cache", partial(write_cache, slots=slots)), *clean]
    }
    if slots:
        pipelines["reuse"] = [split, ("read_cache", partial(read_cache, slots=slots)), *clean]
    return pipelines


def _program(name: str, capture: Capture, graph: fx.Graph, *, num_outputs: int) -> Program:
    graph_module = fx.GraphModule(_modules(capture, graph), graph, class_name=name.capitalize())
    return Program(name, graph_module, tuple(map(input_of, placeholders(graph))), num_outputs)


def _modules(capture: Capture, graph: fx.Graph) -> dict[str, Any]:
    """What a graph's nodes call by name: the capture's opaque submodules and subgraphs, and chunked regions."""
    return {
        str(node.target): node.meta["lightcache_region"]
        if "lightcache_region" in node.meta
        else operator.attrgetter(str(node.target))(capture.graph_module)
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }


class BoundProgram:
    """A program and where its inputs come from in one live module, so that a call is a list of lookups.

    Weights are looked up in the module's own tables at every call: `.to()`, fused adapters and in-place edits are seen.
    """

    def __init__(
        self, program: Program, module: nn.Module, constants: Mapping[str, torch.Tensor], user_names: Sequence[str]
    ) -> None:
        self.program = program
        tables = weight_slots(module)
        index = {name: i for i, name in enumerate(user_names)}
        self._weights = [tables[i.name] for i in program.inputs if i.kind == "weight"]
        keys: dict[str, Mapping[str, Any]] = {"constant": constants, "user": index}
        self._sources: list[tuple[str, Any]] = [
            (i.kind, keys[i.kind][i.name] if i.kind in keys else i.name) for i in program.inputs
        ]
        self.user_inputs = [index[i.name] for i in program.inputs if i.kind == "user"]
        self._run = program.graph_module.forward

    def weights(self) -> list[torch.Tensor]:
        """The weights that the program reads, as they are now."""
        return [table[name] for table, name in self._weights]

    def __call__(
        self, tensors: Sequence[torch.Tensor], slots: Mapping[str, torch.Tensor], hoisted: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run once: the model's output tensors, and the state that the program returns."""
        weights = iter(self.weights())
        args: list[Any] = []
        for kind, key in self._sources:
            match kind:
                case "weight":
                    args.append(next(weights))
                case "user":
                    args.append(tensors[key])
                case "slot":
                    args.append(slots[key])
                case "hoisted":
                    args.append(hoisted[key])
                case _:
                    args.append(key)
        results = list(self._run(*args))
        return results[: self.program.num_outputs], results[self.program.num_outputs :]
