"""Arguments, and trees of them, as JSON that names no class and no function, so that reading it runs nobody's code."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

_NAMED: dict[str, type[Any]] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def encode(value: object) -> Any:
    """A number, string, None, dtype, device, slice and the like, or tuples, lists and dicts of them, as JSON.

    Raises:
        ValueError: it is of another class, which could not be made without that class.
    """
    match value:
        case None | bool():
            return value
        case int() | str() if type(value) in (int, str):
            return value
        case float() if type(value) is float:
            return {"float": value.hex()}
        case complex() if type(value) is complex:
            return {"complex": [value.real.hex(), value.imag.hex()]}
        case bytes() if type(value) is bytes:
            return {"bytes": value.hex()}
        case torch.device():
            return {"device": str(value)}
        case torch.Size():
            return {"size": list(value)}
        case slice():
            return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case tuple() | list() if type(value) in (tuple, list):
            return {type(value).__name__: [encode(item) for item in value]}
        case dict() if type(value) is dict:
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if value is ...:
        return {"ellipsis": True}
    for name, kind in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ValueError(f"a {_class_name(value)}, which cannot be made again without its class")


def decode(data: Any) -> Any:
    """What `encode` was given.

    Raises:
        ValueError: `encode` does not make this.
    """
    if data is None or isinstance(data, bool | int | str):
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"expected a value as JSON, got {data!r}")
    ((kind, content),) = data.items()
    try:
        if kind in _NAMED:
            found = getattr(torch, content)
            if isinstance(found, _NAMED[kind]):
                return found
        else:
            return _DECODERS[kind](content)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError):
        pass
    raise ValueError(f"expected a value as JSON, got {data!r}")


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": bytes.fromhex,
    "device": torch.device,
    "size": torch.Size,
    "slice": lambda parts: slice(*map(decode, parts)),
    "range": lambda parts: range(*parts),
    "ellipsis": lambda _: ...,
    "tuple": lambda items: tuple(map(decode, items)),
    "list": lambda items: list(map(decode, items)),
    "dict": lambda items: {decode(key): decode(item) for key, item in items},
}


def dtype_named(name: str) -> torch.dtype:
    """`float16` and the like.

    Raises:
        ValueError: there is no such dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found


def encode_tree(spec: pytree.TreeSpec, *, records: bool = False) -> Any:
    """A tree of tuples, lists and dicts as JSON, with the number of each leaf in its place.

    Args:
        spec: of the tree.
        records: whether dataclasses (diffusers' outputs) may be in it: they are kept as a name and named fields.

    Raises:
        ValueError: an object of another class is in it.
    """
    return _encode_node(pytree.tree_unflatten(list(range(spec.num_leaves)), spec), records)


def _encode_node(node: Any, records: bool) -> Any:
    if type(node) is int or node is None:
        return node
    if type(node) in (tuple, list):
        return {type(node).__name__: [_encode_node(item, records) for item in node]}
    if type(node) in (dict, collections.OrderedDict):
        return {type(node).__name__: [[encode(key), _encode_node(item, records)] for key, item in node.items()]}
    if records and dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = [[f.name, _encode_node(getattr(node, f.name), records)] for f in dataclasses.fields(node)]
        return {"record": [type(node).__name__, fields]}
    raise ValueError(f"a {_class_name(node)}, which cannot be made again without its class")


class Tree:
    """A tree as `encode_tree` has it.

    Raises:
        ValueError: it is no such tree, or its leaves are not numbered from 0 to one less than their number.
    """

    def __init__(self, data: Any) -> None:
        self._leaves: list[int] = []
        try:
            self._build = self._builder(data)
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"expected a tree as JSON, got {data!r}") from error
        if sorted(self._leaves) != list(range(len(self._leaves))):
            raise ValueError(f"the leaves of a tree are numbered {self._leaves}")

    @property
    def num_leaves(self) -> int:
        """How many leaves there are."""
        return len(self._leaves)

    def fill(self, leaves: Sequence[object]) -> Any:
        """The tree with these leaves; a dataclass comes as a named tuple."""
        return self._build(leaves)

    def spec(self) -> pytree.TreeSpec:
        """Its structure as torch has it."""
        return pytree.tree_structure(self.fill([object()] * self.num_leaves))

    def _builder(self, data: Any) -> Callable[[Sequence[object]], Any]:
        if data is None:
            return lambda _: None
        if type(data) is int:
            self._leaves.append(data)
            return lambda leaves: leaves[data]
        ((kind, content),) = data.items()
        if kind == "record":
            name, content = content
            made = collections.namedtuple(name, [field for field, _ in content])  # type: ignore[misc]
            builders = [self._builder(item) for _, item in content]
            return lambda leaves: made(*(build(leaves) for build in builders))
        if kind in ("tuple", "list"):
            builders = [self._builder(item) for item in content]
            sequence: Any = {"tuple": tuple, "list": list}[kind]
            return lambda leaves: sequence(build(leaves) for build in builders)
        mapping: Any = {"dict": dict, "OrderedDict": collections.OrderedDict}[kind]
        pairs = [(decode(key), self._builder(item)) for key, item in content]
        return lambda leaves: mapping((key, build(leaves)) for key, build in pairs)


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
