"""Sizes that vary: one capture for calls that differ only in sizes of their tensors, where export proves it.

A second size is a reason to try (torch.compile's automatic dynamic shapes): the dimensions in which it differs from the
one known before become symbols. What the trace took for granted of these (guards, ranges, equal sizes) is read from its
`ShapeEnv`, and a call for which it does not hold is captured by itself, as one of an unknown size always was. Nothing
is believed unchecked: the graph is compared with eager at both sizes, and at each further one when it comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from lightcache_fx.calls import Call, CallLayout, TensorType
from lightcache_fx.capture import Capture, capture, check_at_another_size, explain_failure
from lightcache_fx.compiled import Compiled, Signature
from lightcache_fx.errors import CaptureError
from lightcache_fx.graphs import copy_graph, expression, input_of, module_path, placeholders, tensors_of
from lightcache_fx.lowering import WITH_CUDA_GRAPHS
from lightcache_fx.module_state import ModuleState
from lightcache_fx.plan import Plan, make_plan
from lightcache_fx.policy import Auto, Policy
from lightcache_fx.tracing import Varying

log = logging.getLogger(__name__)

MOST_SIZES = 64
"""Sizes of one dynamic capture that are remembered as checked; more are checked again when they come again."""
_SMALLEST = 2
"""Of a size that varies: at 0 and 1 kernels and broadcasting do something else, so export takes neither for granted."""

Values = Mapping[sympy.Symbol, int]


def may_be_dynamic(policy: Policy, method: str) -> bool:
    """Whether one capture may serve several sizes: what is planned in bytes is planned for each size by itself."""
    in_bytes = (
        policy.chunk is not None or policy.is_about_memory() or (policy.decode is not None and method != "forward")
    )
    with_graphs = policy.compile is not None and policy.compile.mode in WITH_CUDA_GRAPHS
    return policy.dynamic is not False and not in_bytes and not with_graphs


def pattern_of(layout: CallLayout) -> CallLayout:
    """The layout with every size that may vary left out: equal for calls that one dynamic capture may serve."""
    types = tuple(
        TensorType(
            tuple(-1 if size >= _SMALLEST else size for size in t.shape), None if t.strides is None else (), *t[2:]
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
        conditions = _conditions(environment) if environment is not None else ()
        made = cls(captured.layout, shapes, strides, symbols, conditions)
        made._check_symbols(captured.graph_module.graph)
        return made

    def _check_symbols(self, graph: fx.Graph) -> None:
        used = [value for node in graph.nodes for value in _numbers_of(node.meta.get("val"))]
        for expr in (*map(sympy.sympify, used), *self.conditions, *(n for row in self.shapes for n in row)):
            unknown = sorted(map(str, expr.free_symbols - self.symbols.keys()))
            if unknown:
                raise CaptureError(f"{unknown[0]} in {expr} is not the size of an input")

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
            if value < _SMALLEST:
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


@dataclass(eq=False)
class DynamicCapture:
    """A capture that holds for many sizes, with the programs that all of them share.

    Attributes:
        capture: its sizes are symbols.
        sizes: what it holds for.
        plan: made for the size that it was captured for; its figures are those of that size.
        made: what calls of any size run.
        refused: layouts for which it computed something else than the model.
    """

    capture: Capture
    sizes: Sizes
    plan: Plan
    made: Compiled | None = None
    refused: set[CallLayout] = field(default_factory=set)


class DynamicSizes:
    """Finds or makes the dynamic capture for a call.

    Args:
        module: the user's.
        policy: for which `may_be_dynamic` holds.
        mark: as for `capture`.
        build: makes programs of a signature and its plan.
    """

    def __init__(
        self, module: nn.Module, policy: Policy, mark: Sequence[str], build: Callable[[Signature, Plan], Compiled]
    ) -> None:
        self.module, self.policy, self.mark = module, policy, tuple(mark)
        self._build = build
        self._tried: dict[Hashable, None] = {}

    def programs_for(self, call: Call, known: Sequence[Compiled], state: ModuleState) -> Compiled | None:
        """The programs of a dynamic capture that was checked for this call; None where there is none.

        Args:
            call: of a signature that is not known.
            known: what has been made, the one that was used last at the end.
            state: of the module now.
        """
        pattern = pattern_of(call.layout)
        alike = [
            made
            for made in reversed(known)
            if made.signature.state.key == state.key and pattern_of(made.capture.layout) == pattern
        ]
        captures = dict.fromkeys(made.signature.dynamic for made in alike)
        for dynamic in captures:
            if isinstance(dynamic, DynamicCapture) and self._holds(dynamic, call):
                return self._for_size(dynamic, call, state)
        for varying, base in self._candidates(alike, call):
            key = (pattern, state.key, tuple(varying.items()))
            if key in self._tried:
                continue
            dynamic = self._captured(varying, call, base, state)
            if dynamic is not None:
                return self._for_size(dynamic, call, state)
            self._tried[key] = None
            if len(self._tried) > MOST_SIZES:
                del self._tried[next(iter(self._tried))]
        return None

    def _candidates(self, alike: Sequence[Compiled], call: Call) -> list[tuple[Varying, Compiled | None]]:
        """Dimensions to leave open, and what is known for the size at which to begin."""
        if not alike:
            every = {
                i: tuple(dim for dim, n in enumerate(t.shape) if n >= _SMALLEST) for i, t in enumerate(call.tensors)
            }
            return [({i: dims for i, dims in every.items() if dims}, None)] if self.policy.dynamic else []
        found = [differences(made.capture.layout, call.layout) for made in alike]
        nearest, base = min(zip(found, alike, strict=True), key=lambda pair: sum(map(len, pair[0].values())))
        places = sorted({(index, dim) for one in found for index, dims in one.items() for dim in dims})
        ever: dict[int, list[int]] = {}
        for index, dim in places:
            ever.setdefault(index, []).append(dim)
        open_now = [made.signature.dynamic.sizes for made in alike if made.signature.dynamic is not None]
        candidates = [{index: tuple(dims) for index, dims in one.items()} for one in (ever, nearest)]
        candidates = [one for one in candidates if not any(sizes.is_open(one) for sizes in open_now)]
        return [(one, base) for i, one in enumerate(candidates) if one not in candidates[:i]]

    def _holds(self, dynamic: DynamicCapture, call: Call) -> bool:
        """Whether a dynamic capture is valid for a call, and computes what the model does for it."""
        if call.layout in dynamic.refused:
            return False
        why = dynamic.sizes.why_not(call.layout) or self._beyond_limits(dynamic, call.layout)
        if not why:
            try:
                check_at_another_size(dynamic.capture, self.module, call)
            except Exception as error:  # noqa: BLE001 - whatever it is, a capture for this size alone has its turn
                why = explain_failure(error)
                dynamic.refused.add(call.layout)
        if why:
            log.info("%s: a size of its own is captured by itself: %s", type(self.module).__name__, why)
        return not why

    def _captured(
        self, varying: Varying, call: Call, base: Compiled | None, state: ModuleState
    ) -> DynamicCapture | None:
        """A dynamic capture for two sizes, checked at both; None where that cannot be, and why is logged."""
        try:
            dynamic = self._made(varying, call, base, state)
        except Exception as error:  # noqa: BLE001 - whatever it is, a capture for this size alone has its turn
            log.info("%s: sizes stay fixed: %s", type(self.module).__name__, explain_failure(error))
            return None
        log.info("%s: one capture for sizes that vary: %s", type(self.module).__name__, dynamic.sizes)
        return dynamic

    def _made(self, varying: Varying, call: Call, base: Compiled | None, state: ModuleState) -> DynamicCapture:
        first = call if base is None else resized(call, base.capture.layout)
        captured = capture(self.module, first, mark=self.mark, varying=varying)
        sizes = Sizes.of(captured)
        fixed = sizes.fixed(varying)
        if not sizes.symbols or (base is not None and fixed):
            raise CaptureError(f"the trace has made numbers of sizes that vary: {', '.join(fixed)}")
        if why := sizes.why_not(first.layout) or sizes.why_not(call.layout):
            raise CaptureError(why)
        plan = make_plan(with_numbers(captured, sizes, first.layout), self.policy, self.module)
        if base is not None:
            _check_cut(captured, plan, base)
            check_at_another_size(captured, self.module, call)
        dynamic = DynamicCapture(replace(captured, route=f"{captured.route}, {sizes}"), sizes, plan)
        if why := self._beyond_limits(dynamic, call.layout):
            raise CaptureError(why)
        dynamic.made = self._build(Signature(dynamic.capture, plan, state, dynamic=dynamic), plan)
        return dynamic

    def _for_size(self, dynamic: DynamicCapture, call: Call, state: ModuleState) -> Compiled:
        """The shared programs as what was made for one size: its calls are a run of their own."""
        made = dynamic.made
        assert made is not None
        captured = replace(dynamic.capture, layout=call.layout)
        return Compiled(
            Signature(captured, dynamic.plan, state, dynamic=dynamic), dynamic.plan, made.programs, made.bound
        )

    def _beyond_limits(self, dynamic: DynamicCapture, layout: CallLayout) -> str:
        """Which of the policy's limits, which are in bytes, the plan does not keep at a size; empty for none."""
        cache, plan, values = self.policy.cache, dynamic.plan, dynamic.sizes.values(layout)
        nodes = {node.name: node for node in dynamic.capture.graph_module.graph.nodes}
        auto = cache.cut if cache is not None and isinstance(cache.cut, Auto) else None
        limits = {
            "max_kept_bytes": (
                auto.max_kept_bytes if auto is not None else None,
                [slot.node for slot in plan.cut.slots] if plan.cut else [],
            ),
            "max_hoisted_bytes": (self.policy.max_hoisted_bytes, [value.node for value in plan.hoist.values]),
        }
        for name, (limit, kept) in limits.items():
            if limit is not None and sum(_bytes_at(nodes[node], values) for node in kept) > limit:
                return f"{name}={limit} is not kept"
        return ""


