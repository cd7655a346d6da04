"""The only place that holds state: programs by signature, and per thread the slots of the run under way."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightcache_fx.arena import is_dense
from lightcache_fx.budgets import for_branches, with_memory
from lightcache_fx.calls import Call, CallLayout, CallReader, method_of
from lightcache_fx.capture import Capture, capture, refuse_autocast
from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.cuts import paths_to_mark
from lightcache_fx.errors import ArgumentError, BudgetError, CaptureError, TransformError
from lightcache_fx.homes import Homes, Tier
from lightcache_fx.module_state import ModuleState, weight_slots
from lightcache_fx.outputs import register_distributions
from lightcache_fx.plan import Plan, make_plan
from lightcache_fx.policy import Policy, Swap
from lightcache_fx.program import BoundProgram, Moment, Program, build_programs
from lightcache_fx.runs import Branch, Position, RunTracker, current_branch, current_run
from lightcache_fx.stores import version_of
from lightcache_fx.swapping import SMALLEST
from lightcache_fx.units import format_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Signature:
    """What is made once for one signature.

    Attributes:
        capture: of the model.
        plan: what was decided before memory was looked at.
        state: kept so that the objects whose identity is in the key stay alive.
        compiled: what was made of it, by how many calls a denoising step has.
    """

    capture: Capture
    plan: Plan
    state: ModuleState
    compiled: dict[int, Compiled] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Compiled:
    """The plan and the programs for a signature and a number of guidance branches."""

    signature: Signature
    plan: Plan
    programs: dict[str, Program]
    bound: dict[str, BoundProgram]

    @property
    def capture(self) -> Capture:
        """Of the model."""
        return self.signature.capture


class Ledger(threading.local):
    """Of models that share a device, which one has copies of weights there: each thread's last one called.

    Attributes:
        is_shared: whether there are several.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self._present: RunTracker | None = None

    def enter(self, tracker: RunTracker) -> None:
        """A model is about to run: the copies of the one before make room for its own."""
        if self._present is not None and self._present is not tracker:
            self._present.weight_copies.drop()
        self._present = tracker


def homes_of(module: nn.Module, policy: Policy) -> Homes:
    """Where a module's weights are kept while they are away: on disk for one that runs on the CPU, unless told so."""
    on_cpu = all(weight.device.type == "cpu" for weight in (*module.parameters(), *module.buffers()))
    swap, device = policy.swap or Swap(), next((w.device for w in module.parameters()), torch.device("cpu"))
    tier: Tier = swap.to or ("disk" if on_cpu else "host")
    return Homes(lambda: weight_slots(module), tier, swap.folder, device=device)


class ThreadState(threading.local):
    """The run under way in each thread."""

    def __init__(self) -> None:
        self.tracker = RunTracker()
        self.ran_last: Compiled | None = None


