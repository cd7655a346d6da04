"""Which sizes a graph of symbols holds for: what its trace took for granted of them, asked of a call before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from lightcache_fx.calls import CallLayout, TensorType
from lightcache_fx.capture import Capture
from lightcache_fx.errors import CaptureError
from lightcache_fx.graphs import expression, input_of, placeholders
from lightcache_fx.tracing import Varying

SMALLEST = 2
"""Of a size that varies: at 0 and 1 kernels and broadcasting do something else, so export takes neither for granted."""

Values = Mapping[sympy.Symbol, int]


def pattern_of(layout: CallLayout) -> CallLayout:
    """The layout with every size that may vary left out: equal for calls that one dynamic capture may serve."""
    types = tuple(
        TensorType(
            tuple(-1 if size >= SMALLEST else size for size in t.shape), None if t.strides is None else (), *t[2:]
        )
        for t in layout.tensor_types
    )
    return replace(layout, tensor_types=types)


def differences(one: CallLayout, other: CallLayout) -> dict[int, tuple[int, ...]]:
    """The dimensions in which two layouts of one pattern differ, by the place of the input."""
    found = {}
    for index, (a, b) in enumerate(zip(one.tensor_types, other.tensor_types, strict=True)):
        dims = tuple(dim for dim, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes[0] != sizes[1])
        if dims:
            found[index] = dims
    return found


@dataclass(frozen=True)
class Sizes:
    """What a dynamic capture holds for.

    Attributes:
        layout: that it was captured for.
        shapes: sizes of each input, as numbers and expressions of symbols.
        strides: likewise.
        symbols: an input and its dimension for each symbol, whose size it is.
        conditions: what must hold of the symbols.
    """

    layout: CallLayout
    shapes: tuple[tuple[sympy.Expr, ...], ...]
    strides: tuple[tuple[sympy.Expr, ...], ...]
    symbols: Mapping[sympy.Symbol, tuple[int, int]]
    conditions: tuple[sympy.Basic, ...]

    @classmethod
    def of(cls, captured: Capture) -> Sizes:
        """Read from a graph's inputs, and from the environment in which it was traced.

        Raises:
            CaptureError: a symbol is not the size of an input, or depends on data.
        """
        leaves = {leaf.name: index for index, leaf in enumerate(captured.layout.leaves)}
        given: dict[int, torch.Tensor] = {}
        for node in placeholders(captured.graph_module.graph):
            if input_of(node).kind == "user":
                given[leaves[input_of(node).name]] = node.meta["val"]
        shapes, strides = (
            tuple(tuple(sympy.sympify(expression(n)) for n in numbers(given[i])) for i in range(len(leaves)))
            for numbers in (torch.Tensor.size, torch.Tensor.stride)
        )
        symbols: dict[sympy.Symbol, tuple[int, int]] = {}
        for index, shape in enumerate(shapes):
            for dim, size in enumerate(shape):
                if isinstance(size, sympy.Symbol):
                    symbols.setdefault(size, (index, dim))
        environment = _environment_of(captured.graph_module.graph)
        values = (node.meta.get("val") for node in captured.graph_module.graph.nodes)
        used = [sympy.sympify(number) for value in values for number in _numbers_of(value)]
        used += [size for shape in shapes for size in shape]
        known = symbols.keys() | set[sympy.Basic]().union(*(expr.free_symbols for expr in used))
        taken = _conditions(environment) if environment is not None else ()
        # Of symbols that nothing has a size of (an argument is a view, and of the tensor behind it) nothing follows.
        conditions = tuple(c for c in taken if not c.free_symbols or c.free_symbols & known)
        for expr in (*used, *conditions):
            unknown = sorted(map(str, expr.free_symbols - symbols.keys()))
            if unknown:
                raise CaptureError(f"{unknown[0]} in {expr} is not the size of an input")
        return cls(captured.layout, shapes, strides, symbols, conditions)

    def is_open(self, varying: Varying) -> bool:
        """Whether all of these dimensions are symbols, or computed from symbols."""
        return not self.fixed(varying)

    def fixed(self, varying: Varying) -> list[str]:
        """Those of the dimensions that the trace has made numbers of, in words."""
        return [
            f"{self.layout.leaves[index].name}.shape[{dim}] is {self.shapes[index][dim]}"
            for index, dims in varying.items()
            for dim in dims
            if self.shapes[index][dim].is_number
        ]

    def values(self, layout: CallLayout) -> dict[sympy.Symbol, int]:
        """The symbols' values for a layout of the same pattern."""
        types = layout.tensor_types
        return {symbol: types[index].shape[dim] for symbol, (index, dim) in self.symbols.items()}

    def why_not(self, layout: CallLayout) -> str:
        """What does not hold for a layout of the same pattern; empty where the capture is valid for it."""
        values = self.values(layout)
        for symbol, value in values.items():
            if value < SMALLEST:
                return f"{symbol} is {value}"
        for leaf, type_, shape, strides in zip(
            layout.leaves, layout.tensor_types, self.shapes, self.strides, strict=True
        ):
            for dim, (size, expr) in enumerate(zip(type_.shape, shape, strict=True)):
                if at(expr, values) != size:
                    return f"{leaf.name}.shape[{dim}] is {size}, where {_where(expr, values)} is expected"
            for dim, (stride, expr) in enumerate(zip(_strides(type_), strides, strict=True)):
                if type_.shape[dim] > 1 and at(expr, values) != stride:
                    return f"{leaf.name}.stride({dim}) is {stride}, where {_where(expr, values)} is expected"
        for condition in self.conditions:
            if at(condition, values) != sympy.true:
                return f"{condition} does not hold for {', '.join(f'{s} = {v}' for s, v in values.items())}"
        return ""

    def __str__(self) -> str:
        dims = [
            f"{leaf.name}.shape[{dim}] = {size}"
            for leaf, shape in zip(self.layout.leaves, self.shapes, strict=True)
            for dim, size in enumerate(shape)
            if not size.is_number
        ]
        return ", ".join(dims)