def _bytes_at(node: fx.Node, values: Values) -> int:
    return sum(
        int(at(sympy.sympify(sympy.prod(map(expression, tensor.shape))), values)) * tensor.element_size()
        for tensor in tensors_of(node)
    )


def _check_cut(captured: Capture, plan: Plan, base: Compiled) -> None:
    """Raise a `CaptureError` where a plan keeps something else than that of the size before."""
    known = base.capture
    assert isinstance(known, Capture)
    before, now = (_cut_of(one.graph_module.graph, made) for one, made in ((known, base.plan), (captured, plan)))
    if base.signature.dynamic is not None:  # whose bytes are those of another size
        before, now = ([place for *place, _ in cut] for cut in (before, now))
    if before != now:
        raise CaptureError(f"the cut would be {now}, where it is {before} at the size before")


def _cut_of(graph: fx.Graph, plan: Plan) -> list[list[object]]:
    """What a cut keeps, told by where it is made and not by the names of nodes."""
    nodes = {node.name: node for node in graph.nodes}

    def place(name: str | None) -> tuple[object, ...]:
        return () if name is None else (module_path(nodes[name]), str(nodes[name].target))

    slots = plan.cut.slots if plan.cut is not None else ()
    return [[*place(slot.node), *place(slot.base), slot.num_bytes] for slot in slots]


