"""`calibrate`: which steps of a model may be reused, found by trying it.

Three kinds of runs, for each candidate cut:

1. A run of full steps. At each step the reuse program runs too, with what each of the steps before it kept, and how far
   its outputs are from the full step's is noted: what a reuse does to the model's output at that step. For values that
   are extrapolated this is taken times how much nearer a line through two kept values comes to the step's own.
2. Runs in which one single step is reused: how far the results are from those of full steps, over the first figure,
   is the gain of the sampler from that step to the end.
3. Dynamic programming over the products of both, for each order and number of full steps; and the schedules that it
   finds are run and measured, so that what is promised has been seen. They race: one that another one beats, which is
   as fast, is not tried on more inputs.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightcache_fx.caching import Cache, Cut, Residual
from lightcache_fx.calibration import Calibration, Point, weights_of
from lightcache_fx.cuts import block_lists
from lightcache_fx.errors import CalibrationError, CutError
from lightcache_fx.extrapolation import MAX_ORDER
from lightcache_fx.module import runtime_of
from lightcache_fx.observed import Observed
from lightcache_fx.pipeline import TransformedPipeline, denoisers_of, transform_pipeline
from lightcache_fx.policy import Policy
from lightcache_fx.racing import interquartile_mean, race
from lightcache_fx.runtime import Runtime
from lightcache_fx.schedule import Schedule, Schedules
from lightcache_fx.scheduling import best_schedules
from lightcache_fx.stores import Stores

if TYPE_CHECKING:
    from lightcache_fx.quality import Quality

log = logging.getLogger(__name__)

Frames = NDArray[np.float32]
Input = str | Mapping[str, Any] | Callable[[Any], Any]
_Kept = Mapping[str, torch.Tensor]

MAX_REUSE = 7
POINTS = 8
PROBES = 8
_TINY = 1e-12
_SAME = 120.0
"""Decibels that stand for no difference: no two videos of 8 bits and less than 15 million values are so near."""


def calibrate(
    pipe: Any,
    inputs: Sequence[Input],
    *,
    cuts: Sequence[Cut] | None = None,
    orders: Sequence[int] = (0, 1),
    max_reuse: int = MAX_REUSE,
    points: int = POINTS,
    probes: int = PROBES,
    policy: Policy | None = None,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Find the steps to compute in full, for each speed, by running a pipeline.

        calibration = lc.calibrate(pipe, ["a red car", "a blue fish"])
        calibration.save("wan.calibration.yaml")
        fast = lc.transform_pipeline(pipe, calibration.policy(quality="psnr>=30"))
        fast = lc.transform_pipeline(pipe, lc.Policy(speedup=2.0, calibration="wan.calibration.yaml"))

    It holds for the model, and for the number of steps of these inputs. All of it is done by generating: once for each
    cut and input, with the reuse program at each step; `probes` times for each cut; and about twice `points` times for
    each cut, order and input, for orders above 0 three times, but only for the first three inputs: after these, most
    schedules are known to be worse than others of their speed. Speeds are by FLOPs: what caching can gain at most.

    Args:
        pipe: a diffusers pipeline that is not transformed.
        inputs: what to generate: a prompt, a mapping of arguments of the call, or a function that is given the pipeline
            and returns frames or images in 0..1. Prompts and mappings without a generator get one, seeded by their
            place. With few, what suits these is taken for what suits the model: better sixteen than three.
        cuts: what to try to keep, as `Cache.cut`; None tries branch 0 and 1 of a U-Net, and the residuals of all of the
            model's blocks and of all but the first and the last.
        orders: of the expansions to try.
        max_reuse: the most reuse steps in a row.
        points: speeds that are tried of each cut and order, beside those of uniform intervals.
        probes: steps whose gain is measured; that of others is interpolated.
        policy: anything else that generations are to run with, but for swapping and memory budgets, which change no
            result; its cache is replaced.
        progress: told what is done, in one line each time.

    Raises:
        CalibrationError: no inputs, a policy about memory, runs of different lengths, more than one denoiser, results
            that are no frames, or cuts that save nothing.
        CutError: a cut that was asked for does not exist.
    """
    policy = policy or Policy()
    _check(pipe, inputs, policy, orders=orders, max_reuse=max_reuse, points=points, probes=probes)
    names = denoisers_of(pipe)
    if len(names) != 1:
        raise CalibrationError(
            f"pipe: expected one denoiser, found {', '.join(names) or 'none'}; calibrate pipelines of one"
        )
    module: nn.Module = getattr(pipe, names[0])
    say = progress or (lambda text: log.info("%s", text))
    found: list[Point] = []
    num_steps = 0
    for cut in _candidates(module) if cuts is None else cuts:
        try:
            trial = _Trial(pipe, names[0], cut, orders, max_reuse, policy, inputs)
        except CutError as error:
            if cuts is not None:
                raise
            log.info("not tried: %s", error)
            continue
        num_steps = trial.num_steps
        found += trial.points(points, probes, say)
    if not found:
        raise CalibrationError(
            "cuts: none of those that were tried saves anything; name some, as Cache(cut=...) takes them"
        )
    return Calibration(
        model=type(module).__name__,
        weights=weights_of(module),
        num_steps=num_steps,
        num_inputs=len(inputs),
        points=found,
    )


