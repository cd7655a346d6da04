"""A device that is not there: values lie in the process's memory, devices are told apart as torch tells them.

    with PretendDevice(capacity=2**20) as device:
        sample = torch.ones(4, device=DEVICE)   # counts 16 bytes
        sample + torch.ones(4)                    # RuntimeError: all tensors must be on the same device
    device.peak_bytes

What runs on it has the very bits that the CPU computes. Kernels' own temporaries do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lightcache_fx import fetching, placement, transfers

DEVICE = torch.device("privateuseone:0")
CPU = torch.device("cpu")
_COPIES = ("copy_", "_to_copy", "to")
_setup_privateuseone_for_python_backend()  # once a process: it stays, without any operator of its own


class OnDevice(torch.Tensor):
    """A tensor that says that it is on the device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of PretendDevice")

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendDevice(TorchDispatchMode):
    """While it is entered there is a device `DEVICE`.

    Args:
        capacity: bytes that fit it; None for any.

    Attributes:
        num_bytes: that are on it now; tensors that share memory count once.
        peak_bytes: the most so far; set it to 0 to begin anew.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.num_bytes = self.peak_bytes = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # nothing is computed, wherever it says that it is
        if (composite := _OURS.get(func)) is not None:
            with self:
                return composite(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        name = func._schema.name.partition("::")[2]
        if there and name not in _COPIES and any(t.dim() for t in tensors if not isinstance(t, OnDevice)):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, got {DEVICE} and cpu")
        asked = kwargs.get("device")
        on_device = torch.device(asked).type == DEVICE.type if asked is not None else bool(there)
        if name == "copy_":
            on_device = isinstance(args[0], OnDevice)
        if asked is not None:
            kwargs["device"] = CPU
        found = {id(tensor.held): tensor for tensor in there}
        plain_args, plain_kwargs = pytree.tree_map_only(OnDevice, lambda tensor: tensor.held, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if name == "to" and isinstance(args[0], OnDevice) != on_device and result is plain_args[0]:
            result = result.clone()
        if not on_device:
            return result
        return pytree.tree_map_only(
            torch.Tensor, lambda held: found[id(held)] if id(held) in found else self._wrap(held), result
        )

    def _wrap(self, held: torch.Tensor) -> OnDevice:
        made, storage = OnDevice(held), held.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._users:
            if self.capacity is not None and self.num_bytes + size > self.capacity:
                raise torch.OutOfMemoryError(f"out of memory. Tried to allocate {size} bytes")
            self.num_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(made, self._unwrap, key, size).atexit = False
        return made

    def _unwrap(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.num_bytes -= size


class DirectEngine:
    """Copies to and from the device at once."""

    def prefetch(self, home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
        return home.to(device, copy=True)

    def wait(self, arriving: torch.Tensor) -> None:
        pass

    def offload(self, value: torch.Tensor, home: torch.Tensor, name: str) -> None:
        home.copy_(value)

    def release(self, home: torch.Tensor) -> None:
        pass


def _tolist(tensor: torch.Tensor) -> Any:
    """`Tensor.tolist`, which no tensor subclass has."""
    return _original_tolist(tensor.held if isinstance(tensor, OnDevice) else tensor)


_original_tolist = torch.Tensor.tolist
_OURS: dict[Any, Callable[..., Any]] = {
    fetching.FETCH: fetching._copied,
    transfers.PREFETCH: transfers._prefetch,
    transfers.WAIT: transfers._wait,
    transfers.OFFLOAD: transfers._offload,
    transfers.RELEASE: transfers._release,
}


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, capacity: int | None = None) -> Iterator[PretendDevice]:
    """The device is there, and copies to it and from it are made at once."""
    device, engine = PretendDevice(capacity), DirectEngine()
    monkeypatch.setattr(transfers, "_engine", lambda _: engine)
    monkeypatch.setattr(torch.Tensor, "tolist", _tolist)
    monkeypatch.setattr(placement, "free_bytes", lambda _: 2**40 if capacity is None else capacity - device.num_bytes)
    with device:
        yield device


def to_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, there."""
    return [tensor.to(DEVICE) for tensor in tensors]
