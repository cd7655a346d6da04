"""A saved module's weights as a tree of plain modules, by their full names, with the methods' signatures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightcache_fx.encoding import decode
from lightcache_fx.errors import LoadError, TransformError
from lightcache_fx.manifest import ParameterRecord, WeightRecord

_KINDS: dict[str, Any] = {
    name: getattr(inspect.Parameter, name)
    for name in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")
}


class SavedWeights(nn.Module):
    """What a loaded module has in the place of its original: the weights, and methods that cannot run without it."""


class _Part(nn.Module):
    """A submodule: holds weights."""


def weights_class(model: str, methods: Mapping[str, Sequence[ParameterRecord]]) -> type[SavedWeights]:
    """A class of the model's name whose methods have the model's parameters.

    Raises:
        LoadError: a name is none in Python, or parameters do not make a signature.
    """
    for name in (model, *methods):
        if not name.isidentifier() or name.startswith("_"):
            raise LoadError(f"{name!r} is no name of a class or method")
    if not methods or not (set(methods) == {"forward"} or set(methods) <= {"decode", "encode"}):
        raise LoadError(f"expected the methods forward, or decode and encode, got {', '.join(methods) or 'none'}")
    namespace = {name: _method(name, parameters) for name, parameters in methods.items()}
    return type(model, (SavedWeights,), {**namespace, "__doc__": f"A {model} that was loaded from a folder."})


def _method(name: str, parameters: Sequence[ParameterRecord]) -> Any:
    def method(self: nn.Module, *_args: Any, **_kwargs: Any) -> Any:
        raise TransformError(f"{type(self).__name__} was loaded from a folder and has no {name} but its programs")

    try:
        own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        own += [inspect.Parameter(p.name, _KINDS[p.kind], default=_default(p)) for p in parameters]
        method.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    except ValueError as error:
        raise LoadError(f"the parameters of {name} make no signature: {error}") from None
    method.__name__ = method.__qualname__ = name
    return method


def _default(parameter: ParameterRecord) -> Any:
    return decode(parameter.default[0]) if parameter.default else inspect.Parameter.empty


def hang_weights(root: SavedWeights, records: Mapping[str, WeightRecord], tensors: Mapping[str, torch.Tensor]) -> None:
    """Register the weights below `root` by their full names; tied ones as the very same object.

    Args:
        root: of the tree.
        records: by full name.
        tensors: of those that are not tied.

    Raises:
        LoadError: a name cannot be one of a weight, or a weight is tied to none.
    """
    made: dict[str, torch.Tensor] = {
        name: nn.Parameter(tensor, requires_grad=False) if records[name].is_parameter else tensor
        for name, tensor in tensors.items()
    }
    for name, record in records.items():
        weight = made.get(record.tied_to or name)
        if weight is None or isinstance(weight, nn.Parameter) != record.is_parameter:
            raise LoadError(f"{name} is tied to {record.tied_to!r}, which is no weight of its kind")
        *path, last = name.split(".")
        owner: nn.Module = root
        try:
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, _Part().eval())
                found = owner._modules[part]
                assert found is not None
                owner = found
            if isinstance(weight, nn.Parameter):
                owner.register_parameter(last, weight)
            else:
                owner.register_buffer(last, weight, persistent=record.is_persistent)
        except (KeyError, TypeError) as error:
            raise LoadError(f"{name!r} cannot be the name of a weight: {error}") from None
