"""Marks in a graph that Dynamo made: what goes into a submodule's calls and what comes out of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from lightcache_fx.errors import CutError
from lightcache_fx.marks import MARK, Mark
from lightcache_fx.tracing import WRAPPER

_VIEWS = frozenset(
    {
        "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "chunk",
        "split", "select", "narrow", "movedim",
    }
)  # fmt: skip


def mark_calls(graph: fx.Graph, path: str, marks: list[Mark]) -> None:
    """Pass each tensor that goes into and out of a module's calls through a mark."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for name, _ in node.meta.get("nn_module_stack", {}).values():
            if name.removeprefix(f"{WRAPPER}.").partition("@")[0] == path:
                calls.setdefault(name, []).append(node)
    for number, (name, nodes) in enumerate(calls.items()):
        _MarkedCall(graph, path, number, name, nodes).mark(marks)


class _MarkedCall:
    """One call of a submodule in the graph: its nodes, in order."""

    def __init__(self, graph: fx.Graph, path: str, number: int, name: str, nodes: list[fx.Node]) -> None:
        self.graph, self.path, self.number = graph, path, number
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.nodes, self.inside = nodes, set(nodes)
        stack = nodes[0].meta["nn_module_stack"]
        names = [name for name, _ in stack.values()]
        self.around = dict(list(stack.items())[: names.index(name)])
        for node in self.nodes:
            self._refuse_writes(node)

    def _refuse_writes(self, node: fx.Node) -> None:
        """Where a module writes to what it was given, the graph no longer shows which value goes in or comes out."""
        target = node.args[0] if node.args and _writes(node) else None
        while isinstance(target, fx.Node) and target in self.inside and _is_view(target):
            target = target.args[0] if target.args else None
        if isinstance(target, fx.Node) and target not in self.inside:
            raise CutError(
                f"cut={self.path!r}: the module writes in place to what it is given ({node.name}), so Dynamo's graph"
                f" does not show what goes in and comes out; use lightcache_fx.transform for this cut"
            )

    def mark(self, marks: list[Mark]) -> None:
        """Mark what goes in, then what comes out."""
        entering = {source: None for node in self.nodes for source in node.all_input_nodes if self._enters(source)}
        for index, source in enumerate(sorted(entering, key=self.order.__getitem__)):
            users = [user for user in source.users if user in self.inside]
            at = self.nodes[0] if self.order[source] < self.order[self.nodes[0]] else source.next
            with self.graph.inserting_before(at):
                self._insert(source, users, Mark(self.path, "in", self.number, index), marks)
        leaving = [node for node in self.nodes if _is_tensor(node) and any(u not in self.inside for u in node.users)]
        for index, node in enumerate(leaving):
            users = [user for user in node.users if user not in self.inside]
            with self.graph.inserting_after(self.nodes[-1]):
                self._insert(node, users, Mark(self.path, "out", self.number, index), marks)

    def _enters(self, source: fx.Node) -> bool:
        is_weight = source.op == "placeholder" and source.meta["lightcache_place"].kind == "weight"
        return source not in self.inside and _is_tensor(source) and not is_weight

    def _insert(self, value: fx.Node, users: Sequence[fx.Node], mark: Mark, marks: list[Mark]) -> None:
        node = self.graph.call_function(MARK, (value, len(marks)))
        node.meta = {"nn_module_stack": self.around, "example_value": value.meta["example_value"]}
        marks.append(mark)
        for user in users:
            user.replace_input_with(value, node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or _name_of(node) in _VIEWS


def _writes(node: fx.Node) -> bool:
    """Whether a call of Dynamo's graph writes to its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name_of(node)
    in_operators = getattr(operator, name, None) is node.target and name.startswith("i") and hasattr(operator, name[1:])
    return in_operators or name in ("setitem", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
