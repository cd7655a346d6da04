"""Graphs for tests: a function or module, captured as the package captures it, before or after normalisation.

    given = captured(lambda sample, timestep: F.silu(sample) * timestep, x, t, normalized=False)
    after, result = given.apply(remove_noops)
    assert torch.equal(given.run(after), given.run())

Graphs are never built by hand: what a pass meets in a test is what export makes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from lightcache_fx import capture as capture_module
from lightcache_fx import passes as passes_package
from lightcache_fx.calls import Call, CallReader
from lightcache_fx.capture import Capture
from lightcache_fx.cuts import GraphFacts
from lightcache_fx.graphs import copy_graph, input_of, placeholders
from lightcache_fx.module_state import weight_slots
from lightcache_fx.passes.base import Pass, PassResult, run_passes
from lightcache_fx.policy import Rate


@dataclass(frozen=True)
class Captured:
    """A capture with what it was made from."""

    module: nn.Module
    call: Call
    capture: Capture

    @property
    def graph_module(self) -> fx.GraphModule:
        return self.capture.graph_module

    @property
    def facts(self) -> GraphFacts:
        return GraphFacts(self.graph_module.graph, self.capture.marks)

    def copy(self) -> fx.GraphModule:
        """The graph once more, to be rewritten."""
        graph, _ = copy_graph(self.graph_module.graph)
        return fx.GraphModule(self.graph_module, graph, class_name="Copy")

    def apply(self, *passes: Pass, keeps_outputs: bool = True) -> tuple[fx.GraphModule, PassResult]:
        """Run passes on a copy through the runner, `modified` checked; returns the copy and the last result."""
        graph_module = self.copy()
        return graph_module, apply_to(graph_module, *passes, keeps_outputs=keeps_outputs)

    def run(
        self,
        graph_module: fx.GraphModule | None = None,
        tensors: Sequence[torch.Tensor] | None = None,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Run a graph made from this capture: its inputs are found by their bindings.

        Args:
            graph_module: by default the capture itself.
            tensors: the call's tensors, by default those it was captured with.
            state: slots and hoisted values by name.
        """
        graph_module = graph_module or self.graph_module
        weights = weight_slots(self.module)
        names = [leaf.name for leaf in self.capture.layout.leaves]
        users = dict(zip(names, self.call.tensors if tensors is None else tensors, strict=True))
        args: list[Any] = []
        for node in placeholders(graph_module.graph):
            binding = input_of(node)
            match binding.kind:
                case "weight":
                    table, key = weights[binding.name]
                    args.append(table[key])
                case "user":
                    args.append(users[binding.name])
                case "constant":
                    args.append(self.capture.constants[binding.name])
                case _:
                    args.append((state or {})[binding.name])
        with torch.no_grad():
            return tuple(graph_module.forward(*args))

    def eager(self, tensors: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.call.layout.rebuild(self.call.tensors if tensors is None else tensors)
        with torch.no_grad():
            output = self.module(*args, **kwargs)
        return output if isinstance(output, tuple) else (output,)


def apply_to(graph_module: fx.GraphModule, *passes: Pass, keeps_outputs: bool = True) -> PassResult:
    """Run passes in place through the runner; returns the last result."""
    named = [(f"{index}: {inspect.unwrap(getattr(p, 'func', p)).__name__}", p) for index, p in enumerate(passes)]
    results = run_passes(graph_module.graph, named, keeps_outputs=keeps_outputs, check_modified=True)
    graph_module.recompile()
    return results[named[-1][0]]


def as_module(function: Callable[..., Any]) -> nn.Module:
    """A module whose forward is a plain function."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *inspect.signature(function).parameters.values()])  # type: ignore[attr-defined]
    return type("Function", (nn.Module,), {"forward": forward})().eval()  # type: ignore[no-any-return]


def captured(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    rates: Mapping[str, Rate] | None = None,
    mark: Sequence[str] = (),
    normalized: bool = True,
    **kwargs: Any,
) -> Captured:
    """Capture `model(*args, **kwargs)`; with `normalized=False` as export left it."""
    module = model if isinstance(model, nn.Module) else as_module(model)
    call = CallReader(module, rates=rates or {}).read(args, kwargs)
    with contextlib.nullcontext() if normalized else _raw():
        return Captured(module, call, capture_module.capture(module, call, mark=mark))


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Captures are neither normalised nor compared with eager (a model that draws random numbers would not pass)."""
    with (
        mock.patch.object(passes_package, "normalize", lambda graph_module: graph_module),
        mock.patch.object(capture_module, "check_against_eager"),
    ):
        yield


def operators(graph: fx.Graph | fx.GraphModule) -> list[str]:
    """The names of what a graph calls, in order."""
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else graph.nodes
    return [str(node.target) for node in nodes if node.op in ("call_function", "call_module")]