class Runtime:
    """Runs one module by its programs.

    Args:
        module: the user's module, in evaluation mode when it is called.
        policy: what to do with it.
        method: which of its methods to run by programs.
        homes: where its weights are kept while they are away; shared by all that runs the module.
        ledger: who is on the device; shared by all models that must not be there at the same time.
        may_stay_eager: whether a module that cannot be captured runs as it is, its weights fetched as a whole.
        local: the threads' runs; shared by all graphs of one model.

    Raises:
        ArgumentError: the policy's rates name a parameter that `forward` does not have.
        CutError: the policy cuts at a module path that does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        method: str = "forward",
        *,
        homes: Homes | None = None,
        ledger: Ledger | None = None,
        may_stay_eager: bool = False,
        local: ThreadState | None = None,
    ) -> None:
        register_distributions()
        self.module = module
        self.policy = policy
        self.reader = CallReader(module, rates=policy.rates, method=method)
        self.marked = paths_to_mark(policy.cache.cut, module) if policy.cache is not None else []
        self.compiled: OrderedDict[tuple[CallLayout, Hashable], Compiled] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self.homes = homes or homes_of(module, policy)
        self._ledger = ledger or Ledger()
        self._may_stay_eager = may_stay_eager
        self._uncaptured: str | None = None
        self._state = ModuleState.take(module, self.homes.device_of)
        self._lock = threading.Lock()
        self._local = local or ThreadState()

    @property
    def tracker(self) -> RunTracker:
        """The calling thread's run."""
        return self._local.tracker

    def __call__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """One denoiser call: place it in its run, run the program that the schedule asks for, keep what it returns."""
        with CAPTURE_LOCK.running(), torch.no_grad():
            if self._uncaptured is not None:
                return self._run_eagerly(args, kwargs)
            try:
                call = self.reader.read(args, kwargs)
                refuse_autocast(call)
                compiled = self.compile(call)
            except (CaptureError, ArgumentError) as error:
                if not self._may_stay_eager:
                    raise
                self._uncaptured = str(error)
                log.info("%s runs as it is, its weights fetched as a whole: %s", self.reader.owner, error)
                return self._run_eagerly(args, kwargs)
            self._ledger.enter(self.tracker)
            try:
                position = self._locate(call, compiled)
                return self._run(call, self._for_branches(compiled, position), position)
            except BaseException:
                self.tracker.reset()
                raise

    def _run_eagerly(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run the module as it is, all of its weights on the device for as long as that takes."""
        needed, budget = sum(_num_bytes(weight) for weight in self.module.parameters()), self.policy.memory_budget
        if budget is not None and needed > budget:
            raise BudgetError(
                f"memory_budget: the weights of {self.reader.owner} take {format_bytes(needed)} and are fetched as a"
                f" whole, because it cannot be captured; the budget is {format_bytes(budget)}. Raise it, load the"
                f" module in half precision, or leave it out with components=[...]. Why it cannot be captured:"
                f" {self._uncaptured}",
                needed,
            )
        self._ledger.enter(self.tracker)
        with self.homes.all_present(self.homes.device):
            return method_of(self.module, self.reader.method)(self.module, *args, **kwargs)

    def compile(self, call: Call) -> Compiled:
        """The programs for a call's signature, captured and built when it is new."""
        with CAPTURE_LOCK.running():
            found = self._known(call)
        if found is None:
            with CAPTURE_LOCK.capturing():  # another thread may have made it meanwhile
                found = self._known(call) or self._keep(self._build(call))
        return found

    def _known(self, call: Call) -> Compiled | None:
        with self._lock:
            if not self._state.unchanged():
                self._state = ModuleState.take(self.module, self.homes.device_of)
            key = (call.layout, self._state.key)
            found = self.compiled.get(key)
            if found is not None:
                self.compiled.move_to_end(key)
            return found

    def _keep(self, made: Compiled) -> Compiled:
        with self._lock:
            self.compiled[(made.capture.layout, made.signature.state.key)] = made
            made.signature.compiled[made.plan.branches] = made
            if len(self.compiled) > self.policy.max_signatures:
                (old, _), _ = self.compiled.popitem(last=False)
                types = zip(old.leaves, old.tensor_types, strict=True)
                shapes = ", ".join(f"{leaf.name} {type_.shape}" for leaf, type_ in types)
                limit = self.policy.max_signatures
                log.warning("max_signatures=%d reached: dropped the programs for %s", limit, shapes)
        return made

    def _build(self, call: Call) -> Compiled:
        if self.homes.device.type != "cpu":
            self.homes.recall(self.homes.device)  # to be run as it is, beside the capture
        captured = capture(self.module, call, mark=self.marked)
        signature = Signature(captured, make_plan(captured, self.policy, self.module), self._state)
        plan = with_memory(captured, signature.plan, takes_turns=self._ledger.is_shared)
        for note in plan.notes:
            log.warning("%s", note)
        return self._compiled(signature, plan)

    def _for_branches(self, compiled: Compiled, position: Position) -> Compiled:
        """The programs for as many guidance branches as a step is now known to have; planned anew where it is news.

        A run's first step has at least as many as are seen in it, and by default as the run before; later ones have
        as many as the step before, and more as soon as more are called.
        """
        if not (self.policy.is_about_memory() and compiled.capture.layout.is_repeated):
            return compiled
        seen, planned = len(self._members(compiled)), compiled.plan.branches
        wanted = max(seen, planned) if position.step == 0 else max(seen, 1)
        if self.policy.calls_per_step is not None:
            wanted = max(wanted, self.policy.calls_per_step)
        if wanted == planned:
            return compiled
        with CAPTURE_LOCK.capturing():
            found = compiled.signature.compiled.get(wanted) or self._planned_anew(compiled, wanted)
            return self._keep(found)

    def _planned_anew(self, compiled: Compiled, branches: int) -> Compiled:
        signature, turns = compiled.signature, self._ledger.is_shared
        asked = replace(signature.plan, branches=branches)
        plan = for_branches(compiled.capture, asked, compiled.plan, takes_turns=turns)
        for note in plan.notes:
            if note not in compiled.plan.notes:
                log.warning("%s", note)
        return self._compiled(signature, plan)

    def _members(self, compiled: Compiled) -> list[Branch]:
        """The guidance branches that this signature's programs run for, by their places in the step."""
        return [branch for branch in self.tracker.branches if _signature_of(branch) is compiled.signature]

    def _compiled(self, signature: Signature, plan: Plan) -> Compiled:
        captured = signature.capture
        programs = build_programs(captured, plan)
        names = [leaf.name for leaf in captured.layout.leaves]
        resident = plan.swap.resident if plan.swap is not None else frozenset()
        once = resident if plan.swap is not None and plan.swap.keeps_residents else frozenset[str]()
        bound = {
            name: BoundProgram(
                program,
                self.module,
                captured.constants,
                names,
                once if name == "prologue" else resident,
                self.policy.compile,
            )
            for name, program in programs.items()
        }
        return Compiled(signature, plan, programs, bound)

    def _bring_home(self, planned: frozenset[str]) -> None:
        """Move weights to where they are kept; where models take turns, large ones that no program reads as well."""
        weights = set(planned)
        if self._ledger.is_shared:
            read = {i.name for c in self.compiled.values() for p in c.programs.values() for i in p.inputs}
            large = (n for n, w in self.module.named_parameters() if w.nbytes >= SMALLEST and is_dense(w))
            weights |= {name for name in large if name not in read}
        self.homes.adopt(weights)

    def _locate(self, call: Call, compiled: Compiled) -> Position:
        group = (compiled.signature, current_branch())
        inputs = call.of_rate("run")
        run = current_run()
        if run is not None:
            position = self.tracker.locate_marked(run, group, inputs)
            run.free_state_of(self.tracker)
        else:
            times = call.of_rate("step")
            if not times:  # nothing tells steps apart, so every call is a run of its own
                self.tracker.reset()
            reader = _HostReader(times, inputs)
            position = self.tracker.locate(reader.time(self.tracker.branches), group, inputs, reader.equal)
        if position.begins_run:
            compiled.plan.schedule.check(run.num_steps if run is not None else None)
        return position

    def _run(self, call: Call, compiled: Compiled, position: Position) -> object:
        branch, swap = position.branch, compiled.plan.swap
        num_steps = run.num_steps if (run := current_run()) is not None else None
        self._settle_weights(compiled, position)
        branch.stores.weight_copies = self.tracker.weight_copies
        branch.stores.buffer = self.homes.buffer
        members = self._members(compiled)
        place = min(members.index(branch), compiled.plan.branches - 1) if branch in members else 0
        index = self._call_of_period(compiled, position, num_steps, place)
        is_full = index < compiled.plan.branches
        if is_full:
            branch.stores.forget_slots()  # a full step needs none of the old values, so they make room for its own
        if swap is not None:
            for member, places in zip(members, swap.slot_places[index], strict=False):
                for slot, there in places.items():
                    member.stores.arrange(slot, there)
        if "prologue" in compiled.bound:
            self._update_hoisted(call, compiled, branch)
        branch.since_full = 0 if is_full else branch.since_full + 1
        moment = Moment([member.stores for member in members])
        if num_steps is not None:
            count, steps_left = compiled.plan.branches, max(0, num_steps - 1 - position.step)
            moment = replace(moment, calls_left=(steps_left + 1) * count - 1 - place, is_last_step=not steps_left)
        kind = "full" if is_full else "reuse"
        bound = compiled.bound[kind if swap is None else swap.variants[index]]
        tensors = bound(call.tensors, branch.stores, moment)
        self.counts[kind] += 1
        return compiled.capture.rebuild_output(tensors)

    def _settle_weights(self, compiled: Compiled, position: Position) -> None:
        """Weights are where the programs expect them: at home, or all of them on the device."""
        before, self._local.ran_last = self._local.ran_last, compiled
        swap, other = compiled.plan.swap, before is not compiled
        if swap is not None and (position.begins_run or other):
            self._bring_home(swap.weights)
        elif swap is None and before is not None and other and before.plan.swap is not None:
            self.homes.recall(self.homes.device)

    def _call_of_period(self, compiled: Compiled, position: Position, num_steps: int | None, place: int) -> int:
        """The call of the plan's period that this one is like: full wherever there is doubt, or nothing to reuse.

        In the period's first step all calls are full, and in the others none.
        """
        plan, branch = compiled.plan, position.branch
        if plan.cut is None or plan.schedule.is_full(position.step, num_steps) or not position.certain:
            return place
        step, name = 1, "reuse"
        if plan.swap is not None and len(plan.swap.names) > plan.branches:
            ahead = plan.schedule.steps_to_full(position.step, num_steps)
            step = plan.swap.step_for(branch.since_full + 1, ahead)
            name = plan.swap.variants[step * plan.branches + place]
        has_all = all(slot in branch.stores for slot in compiled.bound[name].slots_read)
        return step * plan.branches + place if has_all else place

    def _update_hoisted(self, call: Call, compiled: Compiled, branch: Branch) -> None:
        """Run the prologue unless it has run in this run for these very tensors."""
        prologue = compiled.bound["prologue"]
        inputs = [call.tensors[i] for i in prologue.user_inputs]
        sources = [*inputs, *prologue.weights()]
        key = tuple(map(version_of, sources))
        if None not in key and key == branch.hoisted_key:
            return
        if _holds_for(branch, inputs, key):
            branch.hoisted_key, branch.hoisted_sources = key, sources
            return
        branch.stores.hoisted = {}
        prologue(call.tensors, branch.stores)
        branch.hoisted_key = key
        branch.hoisted_sources = sources
        self.counts["prologue"] += 1

    def recall(self) -> None:
        """Bring every weight that is kept elsewhere back to the device, and forget the copies there."""
        self.tracker.reset()
        self.homes.recall(self.homes.device)

    def kept_bytes(self) -> int:
        """Bytes of the slots that the calling thread holds now."""
        return sum(_num_bytes(slot) for branch in self.tracker.branches for slot in branch.stores.slots.values())

    def hoisted_bytes(self) -> int:
        """Bytes of the hoisted values that the calling thread holds now."""
        return sum(_num_bytes(value) for branch in self.tracker.branches for value in branch.stores.hoisted.values())

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


def _signature_of(branch: Branch) -> object:
    return branch.group[0] if isinstance(branch.group, tuple) else None


def _holds_for(branch: Branch, inputs: Sequence[torch.Tensor], key: tuple[object, ...]) -> bool:
    """Whether hoisted values hold for other tensors with equal content.

    Asked on a CPU only, where it costs no host read. The tensors that they were computed from must not have been
    written to since, and the weights must be the same.
    """
    old, old_key, count = branch.hoisted_sources, branch.hoisted_key, len(inputs)
    if old_key is None or None in key or len(old) != len(key) or any(t.device.type != "cpu" for t in inputs):
        return False
    if tuple(map(version_of, old)) != old_key or key[count:] != old_key[count:]:
        return False
    return all(map(torch.equal, inputs, old))


class _HostReader:
    """Reads from the device, at most once a call, what placing an unmarked call takes.

    That is the timestep and, where no branch has the same conditioning tensors, which branch has equal ones.
    """

    def __init__(self, times: Sequence[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> None:
        self._times = times
        self._inputs = inputs
        self._equal: dict[int, bool] = {}

    def time(self, branches: Sequence[Branch]) -> float:
        """The mean of the first step-rate input, which may hold one timestep a sample or token."""
        if not self._times:
            return 0.0
        known = any(
            len(b.inputs) == len(self._inputs) and all(map(_same_object, b.inputs, self._inputs)) for b in branches
        )
        facts = [self._times[0].double().mean().reshape(1)]
        if not known:
            for branch in branches:
                facts.append(_all_equal(branch.inputs, self._inputs).to(facts[0].device).reshape(1).double())
        time, *flags = torch.cat(facts).tolist()
        self._equal = {id(branch): bool(flag) for branch, flag in zip(branches, flags, strict=False)}
        return float(time)

    def equal(self, branch: Branch) -> bool:
        """Whether a branch's inputs had the same values, as read by `time`."""
        return self._equal.get(id(branch), False)


def _all_equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(a) != len(b) or any(
        x.shape != y.shape or x.dtype != y.dtype or x.device != y.device for x, y in zip(a, b, strict=True)
    ):
        return torch.tensor(False)
    return torch.stack([(x == y).all() for x, y in zip(a, b, strict=True)]).all() if a else torch.tensor(True)


def _same_object(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
