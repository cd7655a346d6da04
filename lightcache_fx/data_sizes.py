"""Sizes that depend on data, as numbers: at their bounds, or as the call that was captured has shown them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from lightcache_fx.graphs import UNBOUNDED

_SEEN: weakref.WeakKeyDictionary[ShapeEnv, dict[sympy.Symbol, int]] = weakref.WeakKeyDictionary()
"""Of each trace, what its symbols were."""


def agreeing_size(size: int | torch.SymInt, *, as_seen: bool = False) -> int:
    """As `graphs.concrete_size`, but sizes that are computed from one another agree with each other.

    Bounds of each one by itself would not: where `n` is at most 7, `n + (7 - n)` is 7.

    Args:
        size: symbolic or not.
        as_seen: sizes that depend on data are what they were in the call that was captured, where `note_sizes` has
            seen that; they then agree even where the trace does not know that they must.
    """
    if isinstance(size, int):
        return size
    node = size.node
    if node.has_hint():
        return int(node.hint)
    ranges, seen = node.shape_env.var_to_range, _SEEN.get(node.shape_env, {})
    values = {}
    for symbol in node.expr.free_symbols:
        upper = ranges[symbol].upper
        is_bounded = bool(upper.is_number) and upper < UNBOUNDED and not (as_seen and symbol in seen)
        values[symbol] = upper if is_bounded else seen.get(symbol, 1)
    return max(0, int(node.expr.subs(values)))  # bounds of sizes that are not independent may be no sizes


def depends_on_data(node: fx.Node) -> bool:
    """Whether a node, or what it reads, has sizes that no call shows by its inputs."""
    values = [leaf for n in (node, *node.all_input_nodes) for leaf in pytree.tree_leaves(n.meta.get("val"))]
    numbers = [n for leaf in values for n in (leaf.shape if isinstance(leaf, torch.Tensor) else [leaf])]
    return any(isinstance(number, torch.SymInt) and not number.node.has_hint() for number in numbers)


def note_sizes(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> None:
    """Run a graph to see its sizes that depend on data; a graph that has none is not run."""
    if any(map(depends_on_data, graph_module.graph.nodes)):
        _SizesOf(graph_module).run(*arguments)


class _SizesOf(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        leaves = zip(pytree.tree_leaves(n.meta.get("val")), pytree.tree_leaves(result), strict=False)
        for expected, found in leaves:
            are_tensors = isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)
            for size, number in zip(expected.shape, found.shape, strict=True) if are_tensors else [(expected, found)]:
                if isinstance(size, torch.SymInt) and isinstance(expr := size.node.expr, sympy.Symbol):
                    _SEEN.setdefault(size.node.shape_env, {})[expr] = int(number)
        return result
