"""What programs find and leave from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch

from lightcache_fx.arena import span_of

SLOT = "slot"
"""The version of a slot's copy: slots are made anew, never written to."""


def version_of(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """Identity and version of a tensor's content; None for inference tensors, which count no versions."""
    return None if tensor.is_inference() else (id(tensor), tensor.data_ptr(), tensor._version)


@dataclass
class Copies:
    """The device's copies of what is away, by name; each with what tells that its source has not changed since."""

    held: dict[str, tuple[torch.Tensor, object]] = field(default_factory=dict)

    def put(self, name: str, copy: torch.Tensor, version: object) -> None:
        """Keep a copy."""
        self.held[name] = copy, version

    def take(self, name: str, version: object) -> torch.Tensor | None:
        """Hand a copy over, or None where there is none of this version, or versions are not counted."""
        found = self.held.pop(name, None)
        return found[0] if found is not None and version is not None and found[1] == version else None

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def num_bytes(self) -> int:
        """Bytes that all copies hold on the device."""
        return sum(span_of(copy) for copy, _ in self.held.values())

    def keep_only(self, names: Container[str]) -> None:
        """Free all others."""
        for name in [name for name in self.held if name not in names]:
            del self.held[name]

    def drop(self) -> None:
        """Free all of them."""
        self.held.clear()


@dataclass
class Stores:
    """What a program finds and leaves beside its call's tensors.

    Attributes:
        slots: values of an earlier step, on the device or where they are kept.
        hoisted: values computed once a generation.
        weight_copies: the device's copies of weights that are kept elsewhere.
        slot_copies: the device's copies of slots, or slots that never leave it between two programs.
        buffer: makes room of so many bytes for a slot, where it is kept.
    """

    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    hoisted: Mapping[str, torch.Tensor] = field(default_factory=dict)
    weight_copies: Copies = field(default_factory=Copies)
    slot_copies: Copies = field(default_factory=Copies)
    buffer: Callable[[int], torch.Tensor] | None = None
