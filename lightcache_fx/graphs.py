"""Small facts about FX nodes that analyses, passes and programs share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import bound_sympy

from lightcache_fx.policy import Rate

UNBOUNDED = 2**40

InputKind = Literal[
    "weight", "constant", "user", "slot", "history", "coefficients", "hoisted", "handed", "indicator", "copy", "home",
    "next",
]  # fmt: skip


@dataclass(frozen=True)
class GraphInput:
    """What a placeholder stands for.

    Attributes:
        kind: a weight (parameter or buffer), a tensor constant of the capture, a tensor of the call, a cached value of
            an earlier step (`slot`), the value that a slot had before (`history`), what weighs those (`coefficients`),
            a value computed once a generation (`hoisted`), one that the step's probe hands over (`handed`), what an
            adaptive step compares with (`indicator`), the device's copy of a weight or slot that is kept elsewhere,
            whose memory the program frees, the buffer that a slot is sent away to (`home`), or a weight of the model
            that runs next.
        name: full weight name, argument name, slot name or hoisted value's name.
        rate: how often it can change.
    """

    kind: InputKind
    name: str
    rate: Rate


def input_of(node: fx.Node) -> GraphInput:
    """The binding of a placeholder."""
    found: GraphInput = node.meta["lightcache_input"]
    return found


def is_only_measured(node: fx.Node) -> bool:
    """Whether of an input nothing is read but its sizes."""
    return bool(node.users) and all(isinstance(user.meta.get("val"), int | torch.SymInt) for user in node.users)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: fx.Graph) -> fx.Node:
    """The one output node."""
    found: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def outputs(graph: fx.Graph) -> tuple[Any, ...]:
    """The values that a graph returns: always a flat tuple of nodes and constants."""
    return tuple(output_node(graph).args[0])  # type: ignore[arg-type]


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The (fake) tensors that a node produces."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def layout_of(node: fx.Node) -> Hashable:
    """Equal for values of the same types, laid out alike; sizes may be symbolic."""
    return tuple((str(t.shape), str(t.stride()), t.dtype, t.device) for t in tensors_of(node))


def num_bytes(node: fx.Node) -> int:
    """Bytes of a node's own elements, whatever its storage is."""
    return sum(num_elements(tensor) * tensor.element_size() for tensor in tensors_of(node))


def num_elements(tensor: torch.Tensor) -> int:
    """Elements of a (fake) tensor; sizes that depend on data count with their upper bound."""
    return math.prod(map(concrete_size, tensor.shape))


def concrete_size(size: int | torch.SymInt) -> int:
    """A size as a number: a symbolic one as in the call that was captured.

    One that depends on data, which no call shows, by its upper bound, or 1 where it has none.
    """
    if isinstance(size, int):
        return size
    node = size.node
    if node.has_hint():
        return int(node.hint)
    upper = bound_sympy(node.expr, node.shape_env.var_to_range).upper
    return int(upper) if upper.is_number and upper < UNBOUNDED else 1


def expression(number: int | torch.SymInt) -> Any:
    """A size as an int or a sympy expression, which compare by form and ask no symbol for its value."""
    return number.node.expr if isinstance(number, torch.SymInt) else number


def describe(node: fx.Node) -> str:
    """`%name f32[2,4] (module.path)`, for messages and tables."""
    from lightcache_fx.printer import format_type

    where = module_path(node)
    return f"%{node.name} {format_type(node.meta.get('val'))}" + (f" ({where})" if where else "")


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose call made a node, outermost first; the k-th call of a module ends in `@k`."""
    return tuple(path for path, _ in node.meta.get("nn_module_stack", {}).values() if path)


def module_path(node: fx.Node) -> str:
    """The innermost module of a node, without the call number."""
    stack = module_stack(node)
    return stack[-1].partition("@")[0] if stack else ""


def schema_of(node: fx.Node) -> torch._C.FunctionSchema | None:
    """The operator schema of a call, or None for `getitem` and other Python functions."""
    return node.target._schema if isinstance(node.target, OpOverload) else None


def is_view(node: fx.Node) -> bool:
    """Whether the result may share storage with an argument, by the operator's own alias annotations."""
    schema = schema_of(node)
    if schema is None:
        return node.target is operator.getitem
    return any(r.alias_info is not None for r in schema.returns)