def _check(
    pipe: Any,
    inputs: Sequence[Input],
    policy: Policy,
    *,
    orders: Sequence[int],
    max_reuse: int,
    points: int,
    probes: int,
) -> None:
    """Raise a `CalibrationError` where `calibrate` was asked for what it cannot do."""
    if isinstance(inputs, str | Mapping) or callable(inputs) or not inputs:
        given = type(inputs).__name__ if inputs else "nothing"
        raise CalibrationError(
            f"inputs: expected a list of prompts, of mappings of the pipeline's arguments, or of functions, got {given}"
        )
    if policy.is_about_memory():
        raise CalibrationError(
            "policy: swapping and memory budgets change no result, and calibrating runs more than their plans know of;"
            " leave swap and memory_budget out here, and give them to the policy that the calibration makes"
        )
    if isinstance(pipe, TransformedPipeline):
        raise CalibrationError("pipe: it is transformed already; give the original, restore(pipe)")
    if max_reuse < 1 or points < 1 or probes < 1:
        raise CalibrationError(f"max_reuse={max_reuse}, points={points} and probes={probes} must be at least 1")
    if not orders or not set(orders) <= set(range(MAX_ORDER + 1)):
        raise CalibrationError(f"orders: expected some of 0 to {MAX_ORDER}, got {list(orders)}")


def _candidates(module: nn.Module) -> list[Cut]:
    """Of a U-Net its outer branches, of a transformer its blocks as a residual."""
    stacks = [stack for stack in block_lists(module) if len(stack) > 2]
    residuals: list[Cut] = [
        Residual(first=first[skip], last=last[len(last) - 1 - skip])
        for first, last in dict.fromkeys((tuple(stacks[0]), tuple(stack)) for stack in stacks)
        for skip in (0, 1)
    ] if stacks else []  # fmt: skip
    return [0, 1, *residuals]


