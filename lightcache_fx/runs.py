"""Which generation, which step and which guidance branch a call of the denoiser belongs to.

A pipeline made by `transform_pipeline` says so (`MarkedRun`): a run begins with the pipeline's call and a step ends
with the scheduler's. Elsewhere the timestep's value tells. Nothing is guessed silently: wherever the evidence fits two
readings, the call runs the full program, which is right under both, and says why in the log.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from lightcache_fx.deciding import Decision
from lightcache_fx.deriving import Derived
from lightcache_fx.stores import Copies, Stores

log = logging.getLogger(__name__)

MAX_BRANCHES = 64
"""Calls of a denoising step whose state is kept."""
_RISES = 3
"""Calls in a row, each at a larger timestep than the one before, after which a warning is due."""
_run_numbers = itertools.count()
_current: ContextVar[MarkedRun | None] = ContextVar("lightcache_fx_run", default=None)
_branch_name: ContextVar[str | None] = ContextVar("lightcache_fx_branch", default=None)


@dataclass
class MarkedRun:
    """One generation as a pipeline marks it.

    Attributes:
        number: unique in the process.
        epoch: how often the scheduler has stepped.
        step: index of the denoising step that calls are in; second evaluations of a second-order scheduler count.
        num_steps: how many there will be, when known.
    """

    number: int = field(default_factory=lambda: next(_run_numbers))
    epoch: int = 0
    step: int = -1
    num_steps: int | None = None
    _epoch_of_step: int = -1
    _holders: list[RunTracker] = field(default_factory=list)

    def free_state_of(self, tracker: RunTracker) -> None:
        """Reset the tracker when the last step is done, or the run ends, so that decoding has the room."""
        if tracker not in self._holders:
            self._holders.append(tracker)

    def close(self) -> None:
        """Free what the run's models hold."""
        for tracker in self._holders:
            tracker.reset()
        self._holders.clear()

    def begin(self, num_steps: int) -> None:
        """The scheduler has made its timesteps: a run of `num_steps` evaluations begins."""
        self.number = next(_run_numbers)
        self.epoch, self.step, self._epoch_of_step = 0, -1, -1
        self.num_steps = num_steps

    def enter_step(self) -> int:
        """The step that a denoiser call made now belongs to."""
        if self.epoch != self._epoch_of_step:
            self._epoch_of_step = self.epoch
            self.step += 1
        return self.step


@contextmanager
def marked_run(num_steps: int | None = None) -> Iterator[MarkedRun]:
    """Mark one generation; call `step_done` after each denoising step."""
    run = MarkedRun(num_steps=num_steps)
    token = _current.set(run)
    try:
        yield run
    finally:
        run.close()
        _current.reset(token)


def current_run() -> MarkedRun | None:
    """The marked run that this thread is in."""
    return _current.get()


def current_branch() -> str | None:
    """The name of the guidance branch that this thread is in."""
    return _branch_name.get()


def step_done() -> None:
    """Tell the current run that the scheduler has stepped; without a run it does nothing."""
    run = _current.get()
    if run is not None:
        run.epoch += 1
        if run.num_steps is not None and run.step + 1 >= run.num_steps:
            run.close()


@contextmanager
def branch_name(name: str) -> Iterator[None]:
    """Name the guidance branch of the calls made inside, as `cache_context("cond")` of diffusers' transformers does."""
    token = _branch_name.set(name)
    try:
        yield
    finally:
        _branch_name.reset(token)