def is_or_views(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is another one, or made from it by calls that may return a view."""
    while node is not source and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is source


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose storage a value may live in: follows views and `getitem` to the first operator that allocates."""
    while node.op == "call_function" and (is_view(node) or is_mark(node)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def owns_its_storage(node: fx.Node) -> bool:
    """Whether a value is a call's own result: no view of anything, and no input."""
    return node.op != "placeholder" and storage_root(node) is node


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose storage a value really lives in: as `storage_root`, but not through calls that copy.

    A `reshape` or a `to` may return its argument's storage or one of its own; which, is found with meta tensors. It is
    asked for what may live in an input's storage; any other node's root is as `storage_root` has it.
    """
    root = storage_root(node)
    if root.op != "placeholder":
        return root
    while node.op == "call_function" and is_view(node) and returns_its_argument(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def returns_its_argument(node: fx.Node) -> bool:
    """Whether a call that may return its argument's storage does so, by a run with meta tensors."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target is operator.getitem:
        return True
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor) or len(node.all_input_nodes) > 1:
        return False
    if any(out.device != value.device for out in tensors_of(node)):
        return False
    if not all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return True  # sizes that depend on data, which no weight has: as annotated
    meta = torch.device("meta")  # in the place of the device that the value is on already
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: meta, (node.args[1:], node.kwargs))
    with torch.no_grad():
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=meta)
        result: Any = node.target(twin, *args, **kwargs)  # type: ignore[operator]
    storages = [leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(result)]  # noqa: SLF001 - as in liveness.py
    return bool(twin.untyped_storage()._cdata in storages)  # noqa: SLF001


def is_mark(node: fx.Node) -> bool:
    """Whether a node is `lightcache::mark`, which is erased from every program and so shares its argument's storage."""
    return isinstance(node.target, OpOverload) and node.target.name() == "lightcache::mark"


def is_impure(node: fx.Node) -> bool:
    """Whether a call does more than return its value.

    torch marks every nondeterministic operator as impure, dropout and scaled dot-product attention among them, which
    keeps dead attention alive. Here only inputs, outputs, operators that write their arguments, and operators that
    return nothing are impure.
    """
    if node.op in ("placeholder", "output"):
        return True
    schema = schema_of(node)
    return schema is not None and (schema.is_mutable or not schema.returns)


def written_by(node: fx.Node) -> Iterator[object]:
    """The arguments that a call writes to, by its operator's alias annotations: nodes, lists of nodes, or None."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable:
        return
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield given.get(argument.name)


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether a call writes to one of its arguments."""
    return any(True for node in graph.nodes for _ in written_by(node))


def written_input(graph: fx.Graph) -> fx.Node | None:
    """A placeholder whose memory a call writes to; None where there is none."""
    roots = (alias_root(value) for node in graph.nodes for value in written_by(node) if isinstance(value, fx.Node))
    return next((root for root in roots if root.op == "placeholder"), None)


def eliminate_dead_code(graph: fx.Graph) -> int:
    """Remove pure calls without users; returns how many went. Placeholders stay."""
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    return before - len(graph.nodes)


def drop_unused_inputs(graph: fx.Graph, kinds: Iterable[InputKind]) -> int:
    """Remove placeholders of the given kinds that nobody reads; returns how many went."""
    wanted = set(kinds)
    unused = [node for node in placeholders(graph) if not node.users and input_of(node).kind in wanted]
    for node in unused:
        graph.erase_node(node)
    return len(unused)


def ancestors(roots: Iterable[fx.Node], *, stop: Callable[[fx.Node], bool] = lambda _: False) -> set[fx.Node]:
    """All nodes that `roots` depend on, themselves included; nodes for which `stop` holds are left out."""
    found: set[fx.Node] = set()
    stack = [node for node in roots if not stop(node)]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack += [arg for arg in node.all_input_nodes if arg not in found and not stop(arg)]
    return found


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy with the same node names and metadata, and the map from old nodes to new ones."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    returned = new.graph_copy(graph, mapping)
    new.output(returned)
    for old, copied in mapping.items():
        copied.meta = dict(old.meta)
    return new, mapping


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Every node that computes something."""
    return (node for node in graph.nodes if node.op in ("call_function", "call_module"))