class _Trial:
    """One cut: its run of full steps, done.

    Attributes:
        num_steps: of each run.
        plain: what full steps make, by input.
        plan: of the model.
    """

    def __init__(
        self,
        pipe: Any,
        component: str,
        cut: Cut,
        orders: Sequence[int],
        max_reuse: int,
        policy: Policy,
        inputs: Sequence[Input],
    ) -> None:
        self._orders = orders
        self._pipe, self._component, self._cut = pipe, component, cut
        self._max_reuse, self._policy, self._inputs = max_reuse, policy, inputs
        self._errors = _Errors()
        self._by_order: dict[int, Any] = {}
        fast, runtime = self._transformed(0)
        self.plain, lengths = [], []
        with _observed(runtime, _Recorder(max_reuse, self._errors, extrapolated=max(orders) > 0)):
            for place in range(len(inputs)):
                self.plain.append(self._generate(fast, place))
                lengths.append(1 + max(run.step for run in runtime.timeline()))
        self.plan = runtime.repertoire.latest().plan
        if len(set(lengths)) > 1:
            raise CalibrationError(f"inputs: their runs have {sorted(set(lengths))} steps; give inputs of one number")
        self.num_steps = lengths[0]

    def _transformed(self, order: int) -> tuple[Any, Runtime]:
        """The pipeline with all steps full until told otherwise, and what runs its denoiser."""
        if order not in self._by_order:
            cache = Cache(cut=self._cut, interval=1, order=order)
            self._by_order[order] = transform_pipeline(self._pipe, self._policy.with_cache(cache))
        fast = self._by_order[order]
        return fast, runtime_of(getattr(fast, self._component))

    def _generate(self, pipe: Any, place: int) -> Frames:
        return _frames(_result(pipe, self._inputs[place], place))

    def points(self, count: int, probes: int, say: Callable[[str], None]) -> list[Point]:
        """Schedules for each order, tried."""
        if self.plan.reuse_flops() >= self.plan.full_flops:
            return []
        gains = self._gains(probes)
        say(f"{_label(self._cut)}: gains measured")
        ways = [(order, steps) for order in self._orders for steps in self._schedules(gains, order, count)]
        speeds = [self.plan.speedup_of(len(steps), self.num_steps) for _, steps in ways]
        ssims: dict[int, list[float]] = defaultdict(list)

        def score(way: int, place: int) -> float:
            quality = self._tried(*ways[way], place)
            ssims[way].append(quality.figure("ssim"))
            return min(quality.figure("psnr"), _SAME)

        left = race(speeds, score, len(self.plain))
        say(f"{_label(self._cut)}: {len(ways)} schedules tried, {len(left)} of them with all inputs")
        return [self._point(*ways[way], found, ssims[way]) for way, found in left.items()]

    def _gains(self, probes: int) -> list[float]:
        """How far the first input's result moves for a unit of error at each step's output."""
        fast, runtime = self._transformed(0)
        last = self.num_steps - 1
        steps = np.unique(np.linspace(1, last, probes).round().astype(int)).tolist() if last else []
        logs = []
        for step in steps:
            with _scheduled(runtime, [other for other in range(self.num_steps) if other != step]):
                moved = _rms(self._generate(fast, 0) - self.plain[0])
            logs.append(math.log(max(moved, _TINY) / max(self._errors.of(None, step - 1, step), _TINY)))
        gains = np.exp(np.interp(range(self.num_steps), steps, logs)) if steps else np.ones(self.num_steps)
        return [float(gain) for gain in gains]

    def _schedules(self, gains: Sequence[float], order: int, count: int) -> list[tuple[int, ...]]:
        """The cheapest full steps for evenly spread speeds, and those of uniform intervals."""
        chosen = self._cheapest(gains, count, extrapolated=False)
        if order:  # neither is right of all: a line through two values doubles their noise
            chosen += self._cheapest(gains, count, extrapolated=True)
        uniform = [tuple(range(0, self.num_steps, interval)) for interval in range(2, self._max_reuse + 2)]
        return list(dict.fromkeys([*chosen, *uniform]))

    def _cheapest(self, gains: Sequence[float], count: int, *, extrapolated: bool) -> list[tuple[int, ...]]:
        """By the errors of reuse, or of extrapolation by a line."""

        def cost(before: int | None, source: int, step: int) -> float:
            return gains[step] * self._errors.of(before if extrapolated else None, source, step)

        by_count = best_schedules(cost, self.num_steps, self._max_reuse)
        by_count.pop(self.num_steps, None)
        speeds = {full: self.plan.speedup_of(full, self.num_steps) for full in by_count}
        wanted: Any = np.linspace(min(speeds.values()), max(speeds.values()), count) if speeds else ()
        return [by_count[min(speeds, key=lambda full: abs(speeds[full] - speed))] for speed in wanted]

    def _tried(self, order: int, steps: Sequence[int], place: int) -> Quality:
        from lightcache_fx.quality import compare_videos

        fast, runtime = self._transformed(order)
        with _scheduled(runtime, steps):
            return compare_videos(self.plain[place], self._generate(fast, place), measures=("psnr", "ssim"))

    def _point(self, order: int, steps: Sequence[int], psnrs: Sequence[float], ssims: Sequence[float]) -> Point:
        psnr = interquartile_mean(psnrs)
        return Point(
            cut=self._cut,
            order=order,
            full_steps=list(steps),
            speedup=self.plan.speedup_of(len(steps), self.num_steps),
            psnr=psnr if psnr < _SAME else None,
            ssim=interquartile_mean(ssims),
        )


class _Errors:
    """What reuse does to the model's output, as a root mean square, by the step that kept and the step that reuses."""

    def __init__(self) -> None:
        self._reused: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._extrapolated: dict[tuple[int, int, int], list[float]] = defaultdict(list)

    def of(self, before: int | None, source: int, step: int) -> float:
        """At `step`, of the value that `source` kept, or of the line through it and that of the full step `before`."""
        if before is None:
            values = self._reused.get((source, step), [])
        else:
            values = self._extrapolated.get((before, source, step), [])
        return float(np.mean(values)) if values else math.inf

    def add(self, source: int, step: int, error: float, shares: Mapping[int, float]) -> None:
        """Take one error of reuse and, by the full step before, what is left of it after extrapolation."""
        self._reused[source, step].append(error)
        for before, share in shares.items():
            self._extrapolated[before, source, step].append(error * share)


