"""Programs: pure functions `(inputs, state) -> (outputs, state)` held as graphs, one per kind of denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lightcache_fx.capture import Capture
from lightcache_fx.cuts import Slot
from lightcache_fx.flops import total_flops
from lightcache_fx.graphs import GraphInput, copy_graph, input_of, num_bytes, outputs, placeholders
from lightcache_fx.module_state import weight_slots
from lightcache_fx.passes.base import Pass, run_passes
from lightcache_fx.passes.read_cache import read_cache
from lightcache_fx.passes.remove_dead_code import remove_dead_code
from lightcache_fx.passes.remove_marks import remove_marks
from lightcache_fx.passes.split_run_invariants import prologue_of, split_run_invariants
from lightcache_fx.passes.write_cache import write_cache
from lightcache_fx.plan import Plan


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
    def num_nodes(self) -> int:
        """Calls in the graph."""
        return sum(node.op in ("call_function", "call_module") for node in self.graph_module.graph.nodes)

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
    slots = plan.cut.slots if plan.cut is not None else ()
    num_outputs = len(outputs(capture.graph_module.graph))
    programs = {}
    if plan.hoist.values:
        prologue = prologue_of(capture.graph_module.graph, plan=plan.hoist)
        run_passes(prologue, [("remove_marks", remove_marks)])
        programs["prologue"] = _program("prologue", capture, prologue, num_outputs=0)
    for name, passes in _pipelines(plan, slots).items():
        graph, _ = copy_graph(capture.graph_module.graph)
        run_passes(graph, passes, keeps_outputs=name != "full")
        programs[name] = _program(name, capture, graph, num_outputs=num_outputs)
    return programs


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
    graph_module = fx.GraphModule(capture.graph_module, graph, class_name=name.capitalize())
    return Program(name, graph_module, tuple(map(input_of, placeholders(graph))), num_outputs)


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
