"""Where the inputs of a graph that Dynamo made stand in the model: Dynamo names each by a Python expression."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

import torch
from torch import fx, nn

from lightcache_fx.graphs import expression
from lightcache_fx.tracing import WRAPPER

_ROOT = re.compile(r"([LG])\['(\w+)'\]")
_STEP = re.compile(r"\.(\w+)|\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_AS_TENSOR = re.compile(r"___as_tensor\((.*)\)")
_TABLES = ("__dict__", "_modules", "_parameters", "_buffers")
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
    """Where an input of the graph stands.

    A weight at its path; an argument and what to look up in it; the size of another input, told by that one's place
    among the inputs and the dimension.
    """

    kind: Literal["weight", "argument", "size"]
    path: tuple[Key, ...]

    @property
    def name(self) -> str:
        """As the user would write it; a weight's full name."""
        first, *keys = self.path
        return str(first) + "".join(f".{key}" if self.kind == "weight" else f"[{key!r}]" for key in keys)


class Sources:
    """Reads Dynamo's names of the inputs of one graph.

    Args:
        frame: that was compiled.
        nodes: the graph's placeholders.
        inputs: an example for each.

    Attributes:
        model: the module whose weights these are; None where the frame does not tell.
        method: which of its methods was compiled.
        places: of the inputs.
        varying: by an argument's name, the dimensions whose sizes Dynamo has made symbols of.
    """

    def __init__(self, frame: Frame, nodes: Sequence[fx.Node], inputs: Sequence[Any]) -> None:
        self.frame = frame
        self.method = "forward"
        self._varargs: str | None = None
        self._varkw: str | None = None
        self._parameters: list[str] = []
        if frame.code is not None:
            own = inspect.getargs(frame.code)
            self._varargs, self._varkw = own.varargs, own.varkw
            self._parameters = [name for name in own.args if not isinstance(frame.local.get(name), nn.Module)]
        names = list(map(_name_of, nodes))
        self._roots = self._find_roots(names)
        local = frame.local.get(self._roots[0][1])
        self.model = local if isinstance(local, nn.Module) else None
        if self.model is not None:
            parsed = filter(None, map(_parse, names))
            self._find_method(type(self.model), [str(keys[0]) for _, root, keys in parsed if root == self._varkw])
        self.places = self._places(names, nodes, inputs)
        self.varying = {
            place.name: dims
            for place, node in zip(self.places, nodes, strict=True)
            if place.kind == "argument" and (dims := _symbolic_dims(node))
        }

    def _find_roots(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """What weights are looked up in; the first, `self` before others, is the model."""
        found: list[tuple[str, str]] = []
        for scope, root, keys in filter(None, map(_parse, names)):
            holds = scope == "G" or isinstance(self.frame.local.get(root), nn.Module)
            if (holds or any(key in _TABLES for key in keys)) and (scope, root) not in found:
                found.append((scope, root))
        own = ("L", "self")
        if not found or isinstance(self.frame.local.get("self"), nn.Module):
            return [own, *(root for root in found if root != own)]
        return found

    def _find_method(self, cls: type, keys: Sequence[str]) -> None:
        """The method whose code this is, or that is decorated by what has this code, and takes these keywords."""
        for name in ("forward", "decode", "encode", *sorted(vars(cls))):
            function = inspect.getattr_static(cls, name, None)
            if not inspect.isfunction(function) or not _has_code(function, self.frame.code):
                continue
            parameters = list(inspect.signature(function).parameters.values())[1:]
            named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if all(key in named for key in keys) or len(named) < len(parameters):
                self.method, self._parameters = name, named
                return

    def _places(self, names: Sequence[str], nodes: Sequence[fx.Node], inputs: Sequence[Any]) -> tuple[Place, ...]:
        found: dict[tuple[Key, ...], Place] = {}
        sizes = _sizes_of(nodes)
        for name, node, value in zip(names, nodes, inputs, strict=True):
            place = sizes.get(node) or self._place(_parse(name), node, value)
            if place.path in found:
                place = Place(place.kind, (*place.path[:-1], f"{place.path[-1]}_{node.name}"))
            found[place.path] = place
        return tuple(found.values())

    def _place(self, parsed: tuple[str, str, list[Key]] | None, node: fx.Node, value: object) -> Place:
        if parsed is None:  # a size of an argument, say
            return Place("weight" if isinstance(value, nn.Parameter) else "argument", (node.name,))
        scope, root, keys = parsed
        if (scope, root) in self._roots:
            if isinstance(value, torch.Tensor):
                return Place("weight", tuple(self._path_in_model(scope, root, keys)) or (root,))
            return Place("argument", ("_".join((root, *_without_tables(keys))),))  # a number among the attributes
        if root == self._varkw and keys:
            return Place("argument", tuple(keys))
        if root == self._varargs and keys and isinstance(keys[0], int):
            index = keys[0]
            named = self._parameters[index] if index < len(self._parameters) else f"args{index}"
            return Place("argument", (named, *keys[1:]))
        return Place("argument", (root, *keys))

    def signature(self) -> inspect.Signature:
        """The method's own parameters in their order, and others that the graph takes."""
        used = (str(place.path[0]) for place in self.places if place.kind == "argument")
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = dict.fromkeys((*self._parameters, *used))
        return inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])

    def module_stack(self, stack: Mapping[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
        """Dynamo's names of modules as those of a model that is called by the tracers' wrapper."""
        found: dict[str, tuple[str, Any]] = {}
        for key, (name, kind) in stack.items():
            parsed = _parse(name)
            path = ".".join((WRAPPER, *(self._path_in_model(*parsed) if parsed is not None else ())))
            _, _, call = key.partition("@")
            whole = f"{path}@{call}" if call not in ("", "0") else path
            found[whole] = (whole, kind)
        return found

    def _path_in_model(self, scope: str, root: str, keys: Sequence[Key]) -> list[str]:
        path = _without_tables(keys)
        return path if (scope, root) == self._roots[0] else [root, *path]


def _symbolic_dims(placeholder: fx.Node) -> tuple[int, ...]:
    like = placeholder.meta.get("example_value")
    sizes: Sequence[Any] = like.shape if isinstance(like, torch.Tensor) else ()
    return tuple(dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt))


def _sizes_of(placeholders: Sequence[fx.Node]) -> dict[fx.Node, Place]:
    """The places of numbers that are sizes of tensors among the inputs.

    Dynamo passes a size that varies beside its tensor. Taken from the tensor instead, it is one that a capture of the
    graph can leave open as well.
    """
    tensors: dict[Any, tuple[int, int]] = {}
    for index, node in enumerate(placeholders):
        for dim in _symbolic_dims(node):
            tensors.setdefault(expression(node.meta["example_value"].shape[dim]), (index, dim))
    found = {}
    for node in placeholders:
        number = node.meta.get("example_value")
        if isinstance(number, torch.SymInt) and expression(number) in tensors:
            found[node] = Place("size", (*tensors[expression(number)], node.name))
    return found


def _name_of(placeholder: fx.Node) -> str:
    source = getattr(placeholder, "_dynamo_source", None)  # Dynamo sets it there, and nowhere else
    if source is None:
        return ""
    name = str(source.name() if callable(source.name) else source.name)  # a method before torch 2.12
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


def _without_tables(keys: Sequence[Key]) -> list[str]:
    return [str(key) for key in keys if key not in _TABLES]


def _has_code(function: Callable[..., Any], code: CodeType | None) -> bool:
    """Whether a function, or one that it wraps, has this code."""
    found: list[Any] = [function]
    inspect.unwrap(function, stop=lambda inner: bool(found.append(inner)))  # type: ignore[func-returns-value]
    return any(inspect.isfunction(inner) and inner.__code__ is code for inner in found)