@dataclass(eq=False)
class Branch:
    """The state of one guidance branch of one run.

    Attributes:
        group: what its calls have in common: signature and branch name.
        inputs: the run-rate tensors it was last called with.
        step: how many calls came before the present one.
        steady: whether a later call came with the very same tensors as the one before it.
        repeats: how often a timestep came twice.
        stores: values kept for reuse steps, values computed once a generation, and copies of both on the device.
        ran: the programs of its calls from the last full one on.
        derived: what guidance branches are derived from and by.
        decision: what an adaptive schedule has seen of it.
        hoisted_key: of the inputs that the hoisted values hold for.
    """

    group: Hashable
    inputs: tuple[torch.Tensor, ...]
    step: int = 0
    steady: bool = False
    repeats: int = 0
    stores: Stores = field(default_factory=Stores)
    ran: tuple[str, ...] = ()
    derived: Derived = field(default_factory=Derived)
    decision: Decision = field(default_factory=Decision)
    hoisted_key: tuple[object, ...] | None = None
    hoisted_sources: Sequence[torch.Tensor] = ()  # held, so that an identity in the key stays that tensor's

    @property
    def since_full(self) -> int:
        """How many calls came since the last full one."""
        return max(0, len(self.ran) - 1)


@dataclass(frozen=True)
class Position:
    """Where a call stands.

    Attributes:
        branch: its state.
        step: the step's index in the run.
        certain: false where the evidence fits two readings; such a call must be full.
        begins_run: whether it is the first call of a run.
    """

    branch: Branch
    step: int
    certain: bool
    begins_run: bool