def _where(expr: sympy.Expr, values: Values) -> str:
    return str(expr) if expr.is_number else f"{expr} = {at(expr, values)}"


def _strides(type_: TensorType) -> tuple[int, ...]:
    if type_.strides is not None:
        return type_.strides
    strides, below = [], 1
    for size in reversed(type_.shape):
        strides.append(below)
        below *= max(1, size)
    return tuple(reversed(strides))


def at(expr: sympy.Basic, values: Values) -> Any:
    """An expression with its symbols replaced by their values."""
    return expr.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})


def _numbers_of(value: object) -> Iterable[Any]:
    """The sizes, strides and symbolic numbers of a node's value, as expressions."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield from map(expression, (*leaf.shape, *leaf.stride(), leaf.storage_offset()))
        elif isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
            yield leaf.node.expr


def _environment_of(graph: fx.Graph) -> ShapeEnv | None:
    found: dict[int, ShapeEnv] = {}
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            symbolic = [leaf] if not isinstance(leaf, torch.Tensor) else [*leaf.shape, *leaf.stride()]
            for number in symbolic:
                if isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool):
                    found[id(number.node.shape_env)] = number.node.shape_env
    if len(found) > 1:
        raise CaptureError("sizes of the graph are symbols of several traces")
    return next(iter(found.values()), None)


def _conditions(environment: ShapeEnv) -> tuple[sympy.Basic, ...]:
    """What a trace took for granted of the symbols that are left: its guards, and the range of each symbol."""
    found: dict[sympy.Basic, None] = {}
    for guard in environment.guards:
        found[environment.replace(guard.expr)] = None
    for symbol, span in environment.var_to_range.items():
        expr = environment.replace(symbol)
        if span.lower != -int_oo:
            found[sympy.Ge(expr, span.lower)] = None
        if span.upper != int_oo:
            found[sympy.Le(expr, span.upper)] = None
    return tuple(condition for condition in found if condition != sympy.true)
