"""What was made for one signature: its capture, and the plan and programs for each number of guidance branches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightcache_fx.calls import CapturedCall
from lightcache_fx.handover import HandOver
from lightcache_fx.module_state import ModuleState
from lightcache_fx.plan import Plan
from lightcache_fx.program import BoundProgram, Program

if TYPE_CHECKING:
    from lightcache_fx.dynamic import DynamicCapture


@dataclass(frozen=True, eq=False)
class Signature:
    """What is made once for one signature.

    Attributes:
        capture: of the model, or what was saved of it.
        plan: what was decided before memory was looked at.
        state: kept so that the objects whose identity is in the key stay alive.
        compiled: what was made of it, by how many calls a denoising step has.
        beside: likewise, where calls of other signatures keep something too; by the bytes of that as well.
        dynamic: the capture of sizes that vary whose programs these are; None where the capture is of this size alone.
    """

    capture: CapturedCall
    plan: Plan
    state: ModuleState
    compiled: dict[int, Compiled] = field(default_factory=dict)
    beside: dict[tuple[int, int], Compiled] = field(default_factory=dict)
    dynamic: DynamicCapture | None = None

    def made(self, branches: int, beside: int) -> Compiled | None:
        """What was made for a step of so many calls, beside so many bytes of others."""
        return self.beside.get((branches, beside)) if beside else self.compiled.get(branches)

    def everything(self) -> list[Compiled]:
        """All that was made of it."""
        return [*self.compiled.values(), *self.beside.values()]

    @property
    def kept_bytes(self) -> int:
        """Bytes that a branch keeps: slots, hoisted values, and what steps decide and extrapolate by."""
        return self.plan.kept_bytes + self.plan.hoist.num_bytes


@dataclass(frozen=True, eq=False)
class Compiled:
    """The plan and the programs for a signature and a number of guidance branches."""

    signature: Signature
    plan: Plan
    programs: dict[str, Program]
    bound: dict[str, BoundProgram]
    last: dict[int, LastCall] = field(default_factory=dict)

    @property
    def capture(self) -> CapturedCall:
        """Of the model, or what was saved of it."""
        return self.signature.capture

    def note_places(self) -> None:
        """Keep copies on the device, while the model is there, of what the plan keeps there and what is elsewhere."""
        swap = self.plan.swap
        resident = swap.resident if swap is not None else frozenset[str]()
        once = resident if swap is not None and swap.keeps_residents else frozenset[str]()
        planned = {name: once if name == "prologue" else resident for name in self.bound}
        planned |= {last.name: frozenset() for last in self.last.values() if last.name in self.bound}
        elsewhere = frozenset[str]().union(*(program.elsewhere(planned[name]) for name, program in self.bound.items()))
        for name, program in self.bound.items():
            program.keep_resident(planned[name] | elsewhere)


@dataclass(frozen=True, eq=False)
class LastCall:
    """A call of a period made as the last one before another model's.

    Attributes:
        before: the programs that the other model ran first.
        plan: what is fetched for them; None where nothing is.
        name: of the program.
    """

    before: tuple[BoundProgram, ...]
    plan: HandOver | None
    name: str
