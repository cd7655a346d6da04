"""Writes in place to what a graph has made itself, made functional where they stand: the rest is not traced again.

`ExportedProgram.run_decompositions` does this for a whole program, and takes several times as long as the export.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lightcache_fx.graphs import (
    alias_root,
    ancestors,
    is_view,
    output_node,
    placeholders,
    returns_its_argument,
    schema_of,
    tensors_of,
)

_DETACH = torch.ops.aten.detach_.default
"""Writes nothing: it is in every graph whose model makes a tensor of Python data."""
_META = ("nn_module_stack", "stack_trace")


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether a call writes to one of its arguments."""
    return any((schema := schema_of(node)) is not None and schema.is_mutable for node in graph.nodes)


def written_input(graph: fx.Graph) -> fx.Node | None:
    """A placeholder whose memory a call writes to; None where there is none."""
    roots = (alias_root(value) for node in graph.nodes for value in _written(node) if isinstance(value, fx.Node))
    return next((root for root in roots if root.op == "placeholder"), None)


def without_local_writes(graph_module: fx.GraphModule) -> fx.GraphModule | None:
    """The same program with no write in place, or None where that needs the whole of it to be traced again.

    All that touches written memory, from its allocation to the last write, is traced apart by functorch's
    `functionalize`; what reads it later reads the result.

    Args:
        graph_module: as `torch.export` gives it: values know what memory they share (`meta["val"]`).

    Returns:
        None where what is written was not made by an operator in the graph, where a subgraph might touch it, or where
        sizes are symbolic.
    """
    graph = graph_module.graph
    touching = _touching(graph)
    if touching is None:
        return None
    inside = set(touching)
    inputs = list(dict.fromkeys(source for node in touching for source in node.all_input_nodes if source not in inside))
    results = [node for node in touching if any(user not in inside for user in node.users)]
    if not all(isinstance(node.meta.get("val"), torch.Tensor) for node in (*inputs, *results)):
        return None
    functional = _functional(graph_module, touching, inputs, results)
    made = _put_together(graph_module, inputs, results, functional, inside)
    return None if writes_in_place(made.graph) else made


def _memory(node: fx.Node) -> set[int]:
    """Of a value's tensors, by the storages that tracing gave them."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_of(node)}  # noqa: SLF001 - the one identity it has


def _touching(graph: fx.Graph) -> list[fx.Node] | None:
    """What shares or reads written memory up to the last write to it, in order; None where that cannot be told."""
    nodes = list(graph.nodes)
    if any(map(_is_symbolic, nodes)):
        return None
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for value in _written(node):
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


def _is_symbolic(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or any(
        isinstance(number, torch.SymInt) for tensor in tensors_of(node) for number in (*tensor.shape, *tensor.stride())
    )


def _written(node: fx.Node) -> Iterator[object]:
    """The arguments that a call writes to."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable or node.target == _DETACH:
        return
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield given.get(argument.name)


def _functional(
    graph_module: fx.GraphModule, touching: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node]
) -> fx.Graph:
    """The calls alone, traced with fake tensors: functional, and as results what the memory holds in the end."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
    for node in touching:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in results))
    if not touching:
        return graph
    apart = fx.GraphModule(graph_module, graph)
    fakes = [node.meta["val"] for node in inputs]
    mode = detect_fake_mode([node.meta["val"] for node in touching])
    assert mode is not None
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(functionalize(fx.Interpreter(apart).run))(*fakes)
        FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*fakes)  # else some values are of another mode
    return traced.graph


def _put_together(
    graph_module: fx.GraphModule,
    inputs: Sequence[fx.Node],
    results: Sequence[fx.Node],
    functional: fx.Graph,
    inside: set[fx.Node],
) -> fx.GraphModule:
    """The graph with each result of what was traced apart made where it is first read."""
    ends: Any = output_node(functional).args[0]
    made = dict(zip(results, ends, strict=True))
    outer = dict(zip(placeholders(functional), inputs, strict=True))
    order = {node: index for index, node in enumerate(functional.nodes)}
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}

    def read(node: fx.Node) -> fx.Node:
        if node not in made:
            return mapping[node]
        for part in sorted(ancestors([made[node]], stop=mapping.__contains__), key=order.__getitem__):
            if part in outer:
                mapping[part] = mapping[outer[part]]
            else:
                mapping[part] = graph.node_copy(part, mapping.__getitem__)
                mapping[part].meta = {key: node.meta[key] for key in _META if key in node.meta} | part.meta
        return mapping[made[node]]

    for node in graph_module.graph.nodes:
        if node.target == _DETACH and node not in inside:
            mapping[node] = read(node.args[0])
        elif node not in inside:
            mapping[node] = graph.node_copy(node, read)
    return fx.GraphModule(graph_module, graph)
