"""A graph that Dynamo made of a model, as a module that looks like the model.

Its weights stand where they stand in the model, its forward takes the model's own arguments, and its calls know which
submodule they come from. So everything that works on a model works on it: capture, cuts at module paths, rates by
parameter name, the checks of what has changed.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

import torch
from torch import fx, nn

from lightcache_fx.errors import CutError
from lightcache_fx.graphs import copy_graph
from lightcache_fx.marks import MARK, Mark, MarksItself
from lightcache_fx.tracing import WRAPPER

_ROOT = re.compile(r"([LG])\['(\w+)'\]")
_STEP = re.compile(r"\.(\w+)|\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_AS_TENSOR = re.compile(r"___as_tensor\((.*)\)")
_TABLES = ("__dict__", "_modules", "_parameters", "_buffers")
_VIEWS = frozenset(
    {
        "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "chunk",
        "split", "select", "narrow", "movedim",
    }
)  # fmt: skip
Key = str | int


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo compiled: its local variables and its code, where they are known."""

    local: Mapping[str, Any] = field(default_factory=dict)
    code: CodeType | None = None

    @classmethod
    def current(cls) -> Frame:
        """That of the compilation under way, or one of which nothing is known."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        try:
            translator = InstructionTranslator.current_tx()
            return cls(dict(translator.f_locals), translator.f_code)
        except AttributeError:  # none is under way
            return cls()

    @property
    def is_rest(self) -> bool:
        """Whether it is what follows a graph break."""
        return self.code is not None and self.code.co_name.startswith("torch_dynamo_resume")


@dataclass(frozen=True)
class Place:
    """Where an input of the graph stands: a weight at its path, or an argument and what to look up in it."""

    kind: Literal["weight", "argument"]
    path: tuple[Key, ...]

    def __str__(self) -> str:
        """As the user would write it."""
        first, *keys = self.path
        return str(first) + "".join(f".{key}" if self.kind == "weight" else f"[{key!r}]" for key in keys)


class GraphModel(MarksItself):
    """What `graph_model` makes; each instance has a class of its own, named as the model's and with its signature."""

    graph_module: fx.GraphModule
    places: tuple[Place, ...]
    method = "forward"

    @contextmanager
    def marked(self, paths: Sequence[str]) -> Iterator[list[Mark]]:
        """While active, what goes into and out of the named submodules is marked; yields what each tag means."""
        cls: Any = type(self)
        plain: fx.GraphModule = cls.graph_module
        marks: list[Mark] = []
        graph, _ = copy_graph(plain.graph)
        for path in paths:
            _mark_calls(graph, path, marks)
        cls.graph_module = fx.GraphModule(plain, graph)
        try:
            yield marks
        finally:
            cls.graph_module = plain

    def bind(self, values: Sequence[Any]) -> dict[str, Any]:
        """The keyword arguments of a call for the graph's inputs; weights among them are put into their places."""
        arguments: list[tuple[tuple[Key, ...], Any]] = []
        for place, value in zip(self.places, values, strict=True):
            if place.kind == "argument":
                arguments.append((place.path, value))
                continue
            owner = self.get_submodule(".".join(map(str, place.path[:-1])))
            name = str(place.path[-1])
            table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
            if table[name] is not value:
                table[name] = value
        return {str(key): value for key, value in _tree(arguments).items()}

    def values(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The graph's inputs, of the weights as they are and a call's arguments."""
        found = []
        for place in self.places:
            value: Any = self if place.kind == "weight" else arguments
            for key in place.path:
                value = getattr(value, str(key)) if place.kind == "weight" else value[key]
            found.append(value)
        return found


def graph_model(graph_module: fx.GraphModule, inputs: Sequence[Any], frame: Frame) -> GraphModel:
    """A module that computes what Dynamo's graph does.

    Args:
        graph_module: as a backend gets it.
        inputs: the examples that a backend gets, one for each placeholder.
        frame: that was compiled.
    """
    reader = _Sources(frame)
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    names = [_source_of(node) for node in nodes]
    reader.find_model(names)
    places = reader.places(names, nodes, inputs)
    graph, _ = copy_graph(graph_module.graph)
    for node in graph.nodes:
        node.meta["nn_module_stack"] = reader.module_stack(node.meta.get("nn_module_stack") or {})
    for node, place in zip(graph.find_nodes(op="placeholder"), places, strict=True):
        node.meta["lightcache_place"] = place
        _keep_number_as_tensor(node)

    def forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        with torch.fx.traceback.preserve_node_meta():
            return fx.Interpreter(type(self).graph_module).run(*self.values(arguments))

    signature = reader.signature([str(p.path[0]) for p in places if p.kind == "argument"])
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    )
    namespace = {
        "forward": forward,
        "method": reader.method,
        "graph_module": fx.GraphModule(graph_module, graph),
        "places": tuple(places),
    }
    made: GraphModel = type(reader.owner, (GraphModel,), namespace)()
    reader.build(made, places, inputs)
    return made


def _keep_number_as_tensor(node: fx.Node) -> None:
    """A Python float comes as a 0-d float64 tensor, which computes as the number does; its value is not asked for."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64:
        for user in list(node.users):
            if user.op == "call_method" and user.target == "item":
                user.replace_all_uses_with(node)
                node.graph.erase_node(user)


def _source_of(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    found = getattr(source, "name", "")
    name = str(found() if callable(found) else found)  # a method before torch 2.12
    inner = _AS_TENSOR.fullmatch(name)
    return inner[1] if inner else name


def _parse(name: str) -> tuple[str, str, list[Key]] | None:
    """`L['self']._modules['a'].b` -> `("L", "self", ["_modules", "a", "b"])`; None for what is computed."""
    root = _ROOT.match(name)
    if root is None:
        return None
    keys: list[Key] = []
    position = root.end()
    while position < len(name):
        step = _STEP.match(name, position)
        if step is None or name.startswith("(", step.end()):
            return None
        attribute, single, double, number = step.groups()
        keys.append(int(number) if number is not None else attribute or single or double or "")
        position = step.end()
    return root[1], root[2], keys


class _Sources:
    """Reads Dynamo's names of the inputs of one graph."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.roots: list[tuple[str, str]] = []
        self.root: nn.Module | None = None
        self.method = "forward"
        self.parameters: list[str] = []
        self.variadic: tuple[str | None, str | None] = (None, None)
        if frame.code is not None:
            own = inspect.getargs(frame.code)
            self.variadic = own.varargs, own.varkw
            self.parameters = [name for name in own.args if not isinstance(frame.local.get(name), nn.Module)]

    @property
    def owner(self) -> str:
        return type(self.root).__name__ if self.root is not None else "Model"

    def find_model(self, names: Sequence[str]) -> None:
        """Which roots hold weights; the first, `self` before others, is the model."""
        for parsed in filter(None, map(_parse, names)):
            scope, root, keys = parsed
            holds = scope == "G" or isinstance(self.frame.local.get(root), nn.Module) or keys[:1] == ["__dict__"]
            if (holds or any(key in _TABLES for key in keys)) and (scope, root) not in self.roots:
                self.roots.append((scope, root))
        if not self.roots or isinstance(self.frame.local.get("self"), nn.Module):
            self.roots = [("L", "self"), *(root for root in self.roots if root != ("L", "self"))]
        local = self.frame.local.get(self.roots[0][1])
        self.root = local if isinstance(local, nn.Module) else None
        if self.root is not None:
            found = filter(None, map(_parse, names))
            self._find_method(type(self.root), [str(keys[0]) for _, name, keys in found if name == self.variadic[1]])

    def _find_method(self, cls: type, keys: Sequence[str]) -> None:
        """The method whose code this is, or that is decorated by what has this code."""
        names = ["forward", "decode", "encode", *sorted(vars(cls))]
        for name in names:
            function = getattr(cls, name, None)
            if not inspect.isfunction(function) or not _has_code(function, self.frame.code):
                continue
            parameters = list(inspect.signature(function).parameters.values())[1:]
            named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if all(key in named for key in keys) or len(named) < len(parameters):
                self.method, self.parameters = name, named
                return

    def places(self, names: Sequence[str], nodes: Sequence[fx.Node], inputs: Sequence[Any]) -> list[Place]:
        """Where each input stands."""
        found: list[Place] = []
        taken: set[tuple[Key, ...]] = set()
        for name, node, value in zip(names, nodes, inputs, strict=True):
            place = self._place(_parse(name), node, value)
            if place.path in taken:
                place = Place(place.kind, (*place.path[:-1], f"{place.path[-1]}_{node.name}"))
            taken.add(place.path)
            found.append(place)
        return found

    def _place(self, parsed: tuple[str, str, list[Key]] | None, node: fx.Node, value: object) -> Place:
        if parsed is None:  # a size of an argument, say
            kind: Literal["weight", "argument"] = "weight" if isinstance(value, nn.Parameter) else "argument"
            return Place(kind, (node.name,))
        scope, root, keys = parsed
        if (scope, root) in self.roots:
            path = [key for key in keys if key not in _TABLES]
            if not isinstance(value, torch.Tensor):  # a number among the model's attributes
                return Place("argument", ("_".join(map(str, (root, *path))),))
            is_models = (scope, root) == self.roots[0]
            return Place("weight", tuple(str(key) for key in (path if is_models else [root, *path])) or (root,))
        if root == self.variadic[1] and keys:
            return Place("argument", tuple(keys))
        if root == self.variadic[0] and keys and isinstance(keys[0], int):
            index = keys[0]
            named = self.parameters[index] if index < len(self.parameters) else f"args{index}"
            return Place("argument", (named, *keys[1:]))
        return Place("argument", (root, *keys))

    def signature(self, used: Sequence[str]) -> inspect.Signature:
        """The model's own parameters in their order, and others that the graph takes."""
        names = [*self.parameters, *(name for name in used if name not in self.parameters)]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind, default=None) for name in dict.fromkeys(names)])

    def module_stack(self, stack: Mapping[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
        """Dynamo's names of modules as those of a model that is called by the tracers' wrapper."""
        found: dict[str, tuple[str, Any]] = {}
        for key, (name, kind) in stack.items():
            path = self._module_path(name)
            call = key.rpartition("@")[2] if "@" in key else "0"
            whole = f"{WRAPPER}.{path}" if path else WRAPPER
            whole = whole if call == "0" else f"{whole}@{call}"
            found[whole] = (whole, kind)
        return found

    def _module_path(self, name: str) -> str:
        root = _ROOT.match(name)
        if root is None:
            return ""
        keys = [key for step in _STEP.finditer(name, root.end()) for key in step.groups() if key is not None]
        path = [key for key in keys if key not in _TABLES]
        return ".".join(path if root.groups() == self.roots[0] else [root[2], *path])

    def build(self, made: GraphModel, places: Sequence[Place], inputs: Sequence[Any]) -> None:
        """Give the module its tree and its weights."""
        if self.root is not None:
            for path, module in self.root.named_modules():
                if path:
                    _submodule(made, path, is_list=isinstance(module, nn.ModuleList | nn.Sequential))
        for place, value in zip(places, inputs, strict=True):
            if place.kind == "argument":
                continue
            owner, name = _submodule(made, ".".join(map(str, place.path[:-1]))), str(place.path[-1])
            if isinstance(value, nn.Parameter):
                owner.register_parameter(name, value)
            else:
                owner.register_buffer(name, value)
        made.train(self.root.training if self.root is not None else False)


def _has_code(function: Callable[..., Any], code: CodeType | None) -> bool:
    current: Any = function
    while current is not None:
        if getattr(current, "__code__", None) is code:
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def _submodule(root: nn.Module, path: str, *, is_list: bool = False) -> nn.Module:
    """The submodule at a path, made where it is not there."""
    found = root
    names = path.split(".") if path else []
    for depth, name in enumerate(names):
        if name not in found._modules:
            made = nn.ModuleList() if is_list and depth == len(names) - 1 else nn.Module()
            found._modules[name] = made
        child = found._modules[name]
        assert child is not None
        found = child
    return found


def _tree(leaves: Sequence[tuple[tuple[Key, ...], Any]]) -> dict[Key, Any]:
    """A nested dict of values at their paths; what is numbered from 0 becomes a tuple."""
    found: dict[Key, Any] = {}
    for key in dict.fromkeys(path[0] for path, _ in leaves):
        below = [(path[1:], value) for path, value in leaves if path[0] == key]
        if len(below) == 1 and not below[0][0]:
            found[key] = below[0][1]
            continue
        inner = _tree([leaf for leaf in below if leaf[0]])
        whole = sorted(inner) == list(range(len(inner))) if all(isinstance(k, int) for k in inner) else False
        found[key] = tuple(inner[index] for index in range(len(inner))) if whole else inner
    return found


# Marks -------------------------------------------------------------------------------------------------------------


def _mark_calls(graph: fx.Graph, path: str, marks: list[Mark]) -> None:
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
        inside = set(nodes)
        for node in nodes:  # a tuple that it returns is taken apart by its caller
            if isinstance(node.meta.get("example_value"), tuple | list):
                inside |= {user for user in node.users if user.target is operator.getitem}
        self.nodes = sorted(inside, key=self.order.__getitem__)
        self.inside = inside
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
