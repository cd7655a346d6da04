"""A module that runs as it is while its weights are elsewhere: each operation gets copies of those that it reads.

    with WeightsAway(torch.device("cuda:0")).fetched(unet):  # its weights are in host memory, or in mapped files
        unet(latents, timestep, prompt_embeds)               # computed on the device

A weight is on the device for the one operation that reads it, so beside activations the largest operation's weights
decide what that takes, not their sum. It is copied each time that it is read: this is for capturing, where a model runs
a few times, and not for denoising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightcache_fx.arena import ALIGNMENT, arena_of, arenas, span_of
from lightcache_fx.errors import CaptureError, SwapError
from lightcache_fx.mapped import check_file
from lightcache_fx.module_state import weight_slots
from lightcache_fx.transfers import copy_bytes
from lightcache_fx.units import format_bytes

_PLACING = frozenset({"to", "cpu", "cuda", "type"})
"""What may ask for another device, and so is asked of the device's copy."""
_ATTRIBUTES = "__get__"


@dataclass(frozen=True)
class WeightsAway:
    """Weights that are not where a module computes, and stay where they are.

    Attributes:
        device: where it computes.
        chosen: which of its weights are away; by default those on another device.
    """

    device: torch.device
    chosen: Callable[[torch.Tensor], bool] | None = None

    def is_away(self, weight: torch.Tensor) -> bool:
        """Whether a weight is to be copied to the device before it is read."""
        return weight.device != self.device if self.chosen is None else self.chosen(weight)

    def fetched(self, module: nn.Module) -> FetchedForOperations:
        """A mode in which the module's operations read copies on the device."""
        found = {name: table[key] for name, (table, key) in weight_slots(module).items()}
        away = {name: weight for name, weight in found.items() if weight is not None and self.is_away(weight)}
        return FetchedForOperations(away, self.device, type(module).__name__)


class FetchedForOperations(TorchFunctionMode):
    """While this is entered, what a call of torch reads of certain weights are copies on a device.

    * A view of a weight is taken where the weight is; what reads the view gets a copy of the view, laid out as it is.
    * Asked for its device, a weight or a view of one names the device that it is read on.
    * A call that writes to a weight, or to a view of one, is refused, and has written to a copy.

    What torch does otherwise because functions are overridden (`nn.MultiheadAttention` leaves out its fast path) holds
    here too, and Python code that is no call of torch's gets the weight as it is.

    Args:
        weights: by name; others, and all other tensors, are left alone.
        device: where they are read.
        owner: the model's name, for messages.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device, owner: str) -> None:
        super().__init__()
        self._device = device
        self._owner = owner
        self._weights = dict(weights)  # so that no other storage takes the place of one of theirs
        self._names = {_storage_of(weight): name for name, weight in weights.items() if weight.numel()}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One call: as it is where it reads no weight, otherwise with copies in their places."""
        del types
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        away = [tensor for tensor in tensors if self.name_of(tensor) is not None]
        if not away:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in (_ATTRIBUTES, "__set__"):
            return self._attribute(func, name, args)
        if name == "get_device":
            return -1 if self._device.type == "cpu" else self._device.index
        if len(away) == len(tensors) and name not in _PLACING:
            try:
                with _ViewsOnly():
                    return func(*args, **kwargs)
            except _ReadsError:
                pass
        return self._with_copies(func, args, kwargs)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The weight, away, whose memory a tensor lies in; None for all others."""
        return self._names.get(_storage_of(tensor))

    def _attribute(self, func: Any, name: str, args: Sequence[Any]) -> Any:
        asked, weight = getattr(getattr(func, "__self__", None), "__name__", ""), args[0]
        if self.name_of(weight) is None:  # what is set, to a tensor that is none of them
            return func(*args)
        if name == _ATTRIBUTES and asked == "device":
            return self._device
        if name == _ATTRIBUTES and asked in ("is_cpu", "is_cuda", "is_mps", "is_xpu"):
            return self._device.type == asked.removeprefix("is_")
        if name == "__set__" and asked == "data" and _storage_of(args[1]) != _storage_of(weight):
            raise self._written(weight)
        return func(*args)

    def _with_copies(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        copies: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

        def present(leaf: object) -> object:
            if not isinstance(leaf, torch.Tensor) or (name := self.name_of(leaf)) is None:
                return leaf
            if id(leaf) not in copies:
                copy = _fetched(leaf, self._device, name)
                copies[id(leaf)] = leaf, copy, _version(copy)
            return copies[id(leaf)][1]

        args, kwargs = pytree.tree_map(present, (tuple(args), dict(kwargs)))
        result = func(*args, **kwargs)
        for weight, copy, version in copies.values():
            if _version(copy) != version:
                raise self._written(weight)
        return result

    def _written(self, weight: torch.Tensor) -> CaptureError:
        return CaptureError(f"{self._owner} writes to its weight {self.name_of(weight)}; a step must be pure")


class _ReadsError(Exception):
    """An operation that is no view was called."""


class _ViewsOnly(TorchDispatchMode):
    """Stops a call at the first operation that reads, or writes to, what its arguments hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        shared = [value.alias_info for value in func._schema.returns]
        written = [value.alias_info for value in func._schema.arguments]
        if not shared or any(info is None for info in shared) or any(info and info.is_write for info in written):
            raise _ReadsError
        return func(*args, **(kwargs or {}))


