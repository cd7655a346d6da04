"""What programs find and leave from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lightcache_fx.arena import span_of
from lightcache_fx.transfers import OFFLOAD, PREFETCH, RELEASE, WAIT

SLOT = "slot"
"""The version of a slot's copy: slots are made anew, never written to."""


def version_of(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """Identity and version of a tensor's content; None for inference tensors, which count no versions."""
    return None if tensor.is_inference() else (id(tensor), tensor.data_ptr(), tensor._version)


@dataclass
class Copies:
    """The device's copies of what is away, by name; each with what tells that its source has not changed since.

    The memory of a copy that is still under way is not free before that has ended, so letting one go waits for it.
    """

    held: dict[str, tuple[torch.Tensor, object]] = field(default_factory=dict)

    def put(self, name: str, copy: torch.Tensor, version: object) -> None:
        """Keep a copy."""
        self.held[name] = copy, version

    def take(self, name: str, version: object) -> torch.Tensor | None:
        """Hand a copy over, or None where there is none of this version, or versions are not counted."""
        if name not in self.held:
            return None
        copy, known = self.held.pop(name)
        if version is not None and known == version:
            return copy
        WAIT(copy)
        return None

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def num_bytes(self) -> int:
        """Bytes that all copies hold on the device."""
        return sum(span_of(copy) for copy, _ in self.held.values())

    def keep_only(self, names: Container[str]) -> None:
        """Free all others."""
        for name in [name for name in self.held if name not in names]:
            WAIT(self.held.pop(name)[0])

    def drop(self) -> None:
        """Free all of them."""
        self.keep_only(())

    def drop_one(self, name: str) -> None:
        """Free one of them, if it is there."""
        if name in self.held:
            WAIT(self.held.pop(name)[0])


class SlotPlace(NamedTuple):
    """Where a plan has a slot of one guidance branch when a call begins.

    Attributes:
        is_resident: it never leaves the device.
        is_sent_away: it has a copy where it is kept, as soon as it is made.
        is_present: it is on the device now.
    """

    is_resident: bool
    is_sent_away: bool
    is_present: bool


@dataclass
class Stores:
    """What a program finds and leaves beside its call's tensors.

    Attributes:
        slots: values of an earlier step, on the device or where they are kept.
        at_home: names of those that are where they are kept.
        hoisted: values computed once a generation.
        weight_copies: the device's copies of weights that are kept elsewhere.
        slot_copies: the device's copies of slots, or slots that never leave it between two programs.
        history: by slot, the values that it had at full steps before, newest first; all of them on the device, or where
            slots are kept.
        full_steps: by cache, the indices of the steps that its slots and their history are of, newest first.
        handed: values that the step's probe hands over.
        change: of the indicator, as the step's probe measured it; 0-dimensional.
        newest: the indicator itself.
        indicator: what the next probe compares with.
        buffer: makes room of so many bytes for a slot, where it is kept.
    """

    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    at_home: set[str] = field(default_factory=set)
    hoisted: Mapping[str, torch.Tensor] = field(default_factory=dict)
    weight_copies: Copies = field(default_factory=Copies)
    slot_copies: Copies = field(default_factory=Copies)
    history: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    full_steps: dict[int, tuple[int, ...]] = field(default_factory=dict)
    handed: dict[str, torch.Tensor] = field(default_factory=dict)
    change: torch.Tensor | None = None
    newest: torch.Tensor | None = None
    indicator: torch.Tensor | None = None
    buffer: Callable[[int], torch.Tensor] | None = None

    def __contains__(self, slot: object) -> bool:
        """Whether a slot is anywhere."""
        return slot in self.slots or slot in self.slot_copies

    def put_slot(self, name: str, value: torch.Tensor, *, at_home: bool) -> None:
        """Keep a slot that a program has made, or sent away."""
        self.slots[name] = value
        (self.at_home.add if at_home else self.at_home.discard)(name)

    def slot_on_device(self, name: str, device: torch.device) -> torch.Tensor:
        """A slot that is to stay on the device; fetched, where it was sent away before that was planned."""
        copy = self.slot_copies.take(name, SLOT)
        if copy is not None or name in self.at_home:
            copy = PREFETCH(self.slots[name], device, name) if copy is None else copy
            self.put_slot(name, WAIT(copy), at_home=False)
        return self.slots[name]

    def _slot_at_home(self, name: str) -> torch.Tensor:
        """A slot where slots are kept; sent there, where it is not yet."""
        if name not in self.at_home:
            value = self.slot_copies.take(name, SLOT)
            self._send_home(name, WAIT(self.slots[name] if value is None else value))
        return self.slots[name]

    def _send_home(self, name: str, value: torch.Tensor) -> None:
        assert self.buffer is not None
        leaving = OFFLOAD(value, self.buffer(value.numel() * value.element_size()), name)
        self.put_slot(name, RELEASE(leaving, value), at_home=True)

    def arrange(self, name: str, place: SlotPlace) -> None:
        """Bring a slot to where a plan has it, if it is elsewhere because it was made by another plan's program.

        What the plan has on the device and is not there stays where it is, and is fetched by the program that reads it.

        Raises:
            SwapError: there is no room at home.
        """
        if name not in self:
            return
        value = self.slot_copies.take(name, SLOT)
        if value is None and name not in self.at_home:
            value = self.slots.pop(name)
        if value is None:
            return
        if place.is_resident:
            self.put_slot(name, WAIT(value), at_home=False)
            return
        if name not in self.at_home and (place.is_sent_away or not place.is_present):
            self._send_home(name, value)
        if place.is_present:
            self.slot_copies.put(name, value, SLOT)
        else:
            WAIT(value)  # as in `Copies`

    def slot_bytes(self) -> int:
        """Bytes of all slots and of what steps decide by, each counted once, wherever it is."""
        passed_on = {name: copy for name, (copy, _) in self.slot_copies.held.items()}
        older = [value for values in self.history.values() for value in values]
        older += [value for value in (self.indicator, self.change) if value is not None]
        return sum(slot.untyped_storage().nbytes() for slot in (*{**passed_on, **self.slots}.values(), *older))

    def make_room(
        self,
        slots: Iterable[str],
        order: int,
        step: int,
        device: torch.device,
        *,
        cache: int = 0,
        copy: bool = False,
        away: bool = False,
    ) -> None:
        """Make room for the slots that a step makes: they become the newest of their history, of which `order` stay.

        Args:
            slots: of one cache.
            order: of its expansion; 0 keeps no history, and whatever is kept is freed.
            step: the step's index.
            device: where history is.
            cache: its place in the policy.
            copy: whether the step writes slots to where they are now.
            away: whether history is where slots are kept instead.

        Raises:
            SwapError: there is no room there.
        """
        self.full_steps[cache] = (step, *self.full_steps.get(cache, ()))[: order + 1]
        for name in slots:
            if order and name in self:
                older = self.history.get(name, [])
                del older[order - 1 :]  # before a slot that is away comes back
                if away:
                    value = self._slot_at_home(name)
                else:
                    value = self.slot_on_device(name, device)
                    value = value.clone() if copy else value
                self.history[name] = [value, *older]
            self.slots.pop(name, None)
            self.at_home.discard(name)
            self.slot_copies.drop_one(name)

    def keep_indicator(self, *, always: bool, full: bool) -> None:
        """What the next probe compares with is what this step's has found, where that is full or each is."""
        if always or full:
            self.indicator = self.newest
        self.newest = None

    def indicator_like(self, like: torch.Tensor) -> torch.Tensor:
        """What a probe compares with; zeros before there is anything, when what it finds is not looked at."""
        return _zeros(like) if self.indicator is None else self.indicator

    def older(self, slot: str, age: int, like: torch.Tensor) -> torch.Tensor:
        """A slot's value of so many full steps before, on the device; zeros, which are weighed by 0, without one."""
        value = self._older(slot, age)
        if value is None:
            return _zeros(like)
        return value if value.device == like.device else WAIT(PREFETCH(value, like.device, slot))

    def copy_of_older(self, slot: str, age: int, like: torch.Tensor) -> torch.Tensor:
        """The same, to be waited for: a copy that has been begun."""
        value = self._older(slot, age)
        return _zeros(like) if value is None else PREFETCH(value, like.device, slot)

    def _older(self, slot: str, age: int) -> torch.Tensor | None:
        values = self.history.get(slot, [])
        return values[age - 1] if age <= len(values) else None


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros like a (fake) tensor."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
