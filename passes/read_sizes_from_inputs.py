"""Symbolic sizes are computed from the sizes of the call's tensors, and from nothing that a step computes."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from lightcache_fx.errors import PassError
from lightcache_fx.graphs import calls, expression, input_of, placeholders, tensors_of
from lightcache_fx.passes.base import PassResult

_SIZE = torch.ops.aten.sym_size.int


def read_sizes_from_inputs(graph: fx.Graph) -> PassResult:
    """Recompute every size of a computed tensor from the inputs (rematerialisation of shape arithmetic).

        %n : int(2*s0) = aten.sym_size.int(%h, 0)        ->   %s : int(s0) = aten.sym_size.int(%x, 0)
                                                              %n : int(2*s0) = mul(2, %s)

    Without it a reuse step, which reads no `%h`, would compute it only to ask for its size. Bitwise. Invariants: a size
    keeps its expression; no call but `sym_size` of an input of the call makes a size of a tensor.
    """
    found = [node for node in calls(graph) if _is_number(node) and _reads_computed_tensor(node)]
    if not found:
        return PassResult(graph, False)
    sizes = _sizes_of_inputs(graph)
    numbers: dict[sympy.Expr, Any] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in found:
        wanted = expression(node.meta["val"])
        if wanted not in numbers:
            with graph.inserting_before(first):
                numbers[wanted] = _computed(graph, wanted, sizes)
        number = numbers[wanted]
        for user in list(node.users):
            user.args, user.kwargs = _replaced((user.args, user.kwargs), node, number)
        graph.erase_node(node)
    return PassResult(graph, True, {"sizes": len(found)})


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _reads_computed_tensor(node: fx.Node) -> bool:
    return any(tensors_of(source) and not _is_of_call(source) for source in node.all_input_nodes)


def _is_of_call(node: fx.Node) -> bool:
    return node.op == "placeholder" and input_of(node).kind == "user"


def _sizes_of_inputs(graph: fx.Graph) -> dict[sympy.Symbol, tuple[fx.Node, int]]:
    """An input and its dimension for each symbol that is the size of one."""
    found: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
    for node in filter(_is_of_call, placeholders(graph)):
        for dim, size in enumerate(node.meta["val"].shape):
            symbol = expression(size)
            if isinstance(symbol, sympy.Symbol):
                found.setdefault(symbol, (node, dim))
    return found


def _computed(graph: fx.Graph, wanted: sympy.Expr, sizes: dict[sympy.Symbol, tuple[fx.Node, int]]) -> Any:
    """Calls that compute an expression, as a node; or a number where it is one."""
    unknown = [symbol for symbol in wanted.free_symbols if symbol not in sizes]
    if unknown:
        raise PassError(f"read_sizes_from_inputs: {unknown[0]} is the size of no input, so {wanted} cannot be computed")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    before = set(graph.nodes)
    made = {
        symbol: fx.Proxy(graph.call_function(_SIZE, sizes[symbol]), tracer)
        for symbol in sorted(wanted.free_symbols, key=str)
    }
    result = sympy_interp(PythonReferenceAnalysis, made, wanted)
    for node in graph.nodes:
        if node not in before:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)
    return result.node if isinstance(result, fx.Proxy) else int(result)


def _replaced(arguments: Any, node: fx.Node, number: Any) -> Any:
    return fx.map_arg(arguments, lambda source: number if source is node else source)
