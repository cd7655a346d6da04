"""The shape of a pass and the runner that holds passes to it.

A pass is `verb_noun(graph, *, plan...) -> PassResult`: it rewrites the graph that it is given and says truthfully
whether the printed text changed. The runner checks that, the graph's well-formedness and the input/output contract
after every pass, and names the pass that broke one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lightcache_fx.errors import PassError
from lightcache_fx.graphs import (
    GraphInput,
    drop_unused_inputs,
    eliminate_dead_code,
    expression,
    is_impure,
    outputs,
    placeholders,
    tensors_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph: the graph that was given, rewritten in place.
        modified: true exactly when its printed text changed.
        counts: what was done how often, for the log and the plan.
    """

    graph: fx.Graph
    modified: bool
    counts: dict[str, int] = field(default_factory=dict)


Pass = Callable[[fx.Graph], PassResult]


def run_passes(
    graph: fx.Graph, passes: Sequence[tuple[str, Pass]], *, keeps_outputs: bool = True, check_modified: bool = False
) -> dict[str, PassResult]:
    """Run passes in order and verify after each.

    Args:
        graph: rewritten in place.
        passes: `(name, pass)`; the name is the one in logs and messages.
        keeps_outputs: whether number, shapes and dtypes of the outputs must stay.
        check_modified: compare printed texts with `modified` (tests; costs a print a pass).

    Raises:
        PassError: a pass left an ill-formed graph, changed the outputs, or was untruthful about `modified`.
    """
    from lightcache_fx.printer import format_graph

    results: dict[str, PassResult] = {}
    contract = _contract(graph)
    for name, apply in passes:
        before = format_graph(graph) if check_modified else ""
        num_nodes, begin = len(graph.nodes), time.perf_counter()
        result = apply(graph)
        seconds = time.perf_counter() - begin
        done = ", ".join(results) or "none"
        try:
            graph.lint()
        except (RuntimeError, AssertionError) as error:
            raise PassError(f"pass {name} left an ill-formed graph: {error} (passes before it: {done})") from error
        untyped = next(
            (n for n in graph.nodes if n.op == "call_function" and not is_impure(n) and "val" not in n.meta), None
        )
        if untyped is not None:
            raise PassError(f"pass {name} left %{untyped.name} without a type (passes before it: {done})")
        if keeps_outputs and _contract(graph) != contract:
            raise PassError(
                f"pass {name} changed the outputs: expected {contract}, got {_contract(graph)} (before it: {done})"
            )
        if check_modified and (format_graph(graph) != before) != result.modified:
            raise PassError(f"pass {name} says modified={result.modified}, but the printed graph says otherwise")
        counts = " ".join(f"{key}={count}" for key, count in result.counts.items())
        log.debug(
            "pass %s: %d -> %d nodes in %.2f ms%s%s",
            name,
            num_nodes,
            len(graph.nodes),
            1e3 * seconds,
            "" if result.modified else ", unmodified",
            f", {counts}" if counts else "",
        )
        results[name] = result
    return results


def _contract(graph: fx.Graph) -> tuple[object, ...]:
    """Shapes and dtypes of the outputs; inputs may only be dropped, which the placeholders themselves show."""
    assert all("lightcache_input" in node.meta for node in placeholders(graph))
    return tuple(
        tuple((tuple(map(expression, t.shape)), t.dtype) for t in tensors_of(value))
        if isinstance(value, fx.Node)
        else value
        for value in outputs(graph)
    )


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and all strides: kernels look at those of size 1 as well."""
    kinds = [(tensor.dtype, tensor.device, tensor.layout) for tensor in (a, b)]
    numbers = [list(map(expression, (*tensor.shape, *tensor.stride()))) for tensor in (a, b)]
    return kinds[0] == kinds[1] and numbers[0] == numbers[1]


def find_kept(by_name: Mapping[str, fx.Node], name: str, pass_name: str) -> fx.Node:
    """The node that a plan names, or a `PassError` where the graph is not the one that was planned for."""
    if name not in by_name:
        raise PassError(
            f"{pass_name}: the graph has no node %{name}; was the pass applied to it already,"
            f" or the plan made for another graph?"
        )
    return by_name[name]


def typed_call(graph: fx.Graph, target: torch._ops.OpOverload, *args: Any) -> fx.Node:
    """A new call where the graph inserts now, its type found by running it on the arguments' fake values."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def read_from_input(graph: fx.Graph, names: Iterable[str], given: Callable[[str], GraphInput], suffix: str) -> int:
    """Replace nodes by inputs named after them, and remove what becomes dead; returns how many there were."""
    by_name = {node.name: node for node in graph.nodes}
    first = next(iter(graph.nodes))
    moved = 0
    for name in names:
        node = by_name.get(name)
        if node is None or node.op == "placeholder":
            continue
        with graph.inserting_before(first):
            held = graph.placeholder(f"{name}_{suffix}")
        held.meta = {"val": node.meta["val"], "lightcache_input": given(name)}
        node.replace_all_uses_with(held)
        moved += 1
    if moved:
        eliminate_dead_code(graph)
        drop_unused_inputs(graph, ("weight", "constant", "hoisted", "user"))
    return moved
