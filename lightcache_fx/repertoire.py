"""The programs of a module, by signature: found for a call, held, and dropped where there are too many."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightcache_fx.calls import Call, CallLayout, CallReader
from lightcache_fx.capture import Capture
from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.compiled import Compiled
from lightcache_fx.dynamic import MOST_SIZES
from lightcache_fx.errors import TransformError
from lightcache_fx.homes import Homes, Tier
from lightcache_fx.ledger import Ledger
from lightcache_fx.module_state import ModuleState, weight_slots
from lightcache_fx.placement import Placement, placement_of
from lightcache_fx.policy import Policy, Swap

log = logging.getLogger(__name__)


def homes_of(module: nn.Module, policy: Policy) -> Homes:
    """Where a module's weights are kept while they are away: on disk for one that runs on the CPU, unless told so.

    Raises:
        TransformError: as `placement_of`.
    """
    placement, swap = placement_of(module, policy), policy.swap or Swap()
    on_cpu = all(weight.device.type == "cpu" for weight in (*module.parameters(), *module.buffers()))
    tier = _tier(policy, on_cpu=on_cpu and placement.device.type == "cpu")
    return Homes(
        lambda: weight_slots(module), tier, swap.folder, device=placement.device, origin=placement.origin
    )  # fmt: skip


def _tier(policy: Policy, *, on_cpu: bool) -> Tier:
    return (policy.swap or Swap()).to or ("disk" if on_cpu else "host")


def _key_of(made: Compiled) -> tuple[CallLayout, Hashable]:
    """By the call and the state of the module; and where the capture takes values for granted, by these."""
    key, readings = made.signature.state.key, made.capture.readings
    return made.capture.layout, (key if readings is None else (key, readings.key))


class Repertoire(ABC):
    """The programs of one of a module's methods.

    Args:
        module: the user's module, in evaluation mode when it is called.
        policy: what to do with it.
        method: which of its methods to run by programs.
        homes: where its weights are kept while they are away; shared by all that runs the module.
        ledger: who is on the device; shared by all models that must not be there at the same time.

    Attributes:
        compiled: what was made, by the call and the state of the module; what was used last at the end.
        state: of the module when it was looked at last.
        placement: where it computes.

    Raises:
        ArgumentError: the policy's rates name a parameter that the method does not have.
        TransformError: the policy swaps to a device that there is none of, or that the weights cannot be used from.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        method: str = "forward",
        *,
        homes: Homes | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.module = module
        self.policy = policy
        self.reader = CallReader(module, rates=policy.rates, method=method)
        self.homes = homes or homes_of(module, policy)
        self.ledger = ledger or Ledger()
        self.placement: Placement = placement_of(module, policy)
        self.compiled: OrderedDict[tuple[CallLayout, Hashable], Compiled] = OrderedDict()
        self.state = ModuleState.take(module, self.homes.device_of)
        self._lock = threading.Lock()

    @abstractmethod
    def build(self, call: Call) -> Compiled:
        """Make programs for a call that there are none for."""

    @abstractmethod
    def plan_anew(self, compiled: Compiled, branches: int, beside: int) -> Compiled:
        """Make programs for a step of so many guidance branches, beside so many bytes that other signatures keep."""

    def programs_for(self, call: Call) -> Compiled:
        """The programs for a call, made when its signature is new."""
        with CAPTURE_LOCK.running():
            found = self._known(call)
        if found is None:
            with CAPTURE_LOCK.capturing():  # another thread may have made it meanwhile
                found = self._known(call) or self.keep(self.build(call))
        return found

    def for_branches(self, compiled: Compiled, branches: int, beside: int) -> Compiled:
        """The same for a step of so many guidance branches, beside so many bytes that other signatures keep."""
        with CAPTURE_LOCK.capturing():
            found = compiled.signature.made(branches, beside) or self.plan_anew(compiled, branches, beside)
            return self.keep(found)

    def keep(self, made: Compiled) -> Compiled:
        """Hold what was made, as what was used last."""
        with self._lock:
            self.compiled[_key_of(made)] = made
            if made.plan.beside:
                made.signature.beside[made.plan.branches, made.plan.beside] = made
            else:
                made.signature.compiled[made.plan.branches] = made
            self._drop_oldest(made)
        return made

    def _known(self, call: Call) -> Compiled | None:
        with self._lock:
            if not self.state.unchanged():
                self._notice_moves()
                self.state = ModuleState.take(self.module, self.homes.device_of)
            found = self.compiled.get((call.layout, self.state.key)) or self._by_values(call)
            if found is not None:
                self.compiled.move_to_end(_key_of(found))
            return found

    def _by_values(self, call: Call) -> Compiled | None:
        """What was made for calls in which the model reads the same of its tensors."""
        for made in reversed(self.compiled.values()):
            captured = made.capture
            is_like = captured.layout == call.layout and made.signature.state.key == self.state.key
            if is_like and isinstance(captured, Capture) and captured.holds_for(self.module, call):
                return made
        return None

    def _drop_oldest(self, made: Compiled) -> None:
        """Hold at most `max_signatures` captures; one of sizes that vary is dropped as a whole, and counts once."""
        of_capture: dict[object, list[tuple[CallLayout, Hashable]]] = {}
        for key, one in reversed(self.compiled.items()):
            of_capture.setdefault(one.signature.dynamic or one.signature, []).append(key)
        if made.signature.dynamic is not None and len(sizes := of_capture[made.signature.dynamic]) > MOST_SIZES:
            del self.compiled[sizes[-1]]
        if len(of_capture) <= self.policy.max_signatures:
            return
        keys = of_capture[next(reversed(of_capture))]
        for key in keys:
            del self.compiled[key]
        shapes = keys[0][0].shapes() + (f" and {len(keys) - 1} other sizes" if len(keys) > 1 else "")
        log.warning("max_signatures=%d reached: dropped the programs for %s", self.policy.max_signatures, shapes)

    # Where weights are ------------------------------------------------------------------------------------------------

    @property
    def is_away(self) -> bool:
        """Whether the weights stay in host memory, and the module computes on an accelerator."""
        return self.placement.hosted and self.homes.device.type != "cpu"

    def place(self, arguments: object) -> bool:
        """Compute where weights that are in host memory are fetched to for these arguments.

        Returns:
            whether that is another device than before.
        """
        if not self.placement.hosted:
            return False
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        device = self.placement.device_for(self.reader.owner, tensors)
        if device == self.homes.device:
            return False
        with self._lock:
            self.homes.compute_on(device, _tier(self.policy, on_cpu=device.type == "cpu"))
            self.state = ModuleState.take(self.module, self.homes.device_of)
        return True

    def note_places(self) -> None:
        """Weights have moved: programs look again which of them are on the device."""
        for first in list(self.compiled.values()):
            for compiled in first.signature.everything():
                compiled.note_places()

    def recall(self) -> None:
        """Bring all weights to the device."""
        self.homes.recall(self.homes.device)
        self.note_places()

    def _notice_moves(self) -> None:
        """A module that was in host memory may have been moved by its user, and is where it was moved to then."""
        if self.placement.hosted:
            self.placement = placement_of(self.module, self.policy)
            if not self.placement.hosted:
                self.homes.origin = self.placement.origin
        self.note_places()

    # What there is ----------------------------------------------------------------------------------------------------

    def latest(self) -> Compiled:
        """What was made for the signature that was used last.

        Raises:
            TransformError: the module has not been called yet.
        """
        if not self.compiled:
            raise TransformError(
                f"{type(self.module).__name__} has not been called yet, so there are no programs; call it once"
            )
        return next(reversed(self.compiled.values()))

    def current(self) -> list[list[Compiled]]:
        """What was made for the module in the state that it is in now, the signature that was used last at the end.

        Of each signature, what was made for each number of guidance branches; likewise, what was used last at the end.
        """
        key = ModuleState.take(self.module, self.homes.device_of).key
        return [every for every in self.everything() if every[-1].signature.state.key == key]

    def everything(self) -> list[list[Compiled]]:
        """As `current`, of every state that the module has been in."""
        with self._lock:
            used = list(self.compiled.values())
            return [[*(m for m in made.signature.everything() if m is not made), made] for made in used]
