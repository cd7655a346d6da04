"""Where a module computes: where its weights are, or, for weights that are kept in host memory, where it is told to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightcache_fx.errors import ArgumentError, TransformError
from lightcache_fx.policy import Policy, Swap

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Where the weights of a module are, and what its policy says of where it computes.

    Attributes:
        origin: where the weights are (the first parameter).
        asked: `Swap(device=...)`.
        hosted: whether the weights are kept in host memory, or in files mapped there, for any device.
    """

    origin: torch.device
    asked: torch.device | None = None
    hosted: bool = False

    @property
    def device(self) -> torch.device:
        """Where the module computes, as far as that is known before a call."""
        return self.asked or self.origin

    def device_for(self, owner: str, tensors: Iterable[torch.Tensor]) -> torch.device:
        """Where a call computes.

        As asked for; otherwise where the weights are or, where these are hosted, on the accelerator that tensors of the
        call are on.

        Args:
            owner: the module's name, for messages.
            tensors: of the call.

        Raises:
            ArgumentError: no tensor is on the device that was asked for, or some are on other accelerators.
        """
        if not self.hosted:
            return self.device
        devices = list(dict.fromkeys(tensor.device for tensor in tensors if not tensor.is_meta))
        accelerators = [device for device in devices if device.type != "cpu"]
        named = ", ".join(map(str, devices))
        if self.asked is not None and devices and (self.asked not in devices or accelerators not in ([], [self.asked])):
            raise ArgumentError(
                f"{owner}: expected the call's tensors on {self.asked}, where Swap(device=...) says that it computes,"
                f" got tensors on {named}; move them there with .to('{self.asked}'), or leave device out of Swap"
            )
        if len(accelerators) > 1:
            raise ArgumentError(
                f"{owner}: expected the call's tensors on one device, where its weights are to be fetched to, got"
                f" tensors on {named}; move them to one, or name it in Swap(device=...)"
            )
        return self.asked or next(iter(accelerators), _CPU)


def placement_of(module: nn.Module, policy: Policy) -> Placement:
    """Where a module's weights are now, and where its policy has it compute.

    Raises:
        TransformError: the policy names a device that there is none of, or another than that of weights which are on
            an accelerator.
    """
    weights = [*module.parameters(), *module.buffers()]
    origin = next((weight.device for weight in module.parameters()), _CPU)
    asked = _device_of(policy.swap.device) if policy.swap is not None and policy.swap.device is not None else None
    elsewhere = next((weight.device for weight in weights if weight.device.type not in ("cpu", "meta")), None)
    if asked is not None and elsewhere not in (None, asked):
        raise TransformError(
            f"Swap(device={str(asked)!r}): expected the weights of {type(module).__name__} there or in host memory, got"
            f" weights on {elsewhere}; move the module with .to('cpu') or .to('{asked}') first, or leave device out"
        )
    return Placement(origin, asked, policy.swaps_weights() and all(weight.device.type == "cpu" for weight in weights))


def _device_of(name: str) -> torch.device:
    """A device by its name, with its index."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    index = device.index if ":" in name else (torch.cuda.current_device() if count else 0)
    if index >= count:
        raise TransformError(
            f"Swap(device={name!r}): expected a device of this machine, on which torch sees {count} CUDA devices; leave"
            f" device out to compute where the call's tensors are"
        )
    return torch.device("cuda", index)


def weights_fit(weights: Sequence[torch.Tensor], device: torch.device, policy: Policy) -> bool:
    """Whether a module's weights may all be on a device at once.

    They may where those that are not there yet have room, and the bytes of all are within the budget in force, if that
    is one in bytes.

    Args:
        weights: all of the module's; tensors that share memory count once.
        device: where it computes.
        policy: whose `memory_budget`, or budget of `swap`, is in force.
    """
    storages = {weight.untyped_storage()._cdata: weight for weight in weights}  # noqa: SLF001 - its only identity
    sizes = {key: (weight.device, weight.untyped_storage().nbytes()) for key, weight in storages.items()}
    missing = sum(size for where, size in sizes.values() if where != device)
    asked = policy.memory_budget if policy.memory_budget is not None else (policy.swap or Swap()).budget
    within = not isinstance(asked, int) or sum(size for _, size in sizes.values()) <= asked
    return not missing or (within and missing <= free_bytes(device))


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that can be allocated now: the driver's, and those that torch holds for no tensor."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