def with_numbers(captured: Capture, sizes: Sizes, layout: CallLayout) -> Capture:
    """The capture as it is at one size: the same nodes, with numbers where symbols were."""
    values = sizes.values(layout)
    graph, _ = copy_graph(captured.graph_module.graph)
    mode = FakeTensorMode()

    def number(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape, stride = (
                [int(at(sympy.sympify(expression(n)), values)) for n in of] for of in (value.shape, value.stride())
            )
            with mode:
                return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            exact = at(sympy.sympify(value.node.expr), values)
            return next(kind for sym, kind in _PYTHON.items() if isinstance(value, sym))(exact)
        return value

    numbers: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda source: numbers.get(source, source))
        if "val" in node.meta:
            symbolic = isinstance(node.meta["val"], tuple(_PYTHON))
            node.meta["val"] = pytree.tree_map(number, node.meta["val"])
            if symbolic:
                numbers[node] = node.meta["val"]
    for node in reversed(numbers):
        graph.erase_node(node)
    return replace(captured, graph_module=fx.GraphModule(captured.graph_module, graph), layout=layout)


_PYTHON: dict[type, Callable[[Any], Any]] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def resized(call: Call, layout: CallLayout) -> Call:
    """A call of another size: its tensors cut off, or begun again, and laid out as that call's were."""
    tensors = tuple(
        tensor if tensor.shape == type_.shape else _resized(tensor, type_)
        for tensor, type_ in zip(call.tensors, layout.tensor_types, strict=True)
    )
    return Call(layout, tensors)


def _resized(tensor: torch.Tensor, type_: TensorType) -> torch.Tensor:
    for dim, size in enumerate(type_.shape):
        if tensor.shape[dim] != size:
            places = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, places)
    if type_.strides is None:
        return tensor.contiguous()
    # No view of another tensor, whose sizes a trace would make symbols of as well.
    laid_out = torch.empty_strided(type_.shape, type_.strides, dtype=tensor.dtype, device=tensor.device)
    written = laid_out
    for dim, (size, stride) in enumerate(zip(type_.shape, type_.strides, strict=True)):
        if size > 1 and stride == 0:
            written, tensor = (one.narrow(dim, 0, 1) for one in (written, tensor))
    written.copy_(tensor)
    return laid_out
