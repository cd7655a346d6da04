"""Everything in a module tree, beside the values of its weights, that can change what `forward` does.

Used twice: to see, before every call, that a capture is still valid (a LoRA adapter injected, an attention processor
set, FreeU switched on, a dtype changed), and to put a module back as it was after it has been traced (lazily filled
caches).
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, torch.Tensor)
_MAX_DEPTH = 6

Container = dict[Any, Any] | list[Any] | set[Any]


@dataclass
class ModuleState:
    """A snapshot of a module tree's structure and attributes; weights are covered by shape, dtype and device only.

    Attributes:
        key: equal for two states of one module exactly when the same captures are valid in both.
    """

    key: Hashable
    _contents: list[tuple[Container, Container]] = field(repr=False)
    _empty: list[Container] = field(repr=False)
    _weights: list[torch.Tensor] = field(repr=False)
    _weight_types: list[Any] = field(repr=False)
    # The entries of all dicts one after the other, without what every nn.Module has: comparing two long lists is what
    # makes `unchanged` quick.
    _dicts: list[dict[Any, Any]] = field(repr=False)
    _lengths: list[int] = field(repr=False)
    _owners: list[dict[Any, Any]] = field(repr=False)
    _keys: list[Any] = field(repr=False)
    _values: list[Any] = field(repr=False)

    @classmethod
    def take(
        cls, module: nn.Module, device_of: Callable[[torch.Tensor], torch.device] = operator.attrgetter("device")
    ) -> ModuleState:
        """Walk the module tree, its attributes, and the plain objects and containers that these hold.

        Args:
            module: the root.
            device_of: where a weight counts as being: one that is kept elsewhere for a while, as where it is used.
        """
        walk = _Walk()
        walk.module("", module)
        dicts = [c for c in walk.containers if c and isinstance(c, dict)]
        owners = [d for d in dicts for key in d if key not in _BOOKKEEPING]
        keys = [key for d in dicts for key in d if key not in _BOOKKEEPING]
        types_ = list(map(_weight_type, walk.weights))
        counted = [(weight.dtype, device_of(weight), weight.shape) for weight in walk.weights]
        return cls(
            key=_Key((tuple(walk.key), tuple(counted), _sharing(walk.weights))),
            _contents=[(c, c.copy()) for c in walk.containers if c],
            _empty=[c for c in walk.containers if not c],
            _weights=walk.weights,
            _weight_types=types_,
            _dicts=dicts,
            _lengths=list(map(len, dicts)),
            _owners=owners,
            _keys=keys,
            _values=list(map(operator.getitem, owners, keys)),
        )

    def unchanged(self) -> bool:
        """Whether nothing has been assigned, added or removed since: a quick test by identity, with false alarms."""
        if any(self._empty) or list(map(len, self._dicts)) != self._lengths:
            return False
        try:
            if not all(map(operator.is_, map(operator.getitem, self._owners, self._keys), self._values)):
                return False
        except KeyError:  # removed, and another added in its place
            return False
        if not all(_same_items(*pair) for pair in self._contents if not isinstance(pair[0], dict)):
            return False
        return list(map(_weight_type, self._weights)) == self._weight_types

    def restore(self) -> int:
        """Put back every attribute and container as it was; returns how many had changed."""
        changed = 0
        for container in self._empty:
            changed += bool(container)
            container.clear()
        for container, copy in self._contents:
            if not _same_items(container, copy):
                changed += 1
                _refill(container, copy)
        return changed


class _Walk:
    """Collects the containers of a module tree and a key of what they hold."""

    def __init__(self) -> None:
        self.containers: list[Container] = []
        self.weights: list[torch.Tensor] = []
        self.key: list[Hashable] = []
        self._seen: set[int] = set()

    def module(self, path: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            self.key.append((path, "shared", id(module)))
            return
        self._seen.add(id(module))
        state = vars(module)
        self.key.append((path, type(module), id(module)))
        self.containers += [state, module._modules, module._parameters, module._buffers]
        for kind in ("_parameters", "_buffers"):
            for name, weight in state[kind].items():
                self.key.append((name, None if weight is None else "weight"))
                if weight is not None:
                    self.weights.append(weight)
        for name in _HOOKS:
            self.containers.append(state[name])
            self.key.append(tuple(map(id, state[name].values())))
        for name, value in state.items():
            if name not in _BOOKKEEPING:
                self.value(name, value, _MAX_DEPTH)
        for name, child in module._modules.items():
            if child is None:
                self.key.append((name, None))
            else:
                self.module(f"{path}.{name}" if path else name, child)

    def value(self, name: Hashable, value: object, depth: int) -> None:
        if isinstance(value, _PLAIN):
            self.key.append((name, type(value), value))
        elif isinstance(value, nn.Module):
            self.module(str(name), value)
        elif isinstance(value, _OPAQUE) or depth == 0 or id(value) in self._seen:
            self.key.append((name, id(value)))
        else:
            self._seen.add(id(value))
            self.key.append((name, type(value)))
            for key, item in self._items(value):
                self.value(key, item, depth - 1)

    def _items(self, value: object) -> Iterator[tuple[Hashable, object]]:
        match value:
            case dict():
                self.containers.append(value)
                yield from value.items()
            case list() | set():
                self.containers.append(value)
                yield from enumerate(value)
            case tuple():
                yield from enumerate(value)
            case _ if isinstance(state := getattr(value, "__dict__", None), dict):
                self.containers.append(state)
                yield from state.items()
            case _:
                yield "", id(value)


class _Key:
    """A long key whose hash is computed once."""

    def __init__(self, content: tuple[Hashable, ...]) -> None:
        self._content = content
        self._hash = hash(content)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Key) and self._hash == other._hash and self._content == other._content


def _sharing(weights: list[torch.Tensor]) -> tuple[int, ...]:
    """For each weight the place of the first one that is the same tensor: tied weights are captured as one."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(weight), index) for index, weight in enumerate(weights))


_weight_type = operator.attrgetter("dtype", "device", "shape")


def _same_items(a: Container, b: Container) -> bool:
    """Whether two containers hold the very same objects under the same keys, in the same order."""
    if isinstance(a, set):
        return set(map(id, a)) == set(map(id, b))
    if len(a) != len(b) or not all(map(operator.is_, a, b)):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return all(map(operator.is_, a.values(), b.values()))
    return True


def _refill(container: Container, content: Container) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def weight_slots(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter and buffer lives, by full name: `(the owner's dict, key)`, to look it up at every call."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for table in (owner._parameters, owner._buffers):
            for name in table:
                slots[f"{path}.{name}" if path else name] = (table, name)
    return slots