class _Recorder:
    """Runs the reuse program beside each full step, with what each of the steps before has kept.

    Args:
        max_reuse: so many steps before.
        errors: takes what it finds.
        extrapolated: whether lines through two kept values are looked at; they reach back twice as far, and what is
            only needed for them waits in host memory.
    """

    def __init__(self, max_reuse: int, errors: _Errors, *, extrapolated: bool) -> None:
        self._max_reuse, self._errors, self._extrapolated = max_reuse, errors, extrapolated
        self._oldest = 2 * max_reuse + 1 if extrapolated else max_reuse
        self._kept: dict[int, dict[int, _Kept]] = defaultdict(dict)

    def __call__(self, seen: Observed) -> None:
        kept = self._kept[seen.branch]
        if seen.step == 0:
            kept.clear()
        reuse, now = seen.compiled.bound["reuse"], dict(seen.stores.slots)
        for source in [step for step in kept if step >= seen.step - self._max_reuse]:
            slots = kept[source]
            stores = Stores(slots=dict(slots), hoisted=seen.stores.hoisted, weight_copies=seen.stores.weight_copies)
            outputs = reuse(seen.tensors, stores)
            pairs = [pair for pair in zip(outputs, seen.outputs, strict=True) if pair[1].is_floating_point()]
            error = max(_rms_of(a.double() - b.double()) for a, b in pairs)
            befores = [step for step in kept if source - self._max_reuse - 1 <= step < source]
            shares = {
                before: _share_left(kept[before], kept[source], now, (seen.step - source) / (source - before))
                for before in (befores if self._extrapolated else ())
            }
            self._errors.add(source, seen.step, error, shares)
        kept[seen.step] = now
        aged = seen.step - self._max_reuse
        if aged in kept:
            kept[aged] = {name: value.cpu() for name, value in kept[aged].items()}
        kept.pop(seen.step - self._oldest, None)


def _share_left(older: _Kept, newer: _Kept, now: _Kept, ahead: float) -> float:
    """How far from `now` the line through two values is, over how far the newer is: of several, the quadratic mean.

    Args:
        older: what a step kept, by name.
        newer: what a later one did.
        now: what one behind both would.
        ahead: how far `now` is from `newer`, over how far that is from `older`.
    """
    shares = []
    for name, value in now.items():
        value = value.float()
        one, other = older[name].to(value), newer[name].to(value)
        moved = _rms_of(value - other)
        shares.append(_rms_of(value - other - ahead * (other - one)) / moved if moved else 0.0)
    return math.sqrt(sum(share**2 for share in shares) / len(shares))


@contextmanager
def _observed(runtime: Runtime, observe: Callable[[Observed], None]) -> Iterator[None]:
    runtime.observe = observe
    try:
        yield
    finally:
        runtime.observe = None


@contextmanager
def _scheduled(runtime: Runtime, steps: Sequence[int]) -> Iterator[None]:
    """While active, these steps are full, and all others are reused."""
    runtime.schedule = Schedules((Schedule(interval=None, steps=frozenset(steps)),))
    try:
        yield
    finally:
        runtime.schedule = None


def _result(pipe: Any, given: Input, place: int) -> Any:
    if callable(given):
        return given(pipe)
    arguments: dict[str, Any] = {"prompt": given} if isinstance(given, str) else dict(given)
    arguments.setdefault("output_type", "np")
    if arguments.get("generator") is None:
        arguments["generator"] = torch.Generator().manual_seed(place)
    elif isinstance(arguments["generator"], torch.Generator):
        arguments["generator"] = arguments["generator"].clone_state()  # each run begins where the first did
    return pipe(**arguments)


def _frames(result: Any) -> Frames:
    """What a pipeline returns, as frames: float32 (frames, height, width, channels) in 0..1."""
    from lightcache_fx.quality.videos import as_frames

    if isinstance(result, Mapping):  # as diffusers' outputs are
        result = result.get("frames", result.get("images"))
    array = np.asarray(result.cpu() if isinstance(result, torch.Tensor) else result)
    if array.ndim == 5:
        array = array.reshape(-1, *array.shape[2:])
    if array.ndim != 4 or array.dtype == object:
        raise CalibrationError(
            f"inputs: expected results with frames or images, as arrays of 4 or 5 dimensions, got"
            f" {type(result).__name__} of shape {array.shape}; give a function that returns frames"
        )
    return np.asarray(as_frames(array), dtype=np.float32)


def _rms(difference: Frames) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def _rms_of(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _label(cut: Cut) -> str:
    if isinstance(cut, Residual):
        return f"residual {cut.first} .. {cut.last}"
    return f"branch {cut}" if isinstance(cut, int) else str(cut)
