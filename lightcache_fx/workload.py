"""What the swap planner and the simulator look at: the calls of a period of denoising steps, as times and bytes.

A period is what repeats: one full step and the reuse steps up to the next. Behind its last call comes its first again,
where the workload is cyclic. Where guidance calls the model several times in a denoising step, once for each of its
branches, each of these is a step here, with slots of its own. Calls are numbered through the whole period. What can be
away from the device is a *movable*: a weight, or a slot (a cached feature). A call needs the movables that it reads on
the device, and makes those that it writes there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal


@dataclass(frozen=True)
class Movable:
    """Something that the device need not hold at every moment.

    Attributes:
        name: unique in its workload.
        num_bytes: on the device, as its allocator rounds them.
        kind: a weight has a copy at home all the time, so leaving the device costs no transfer; a slot is made on the
            device, and has one from its first offload until it is made again.
        branch: of a slot, where a denoising step has several calls: the place in the step of the one that it belongs
            to. Its name then ends with that.
    """

    name: str
    num_bytes: int
    kind: Literal["weight", "slot"] = "weight"
    branch: int | None = None

    @property
    def plain_name(self) -> str:
        """As programs know it."""
        return self.name if self.branch is None else self.name.removesuffix(f"@{self.branch}")

    def of_branch(self, branch: int) -> Movable:
        """A weight as it is, which all branches share; of a slot, that of one branch."""
        return self if self.kind == "weight" else replace(self, name=f"{self.name}@{branch}", branch=branch)


@dataclass(frozen=True)
class Op:
    """One call of a program.

    Attributes:
        name: of its node.
        seconds: predicted time on the compute engine.
        live_bytes: the most that is live on the device during the call, without any movable.
        reads: movables that it needs on the device.
        writes: movables that it makes there.
    """

    name: str
    seconds: float
    live_bytes: int
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One run of a program within the period."""

    program: str
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Workload:
    """A period of steps.

    Attributes:
        steps: in order.
        movables: by name; every one that an op names, and only such.
        cyclic: whether the first step follows the last. Otherwise each period starts with nothing on the device but
            what is resident.
    """

    steps: tuple[Step, ...]
    movables: Mapping[str, Movable]
    cyclic: bool = True

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """All calls of the period."""
        return tuple(op for step in self.steps for op in step.ops)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each step's first call, and behind them the number of calls."""
        return (0, *accumulate(len(step.ops) for step in self.steps))

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """The calls that read each movable, in order."""
        return self._users([op.reads for op in self.ops])

    @cached_property
    def writers(self) -> dict[str, list[int]]:
        """The calls that make each movable, in order."""
        return self._users([op.writes for op in self.ops])

    def _users(self, names_by_op: list[tuple[str, ...]]) -> dict[str, list[int]]:
        users: dict[str, list[int]] = {name: [] for name in self.movables}
        for index, names in enumerate(names_by_op):
            for name in dict.fromkeys(names):
                users[name].append(index)
        return users

    @property
    def seconds(self) -> float:
        """Time of a period in which nothing waits."""
        return sum(op.seconds for op in self.ops)


@dataclass(frozen=True)
class Link:
    """The way between the device and where things are when they are away from it.

    Attributes:
        to_device: bytes a second.
        from_device: bytes a second; both ways work at the same time.
        latency: seconds that a copy takes beside its bytes.
    """

    to_device: float
    from_device: float
    latency: float = 1e-5

    def arriving(self, num_bytes: int) -> float:
        """Seconds of a copy to the device."""
        return num_bytes / self.to_device + self.latency

    def leaving(self, num_bytes: int) -> float:
        """Seconds of a copy from the device."""
        return num_bytes / self.from_device + self.latency


@dataclass(frozen=True)
class Stay:
    """A stretch of the period during which a movable is on the device.

    Calls are numbered as in `Workload.ops`; `begin` lies within the period, and what reaches into the next period has
    numbers beyond its end. A stay never spans a whole period or more: such a movable is resident.

    Attributes:
        name: of the movable.
        begin: a copy to the device is begun just before this call; where `made`, this call makes it.
        first: the first call that reads it; where `made`, the call that makes it.
        end: its memory is free again behind this call.
        made: whether it is made on the device instead of being copied there.
        offloaded: only where made: a copy from the device is begun just behind call `begin`, and behind call `end`
            computing waits until that has ended.
    """

    name: str
    begin: int
    first: int
    end: int
    made: bool = False
    offloaded: bool = False


@dataclass(frozen=True)
class Residence:
    """Where everything is, at every moment: what a swap plan decides.

    Attributes:
        resident: movables that never leave the device.
        stays: of all others, by begin.
    """

    resident: frozenset[str]
    stays: Sequence[Stay] = field(default_factory=tuple)