class RunTracker:
    """Follows the calls that one thread makes of one model, and holds what they leave.

    Attributes:
        branches: of the run under way, in the order in which the last timestep called them.
        weight_copies: the device's copies of weights that are kept elsewhere, for the next call of whichever branch.
    """

    def __init__(self) -> None:
        self._rises = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call begins a run."""
        self.branches: list[Branch] = []
        self.weight_copies = Copies()
        self._called: list[Branch] = []
        self._time: float | None = None
        self._num_times = 0
        self._run_number: int | None = None
        self._doubtful = False
        self._settled = False
        self._warned = False

    @property
    def first_of_step(self) -> Branch | None:
        """The branch that the step under way has called first."""
        return self._called[0] if self._called else None

    def locate_marked(self, run: MarkedRun, group: Hashable, inputs: tuple[torch.Tensor, ...]) -> Position:
        """Place a call made inside a marked run; reads nothing from the device."""
        begins = run.number != self._run_number
        if begins:
            self.reset()
            self._run_number = run.number
        step = run.enter_step()
        if self._time is None or -step < self._time:
            if self._time is not None and -step < self._time - 1:
                self.branches = []  # the model sat out steps, as one of two that take turns does
            self._next_time(float(-step))
        members = [b for b in self.branches if b.group == group]
        waiting = [b for b in members if b not in self._called]
        branch = _first(waiting, lambda b: _identical(b.inputs, inputs))
        if branch is None and all(t.device.type == "cpu" for t in inputs):
            branch = _first(waiting, lambda b: _equal(b.inputs, inputs))
        if branch is None and waiting:
            branch = waiting[0]
        if branch is None:
            branch = self._add(group, inputs)
        self._called.append(branch)
        branch.inputs = inputs
        return Position(branch, step, certain=True, begins_run=begins)

    def locate(
        self, time: float, group: Hashable, inputs: tuple[torch.Tensor, ...], equal: Callable[[Branch], bool]
    ) -> Position:
        """Place a call by its timestep.

        Args:
            time: the timestep's value; falling within a run.
            group: signature and branch name.
            inputs: its run-rate tensors, which tell branches and runs apart.
            equal: whether a branch's inputs have the same values.
        """
        begins = self._run_number is not None or self._time is None or time > self._time
        if begins:
            self._count_rises(time)
            self.reset()
        if self._time is None or time < self._time:
            self._next_time(time)
        members = [b for b in self.branches if b.group == group]
        waiting = [b for b in members if b not in self._called]
        branch, known = _first(waiting, lambda b: _identical(b.inputs, inputs)), "identical"
        if branch is None:
            branch, known = _first(waiting, equal), "equal"
        if branch is None:
            repeated = _first(
                [b for b in members if b in self._called], lambda b: _identical(b.inputs, inputs) or equal(b)
            )
            if repeated is not None:
                return self._repeat(repeated, inputs)
            branch, known = (waiting[0] if waiting and self._num_times > 1 else None), "changed"
        if branch is None:
            branch = self._add(group, inputs)
            self._called.append(branch)
            return Position(branch, 0, certain=True, begins_run=begins)
        branch.step += 1
        certain = not self._doubtful and self._continues(branch, known)
        branch.steady |= known == "identical"
        branch.inputs = inputs
        self._called.append(branch)
        return Position(branch, branch.step, certain=certain, begins_run=False)

    def _count_rises(self, time: float) -> None:
        """Warn where run after run seems to have one step, at a larger timestep each: they rise within a run, then."""
        rises = self._run_number is None and self._time is not None and self._num_times == 1 and time > self._time
        self._rises = self._rises + 1 if rises else 0
        if self._rises == _RISES:
            log.warning(
                "timesteps rise from call to call, and a larger one is taken for the first of another run, so that"
                " every step is full: mark runs with transform_pipeline or lightcache_fx.marked_run"
            )

    def _repeat(self, branch: Branch, inputs: tuple[torch.Tensor, ...]) -> Position:
        """The same branch again at the same timestep: a second-order scheduler, or a run that began anew."""
        branch.inputs = inputs
        if self._num_times == 1:
            self._doubt(
                "the first timestep came again with the same conditioning: a run begun anew, or a call made in parts"
            )
            branch.step = 0
            return Position(branch, 0, certain=False, begins_run=False)
        certain = not self._doubtful and (branch.repeats > 0 or self._num_times == 2)
        if not certain:
            log.info("timestep repeated at step %d for the first time; running the full program", branch.step + 1)
        if self._doubtful and not self._settled:
            self._settled = True
            log.warning("cannot tell branches from runs by timesteps here; every step of this run is full. Use"
                        " transform_pipeline, lightcache_fx.marked_run or cache_context to mark them")  # fmt: skip
        branch.repeats += 1
        branch.step += 1
        return Position(branch, branch.step, certain=certain, begins_run=False)

    def _continues(self, branch: Branch, known: str) -> bool:
        """Whether a later timestep surely continues the branch's run, by what its conditioning was before.

        The same tensors do. Equal ones do where they were made anew at every step; where they used to be the same ones,
        another run may have begun in mid-schedule. Changed ones may always be another run's.
        """
        if known == "identical" or (known == "equal" and not branch.steady):
            return True
        if not self._warned:
            self._warned = True
            log.warning(
                "conditioning changed within a run, or another run began in mid-schedule: such steps are full. Mark"
                " runs with"
                " transform_pipeline or marked_run, or declare inputs that change every step, as in"
                " Policy(rates={'x': 'step'})"
            )
        return False

    def _next_time(self, time: float) -> None:
        """A new timestep: branches that sat out the last one are dropped, as what they keep is out of step.

        The others are in the order of their calls, which is expected to be that of the next timestep's.
        """
        if self._time is not None:
            self.branches = [b for b in dict.fromkeys(self._called) if b in self.branches]
        if self._doubtful and not self._settled and self._num_times == 2:
            self._doubtful = False  # each branch came once at the second timestep: the repetition was a run begun anew
        self._time = time
        self._num_times += 1
        self._called = []

    def _doubt(self, why: str) -> None:
        if not self._doubtful:
            log.info("%s; running full programs until that is clear", why)
        self._doubtful = True

    def _add(self, group: Hashable, inputs: tuple[torch.Tensor, ...]) -> Branch:
        if len(self.branches) >= MAX_BRANCHES:
            log.warning("more than %d calls in one denoising step; their state is not kept", MAX_BRANCHES)
            return Branch(group, inputs)
        branch = Branch(group, inputs)
        self.branches.append(branch)
        return branch


def _first(branches: Sequence[Branch], test: Callable[[Branch], bool]) -> Branch | None:
    return next((branch for branch in branches if test(branch)), None)


def _identical(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(_is, a, b))


def _is(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b


def _equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