def _storage_of(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - a storage has no other identity
    except (NotImplementedError, RuntimeError):  # sparse tensors, and what torch.func wraps, have none
        return None


def _version(copy: torch.Tensor) -> int:
    return 0 if copy.is_inference() else copy._version


def _fetched(weight: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    try:
        copy: torch.Tensor = FETCH(weight, device)
    except torch.OutOfMemoryError as error:
        raise _no_memory(weight, device, name, error) from error
    except RuntimeError as error:  # as the CPU's allocator reports it
        if isinstance(error, SwapError) or "alloc" not in str(error):
            raise
        raise _no_memory(weight, device, name, error) from error
    return copy


def _no_memory(weight: torch.Tensor, device: torch.device, name: str, error: RuntimeError) -> SwapError:
    return SwapError(
        f"no memory on {device} for {name} ({format_bytes(span_of(weight))}), which one operation reads while the model"
        f" is captured; it is intact where it is kept. Activations are not cut yet then: make the latent smaller, load"
        f" the model in half precision, or free what else is on {device}: {error}"
    )


def _copied(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of the memory that a weight or a view of one spans, and in it the same view.

    Operators choose their algorithms by strides and alignment too, so both are the original's.
    """
    begin = weight.storage_offset() * weight.element_size()
    first = begin // ALIGNMENT * ALIGNMENT
    size = begin - first + span_of(weight)
    source = torch.empty(0, dtype=torch.uint8, device=weight.device).set_(
        weight.untyped_storage(), first, (size,), (1,)
    )
    if source.device.type == "cpu" and device.type == "cpu":
        block = _copied_on_cpu(source)
    else:
        _check_files(source)
        block = source.to(device)
    own = block[begin - first :].view(weight.dtype)
    return own.as_strided(weight.shape, weight.stride())


def _copied_on_cpu(source: torch.Tensor) -> torch.Tensor:
    block = torch.empty_like(source)
    try:
        copy_bytes(block, source)  # by the file, or a disk that fails would end the process
    except OSError as error:
        raise SwapError(f"cannot read weights of {format_bytes(source.numel())}: {error}") from error
    return block


def _check_files(source: torch.Tensor) -> None:
    """Raise a `SwapError` where the file that bytes are mapped from has been cut short."""
    if source.device.type != "cpu":
        return
    check_file(source)
    if (found := arena_of(source, arenas())) is not None:
        arena, offset = found
        arena.check_file(offset + source.numel())


def aliases(tensors: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]) -> bool:
    """Whether any of the tensors lies in the memory of any of the weights."""
    known = {_storage_of(weight) for weight in weights if weight.numel()} - {None}
    return any(_storage_of(tensor) in known for tensor in tensors if tensor.numel())


_library = torch.library.Library("lightcache", "FRAGMENT")
_library.define("fetch(Tensor weight, Device device) -> Tensor")
_library.impl("fetch", _copied, "CompositeExplicitAutograd")


def _fake_copied(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)


torch.library.register_fake("lightcache::fetch", _fake_copied, lib=_library)

FETCH = torch.ops.lightcache.fetch.default
