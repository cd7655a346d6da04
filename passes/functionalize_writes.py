"""Writes in place to what a graph makes itself become values of their own."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from lightcache_fx.graphs import (
    ancestors,
    is_view,
    output_node,
    placeholders,
    returns_its_argument,
    tensors_of,
    writes_in_place,
    written_by,
)
from lightcache_fx.passes.base import PassResult

log = logging.getLogger(__name__)

_DETACH = torch.ops.aten.detach_.default
"""Writes nothing: it is in every graph whose model makes a tensor of Python data."""
_META = ("nn_module_stack", "stack_trace")


def functionalize_writes(graph: fx.Graph) -> PassResult:
    """Functionalisation (functorch), of what touches written memory alone.

        %e = aten.empty_like.default(%x)            ->   %e = aten.empty_like.default(%x)
        %s = aten.slice.Tensor(%e, 1, 0, 2)              %s = aten.slice.Tensor(%e, 1, 0, 2)
        %c = aten.copy_.default(%s, %y)                  %c = aten.copy.default(%s, %y)
        %z = aten.sin.default(%e)                        %w = aten.slice_scatter.default(%e, %c, 1, 0, 2)
                                                         %z = aten.sin.default(%w)

    From its allocation to the last write, what touches the memory is traced apart; later readers read the result. All
    else stays as it was traced, where `ExportedProgram.run_decompositions` traces all of it again. Bitwise.

    The values' storages must be as a trace made them (`meta["val"]`). A graph is left as it is where a write goes to an
    input, a list of tensors, or memory that a subgraph might touch, and where functorch takes no symbolic sizes.
    """
    touching = _touching(graph)
    if touching is None:
        return PassResult(graph, False)
    inside = set(touching)
    detached = [node for node in graph.nodes if node.target is _DETACH and node not in inside]
    inputs = list(dict.fromkeys(source for node in touching for source in node.all_input_nodes if source not in inside))
    results = [node for node in touching if any(user not in inside for user in node.users)]
    known = all(isinstance(node.meta.get("val"), torch.Tensor | torch.SymInt) for node in inputs)
    if not known or not all(isinstance(node.meta.get("val"), torch.Tensor) for node in results):
        return PassResult(graph, False)
    try:
        functional = _functional(touching, inputs, results) if touching else None
    except RuntimeError as error:  # some kernels of functorch's take no symbolic sizes
        log.debug("writes in place are left to a second trace: %s", str(error).partition("\n")[0])
        return PassResult(graph, False)
    if functional is not None:
        if writes_in_place(functional):
            return PassResult(graph, False)
        _put_in(graph, inside, inputs, results, functional)
        for node in reversed(touching):
            graph.erase_node(node)
    for node in detached:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    writes = sum(1 for node in touching for _ in written_by(node) if node.target is not _DETACH)
    return PassResult(graph, bool(touching or detached), {"writes": writes, "detached": len(detached)})


def _memory(node: fx.Node) -> set[int]:
    """Of a value's tensors, by the storages that tracing gave them."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_of(node)}  # noqa: SLF001 - the one identity it has


def _touching(graph: fx.Graph) -> list[fx.Node] | None:
    """What shares or reads written memory up to the last write to it, in order; None where that cannot be told."""
    nodes = list(graph.nodes)
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for value in written_by(node) if node.target is not _DETACH else ():
            if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
                return None
            last |= dict.fromkeys(_memory(value), index)
    sharing: dict[int, set[fx.Node]] = {memory: set() for memory in last}
    found: dict[fx.Node, None] = {}
    for index, node in enumerate(nodes):
        for memory in _memory(node) & last.keys():
            if not sharing[memory] and not _allocates(node):
                return None
            sharing[memory].add(node)
        sources = set(node.all_input_nodes)
        if any(index <= last[memory] and (node in known or sources & known) for memory, known in sharing.items()):
            found[node] = None
    calls = (isinstance(node.target, OpOverload) or node.target is operator.getitem for node in found)
    return list(found) if all(calls) else None


def _allocates(node: fx.Node) -> bool:
    """Whether an operator made the memory that a value is the first to have: tracing must know of every view."""
    return node.op == "call_function" and not (is_view(node) and returns_its_argument(node))


def _functional(touching: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
    """The calls alone, traced with fake tensors: functional, and as results what the memory holds in the end."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
    for node in touching:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in results))
    apart = fx.GraphModule({}, graph)
    fakes = [node.meta["val"] for node in inputs]
    mode = detect_fake_mode([node.meta["val"] for node in touching])
    assert mode is not None
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(functionalize(fx.Interpreter(apart).run))(*fakes)
    return traced.graph


def _put_in(
    graph: fx.Graph, inside: set[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node], functional: fx.Graph
) -> None:
    """Make each result of what was traced apart before it is first read."""
    ends: Any = output_node(functional).args[0]
    made = dict(zip(results, ends, strict=True))
    order = {node: index for index, node in enumerate(functional.nodes)}
    mapping = dict(zip(placeholders(functional), inputs, strict=True))
    for reader in [node for node in graph.nodes if node not in inside]:
        for result in [source for source in reader.all_input_nodes if source in made]:
            missing = ancestors([made[result]], stop=mapping.__contains__)
            with graph.inserting_before(reader):
                for part in sorted(missing, key=order.__getitem__):
                    mapping[part] = graph.node_copy(part, mapping.__getitem__)
                    known = {key: result.meta[key] for key in _META if key in result.meta}
                    mapping[part].meta = known | part.meta
            reader.replace_input_with(result, mapping[made[result]])
