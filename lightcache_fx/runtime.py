"""The only place that holds state: programs by signature, and per thread the slots of the run under way."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from lightcache_fx.arena import is_dense
from lightcache_fx.calls import Call, method_of
from lightcache_fx.capture import refuse_autocast
from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.compiled import Compiled, Signature
from lightcache_fx.errors import ArgumentError, BudgetError, CaptureError
from lightcache_fx.extrapolation import coefficients, coefficients_name
from lightcache_fx.guarding import Watch
from lightcache_fx.host_reads import HostReader
from lightcache_fx.last_calls import make_last
from lightcache_fx.observed import Observed, ProgramRun
from lightcache_fx.plan import Plan
from lightcache_fx.program import Moment
from lightcache_fx.ranges import profiled
from lightcache_fx.repertoire import Repertoire
from lightcache_fx.runs import Branch, Position, RunTracker, current_branch, current_run
from lightcache_fx.schedule import Schedule, Schedules, program_name
from lightcache_fx.stores import Stores, version_of
from lightcache_fx.swapping import SMALLEST
from lightcache_fx.units import format_bytes

log = logging.getLogger(__name__)

LONGEST_TIMELINE = 4096
"""Programs of a run that are remembered, the last ones."""


class ThreadState(threading.local):
    """The run under way in each thread."""

    def __init__(self) -> None:
        self.tracker = RunTracker()
        self.ran_last: Compiled | None = None
        self.timeline: deque[ProgramRun] = deque(maxlen=LONGEST_TIMELINE)
        self.is_guarded = False


class Runtime:
    """Runs one module by its programs.

    Args:
        repertoire: the programs, found or made by call.
        may_stay_eager: whether a module that cannot be captured runs as it is, its weights fetched as a whole.
        local: the threads' runs; shared by all graphs of one model.

    Attributes:
        observe: called after each full step.
        schedule: which steps are full, instead of by the policy.
    """

    def __init__(
        self, repertoire: Repertoire, *, may_stay_eager: bool = False, local: ThreadState | None = None
    ) -> None:
        policy = repertoire.policy
        self.repertoire = repertoire
        self.module, self.policy, self.reader = repertoire.module, policy, repertoire.reader
        self.homes, self._ledger = repertoire.homes, repertoire.ledger
        self.counts: Counter[str] = Counter()
        self._may_stay_eager = may_stay_eager
        self._uncaptured: str | None = None
        self._local = local or ThreadState()
        self.observe: Callable[[Observed], None] | None = None
        self.schedule: Schedules | None = None
        self._rule = policy.adaptive
        self._guidance = policy.guidance
        self._told: set[str] = set()
        self._computes_all = Schedule.of_guidance(policy.guidance) if policy.guidance is not None else None
        self.watch = Watch(policy.guard, self.reader.owner) if policy.guard is not None else None

    @property
    def tracker(self) -> RunTracker:
        """The calling thread's run."""
        return self._local.tracker

    def __call__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """One denoiser call: place it in its run, run the program that the schedule asks for, keep what it returns."""
        with CAPTURE_LOCK.running(), torch.no_grad():
            self._place((args, kwargs))
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
            run = current_run()
            self._ledger.enter(self.tracker, run.num_steps if run is not None else None)
            try:
                position = self._locate(call, compiled)
                with profiled(lambda: f"step {position.step}, branch {self._place_of(position, compiled)}"):
                    return self._run_or_derive(call, compiled, position)
            except BaseException:
                self.tracker.reset()
                self._ledger.let_go()
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
        self._ledger.handed.drop()
        with self.homes.all_present(self.homes.device), profiled(lambda: f"{self.reader.owner} as it is"):
            return method_of(self.module, self.reader.method)(self.module, *args, **kwargs)

    def compile(self, call: Call) -> Compiled:
        """The programs for a call's signature, captured and built when it is new."""
        self._place(call.tensors)  # `decode_frames` compiles what it does not call
        return self.repertoire.programs_for(call)

    def _place(self, arguments: object) -> None:
        if self.repertoire.place(arguments):
            self.tracker.reset()

    def _for_branches(self, compiled: Compiled, position: Position) -> Compiled:
        """The programs for as many guidance branches as a step is now known to have; planned anew where it is news.

        A run's first step has at least as many as are seen in it, and by default as the run before; later ones have
        as many as the step before, and more as soon as more are called.
        """
        if not (self.policy.is_about_memory() and compiled.capture.layout.is_repeated):
            return compiled
        plan, others = compiled.plan, self._others(compiled)
        seen, beside = len(self._members(compiled)), sum(signature.kept_bytes for signature in others)
        wanted = max(seen, plan.branches) if position.step == 0 else max(seen, 1)
        if position.step == 0:
            beside = max(beside, plan.beside)
        if self.policy.calls_per_step is not None:
            wanted = max(wanted, self.policy.calls_per_step - len(others))
        if (wanted, beside) == (plan.branches, plan.beside):
            return compiled
        return self.repertoire.for_branches(compiled, wanted, beside)

    def _members(self, compiled: Compiled) -> list[Branch]:
        """The guidance branches that this signature's programs run for, by their places in the step."""
        return [branch for branch in self.tracker.branches if _signature_of(branch) is compiled.signature]

    def _others(self, compiled: Compiled) -> list[Signature]:
        """Of each branch that another signature's programs run for, that signature."""
        found = map(_signature_of, self.tracker.branches)
        return [other for other in found if isinstance(other, Signature) and other is not compiled.signature]

    def _place_of(self, position: Position, compiled: Compiled) -> int:
        """A call's guidance branch, by its place in the step."""
        members = self._members(compiled)
        return members.index(position.branch) if position.branch in members else len(members)

    def _bring_home(self, planned: frozenset[str]) -> None:
        """Move weights to where they are kept; where models take turns, large ones that no program reads as well."""
        weights = set(planned)
        if self._ledger.is_shared:
            read = {i.name for c in self.repertoire.compiled.values() for p in c.programs.values() for i in p.inputs}
            large = (n for n, w in self.module.named_parameters() if w.nbytes >= SMALLEST and is_dense(w))
            weights |= {name for name in large if name not in read}
        if self.homes.adopt(weights):
            self.repertoire.note_places()

    def _kept_at_home(self, compiled: Compiled) -> frozenset[str]:
        """What the programs of a call want at home before they run."""
        swap = compiled.plan.swap
        planned = swap.weights if swap is not None else frozenset[str]()
        if self.repertoire.is_away:  # copied from page-locked memory, beside computing
            kept = frozenset[str]().union(*(program.resident for program in compiled.bound.values()))
            planned |= {n for n, w in zip(kept, self.homes.weights(kept), strict=True) if is_dense(w)}
        return planned

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
                self._warn_of_no_steps()
            reader = HostReader(times, inputs)
            position = self.tracker.locate(reader.time(self.tracker.branches), group, inputs, reader.equal)
        if position.begins_run:
            self._local.timeline.clear()
            self._local.is_guarded = self.watch is not None and self.watch.begin_run()
            for schedule in (self.schedule or compiled.plan.schedule, self._computes_all):
                if schedule is not None:
                    schedule.check(run.num_steps if run is not None else None)
        return position

    def _run_or_derive(self, call: Call, compiled: Compiled, position: Position) -> object:
        """Another guidance branch than the first is derived from that, where the policy says so."""
        first, branch = self.tracker.first_of_step, position.branch
        derived = None
        if self._computes_all is not None and first is not None and branch is not first:
            derived = self._derive(call, compiled, position, first)
        if derived is not None:
            return compiled.capture.rebuild_output(derived)
        tensors = self._run(call, self._for_branches(compiled, position), position)
        if self._computes_all is not None and first is not None:
            if branch is first:
                branch.derived.keep_outputs(tensors)
                self._warn_of_one_branch(position)
            else:
                branch.derived.keep_differences(tensors, first.derived)
        return compiled.capture.rebuild_output(tensors)

    def _warn_of_no_steps(self) -> None:
        if self.policy.caches and "no steps" not in self._told:
            self._told.add("no steps")
            log.warning(
                "%s takes no timestep, so that outside of a marked run every call is one of its own, and full: use"
                " transform_pipeline or lightcache_fx.marked_run, or name the argument that changes at every step, as"
                " in Policy(rates={'x': 'step'}); behind torch.compile, pass the timestep as a tensor, and not as a"
                " Python number",
                self.reader.owner,
            )

    def _warn_of_one_branch(self, position: Position) -> None:
        if position.step and len(self.tracker.branches) == 1 and "one branch" not in self._told:
            self._told.add("one branch")
            log.warning(
                "guidance: %s is called once a step, so there is no other branch to derive; leave guidance out, or use"
                " a pipeline that calls it once for each branch",
                self.reader.owner,
            )

    def _derive(self, call: Call, compiled: Compiled, position: Position, first: Branch) -> list[torch.Tensor] | None:
        """What a guidance branch is taken to return; None where it is to be computed."""
        branch, num_steps = position.branch, run.num_steps if (run := current_run()) is not None else None
        assert self._guidance is not None
        assert self._computes_all is not None
        stopped = self.watch is not None and self.watch.stopped is not None
        if stopped or not position.certain or self._computes_all.is_full(position.step, num_steps):
            return None
        begin = time.perf_counter()
        found = branch.derived.from_first(first.derived, self._guidance)
        if found is None:
            return None
        schedule = self.schedule or compiled.plan.schedule
        branch.derived.missed |= self._rule is not None or bool(schedule.fresh(position.step, num_steps))
        place, seconds = self._place_of(position, compiled), time.perf_counter() - begin
        self._local.timeline.append(ProgramRun(position.step, place, "derived", begin, seconds, self.kept_bytes()))
        self.counts["derived"] += 1
        return self._guarded(call, compiled, position, found) if self._local.is_guarded else found

    def _run(self, call: Call, compiled: Compiled, position: Position) -> list[torch.Tensor]:
        branch, swap = position.branch, compiled.plan.swap
        num_steps = run.num_steps if (run := current_run()) is not None else None
        self._settle_weights(compiled, position)
        self._ledger.take_over(self.tracker)
        branch.stores.weight_copies = self.tracker.weight_copies
        branch.stores.buffer = self.homes.buffer
        members = self._members(compiled)
        place = min(members.index(branch), compiled.plan.branches - 1) if branch in members else 0
        if compiled.plan.probe is not None:
            self._probe(call, compiled, position)
        kind, index = self._choose(compiled, position, num_steps, place)
        is_full = kind == "full"
        self._make_room(compiled, kind, position)
        if swap is not None:
            for member, places in zip(members, swap.slot_places[index], strict=False):
                for slot, there in places.items():
                    member.stores.arrange(slot, there)
        if "prologue" in compiled.bound and compiled.plan.probe is None:
            self._update_hoisted(call, compiled, position)
        if is_full:
            branch.decision.begin_full()
        if compiled.plan.probe is not None:
            branch.stores.keep_indicator(always=self._rule is not None and self._rule.since == "step", full=is_full)
        branch.ran = (kind,) if is_full else (*branch.ran, kind)
        moment = Moment([member.stores for member in members])
        if num_steps is not None:
            count, steps_left = compiled.plan.branches, max(0, num_steps - 1 - position.step)
            moment = replace(moment, calls_left=(steps_left + 1) * count - 1 - place, is_last_step=not steps_left)
        if compiled.plan.highest_order:
            moment = replace(moment, coefficients=_coefficients(compiled.plan, kind, position))
        name, moment = self._handing_over(compiled, index, kind, moment)
        tensors = self._timed(compiled, name, call, position, moment)
        if self._local.is_guarded and not is_full:
            tensors = self._guarded(call, compiled, position, tensors)
        branch.stores.handed.clear()
        self.counts[kind] += 1
        if self.observe is not None and is_full and compiled.plan.cut is not None:
            branch_place = self._place_of(position, compiled)
            self.observe(Observed(compiled, branch.stores, branch_place, position.step, call.tensors, tensors))
        return tensors

    def _make_room(self, compiled: Compiled, kind: str, position: Position) -> None:
        """What a program is to make leaves the stores, or becomes history."""
        plan, in_place = compiled.plan, compiled.bound["full"].slot_buffers is not None
        away = plan.swap is not None and plan.swap.history_away
        made: dict[int, list[str]] = {}
        for slot in plan.made_by(kind):
            made.setdefault(slot.cache, []).append(slot.name)
        for cache, slots in made.items():
            position.branch.stores.make_room(
                slots, plan.order_of(cache), position.step, self.homes.device, cache=cache, copy=in_place, away=away
            )

    def _guarded(
        self, call: Call, compiled: Compiled, position: Position, reused: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What a reuse step returned, or what a full one returns where that is too far off."""
        stores, watch = position.branch.stores, self.watch
        assert watch is not None
        aside = Stores(hoisted=stores.hoisted, handed=stores.handed, buffer=stores.buffer)
        full = compiled.bound["full"](call.tensors, aside)
        return reused if watch.is_near(reused, full, position.step) else full

    def _probe(self, call: Call, compiled: Compiled, position: Position) -> None:
        """Compute what a step decides by, and what comes before it."""
        if "prologue" in compiled.bound:
            self._update_hoisted(call, compiled, position)
        self._timed(compiled, "probe", call, position)
        self.counts["probe"] += 1

    def _handing_over(self, compiled: Compiled, index: int, kind: str, moment: Moment) -> tuple[str, Moment]:
        """The program of a call and its moment; before another model's call it is one that fetches for that."""
        swap, run = compiled.plan.swap, current_run()
        if swap is None:
            return kind, moment
        left = moment.calls_left if compiled.capture.layout.is_repeated else None
        expected = self._ledger.expected(run.num_steps if run is not None else None, left)
        if expected is None or (self.policy.swap is not None and not self.policy.swap.prefetch):
            return swap.variants[index], moment
        last = compiled.last.get(index)
        if last is None or last.before != tuple(expected.first):
            with CAPTURE_LOCK.capturing():
                last = make_last(compiled, index, expected, self.module, self.policy, self.homes.device)
        if last.plan is None:
            return swap.variants[index], moment
        handed = self._ledger.hand_to(expected.tracker)
        return last.name, replace(moment, following=expected.first[0], handed=handed)

    def _settle_weights(self, compiled: Compiled, position: Position) -> None:
        """Weights are where the programs expect them: at home, or all of them on the device."""
        before, self._local.ran_last = self._local.ran_last, compiled
        swap, other = compiled.plan.swap, before is not compiled
        if (swap is not None or self.repertoire.is_away) and (position.begins_run or other):
            self._bring_home(self._kept_at_home(compiled))
        elif swap is None and before is not None and other and before.plan.swap is not None:
            self.repertoire.recall()

    def _choose(self, compiled: Compiled, position: Position, num_steps: int | None, place: int) -> tuple[str, int]:
        """The program of a call: full wherever there is doubt, or nothing to reuse.

        Returns:
            its name, and the call of the plan's period that this one is like. In the period's first step all calls are
            full, and in the others none.
        """
        plan, branch = compiled.plan, position.branch
        schedule, full = self.schedule or plan.schedule, ("full", place)
        if plan.cut is None or not position.certain or (self.watch is not None and self.watch.stopped is not None):
            return full
        name = program_name(schedule.fresh(position.step, num_steps), len(schedule.each))
        missed, branch.derived.missed = branch.derived.missed, False
        if name not in plan.programs or name == "full" or missed:
            return full
        if plan.probe is not None and self._rule is not None:
            change, label = branch.stores.change, plan.probe.label
            assert change is not None  # the probe has run
            if branch.decision.is_full(self._rule, change, position.step, branch.since_full, label):
                return full
        step, variant = 1, name
        if plan.swap is not None and len(plan.swap.names) > plan.branches:
            ahead = schedule.steps_to_full(position.step, num_steps)
            step = plan.swap.step_for(name, branch.ran, ahead)
            variant = plan.swap.variants[step * plan.branches + place]
        has_all = all(slot in branch.stores for slot in compiled.bound[variant].slots_read)
        return (name, step * plan.branches + place) if has_all else full

    def _timed(
        self, compiled: Compiled, name: str, call: Call, position: Position, moment: Moment | None = None
    ) -> list[torch.Tensor]:
        """Run a program, as profilers and the run's timeline show it; nothing waits for the device."""
        bound, place, begin = compiled.bound[name], self._place_of(position, compiled), time.perf_counter()
        self._ledger.note(bound)
        with profiled(lambda: f"{self.reader.owner}.{name}"):
            tensors = bound(call.tensors, position.branch.stores, moment or Moment())
        bound.runs += 1
        seconds = time.perf_counter() - begin
        self._local.timeline.append(ProgramRun(position.step, place, name, begin, seconds, self.kept_bytes()))
        return tensors

    def _update_hoisted(self, call: Call, compiled: Compiled, position: Position) -> None:
        """Run the prologue unless it has run in this run for these very tensors."""
        prologue, branch = compiled.bound["prologue"], position.branch
        inputs = [call.tensors[i] for i in prologue.user_inputs]
        sources = [*inputs, *prologue.weights()]
        key = tuple(map(version_of, sources))
        if None not in key and key == branch.hoisted_key:
            return
        if _holds_for(branch, inputs, key):
            branch.hoisted_key, branch.hoisted_sources = key, sources
            return
        branch.stores.hoisted = {}
        self._timed(compiled, "prologue", call, position)
        branch.hoisted_key = key
        branch.hoisted_sources = sources
        self.counts["prologue"] += 1

    def recall(self) -> None:
        """Bring every weight that is kept elsewhere back to where it was, and forget the copies on the device."""
        self.tracker.reset()
        self.homes.restore()

    def kept_bytes(self) -> int:
        """Bytes of the slots that the calling thread holds now."""
        return sum(branch.stores.slot_bytes() for branch in self.tracker.branches)

    def hoisted_bytes(self) -> int:
        """Bytes of the hoisted values that the calling thread holds now."""
        return sum(_num_bytes(value) for branch in self.tracker.branches for value in branch.stores.hoisted.values())

    def timeline(self) -> tuple[ProgramRun, ...]:
        """The programs of the calling thread's last run, in order; of a very long one, the last."""
        return tuple(self._local.timeline)

    def uncaptured(self) -> str | None:
        """Why the module runs as it is, where it does."""
        return self._uncaptured


def _coefficients(plan: Plan, kind: str, position: Position) -> dict[str, tuple[float, ...]]:
    """What the slots that a program extrapolates are weighed by."""
    steps = position.branch.stores.full_steps
    read = {slot.cache: plan.order_of(slot.cache) for slot in plan.read_by(kind)}
    return {
        coefficients_name(cache): coefficients(steps[cache], position.step, order)
        for cache, order in read.items()
        if order
    }


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


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
