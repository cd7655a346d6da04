"""`calibrate`: which steps of a model may be reused, found by trying it.

Three kinds of runs, for each candidate cut:

1. A run of full steps. At each step the reuse program runs too, with what each of the steps before it kept, and how far
   its outputs are from the full step's is noted: what a reuse does to the model's output at that step.
2. Runs in which one single step is reused: how far the results are from those of full steps, over the first figure,
   is the gain of the sampler from that step to the end.
3. Dynamic programming over the products of both, for each number of full steps; and the schedules that it finds are run
   and measured, so that what is promised has been seen.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
from lightcache_fx.runtime import Runtime
from lightcache_fx.schedule import Schedule, Schedules
from lightcache_fx.scheduling import best_schedules
from lightcache_fx.stores import Stores

log = logging.getLogger(__name__)

Frames = NDArray[np.float32]
Input = str | Mapping[str, Any] | Callable[[Any], Any]

MAX_REUSE = 7
POINTS = 8
PROBES = 8
_TINY = 1e-12


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
    each cut, order and input. Speeds are by FLOPs: what caching can gain at most.

    Args:
        pipe: a diffusers pipeline that is not transformed.
        inputs: what to generate: a prompt, a mapping of arguments of the call, or a function that is given the pipeline
            and returns frames or images in 0..1. Prompts and mappings without a generator get one, seeded by their
            place.
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
    if isinstance(inputs, str | Mapping) or callable(inputs) or not inputs:
        given = type(inputs).__name__ if inputs else "nothing"
        raise CalibrationError(
            f"inputs: expected a list of prompts, of mappings of the pipeline's arguments, or of functions, got {given}"
        )
    policy = policy or Policy()
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
            trial = _Trial(pipe, names[0], cut, max_reuse, policy, inputs)
        except CutError as error:
            if cuts is not None:
                raise
            log.info("not tried: %s", error)
            continue
        num_steps = trial.num_steps
        found += trial.points(orders, points, probes, say)
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
        self, pipe: Any, component: str, cut: Cut, max_reuse: int, policy: Policy, inputs: Sequence[Input]
    ) -> None:
        self._pipe, self._component, self._cut = pipe, component, cut
        self._max_reuse, self._policy, self._inputs = max_reuse, policy, inputs
        self._errors: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._by_order: dict[int, Any] = {}
        fast, runtime = self._transformed(0)
        self.plain, lengths = [], []
        with _observed(runtime, _Recorder(max_reuse, self._errors)):
            for place in range(len(inputs)):
                self.plain.append(self._generate(fast, place))
                lengths.append(1 + max(run.step for run in runtime.timeline()))
        self.plan = runtime.latest().plan
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

    def points(self, orders: Sequence[int], count: int, probes: int, say: Callable[[str], None]) -> list[Point]:
        """Schedules for each order, tried."""
        if self.plan.reuse_flops() >= self.plan.full_flops:
            return []
        schedules = self._schedules(self._gains(probes), count)
        say(f"{_label(self._cut)}: gains measured, {len(schedules)} schedules to try")
        found: list[Point] = []
        for order in orders:
            found += [self._tried(steps, order) for steps in schedules]
            say(f"{_label(self._cut)}, order {order}: {len(schedules)} schedules tried")
        return found

    def _gains(self, probes: int) -> list[float]:
        """How far the first input's result moves for a unit of error at each step's output."""
        fast, runtime = self._transformed(0)
        last = self.num_steps - 1
        steps = np.unique(np.linspace(1, last, probes).round().astype(int)).tolist() if last else []
        logs = []
        for step in steps:
            with _scheduled(runtime, [other for other in range(self.num_steps) if other != step]):
                moved = _rms(self._generate(fast, 0) - self.plain[0])
            logs.append(math.log(max(moved, _TINY) / max(self._error(step - 1, step), _TINY)))
        gains = np.exp(np.interp(range(self.num_steps), steps, logs)) if steps else np.ones(self.num_steps)
        return [float(gain) for gain in gains]

    def _error(self, source: int, step: int) -> float:
        values = self._errors.get((source, step), [])
        return float(np.mean(values)) if values else math.inf

    def _schedules(self, gains: Sequence[float], count: int) -> list[tuple[int, ...]]:
        """The cheapest full steps for evenly spread speeds, and those of uniform intervals."""
        number = range(self.num_steps)
        costs = [[gains[j] * self._error(i, j) if i < j else 0.0 for j in number] for i in number]
        by_count = best_schedules(costs, self._max_reuse)
        by_count.pop(self.num_steps, None)
        speeds = {full: self.plan.speedup_of(full, self.num_steps) for full in by_count}
        wanted: Any = np.linspace(min(speeds.values()), max(speeds.values()), count) if speeds else ()
        chosen = [by_count[min(speeds, key=lambda full: abs(speeds[full] - speed))] for speed in wanted]
        uniform = [tuple(range(0, self.num_steps, interval)) for interval in range(2, self._max_reuse + 2)]
        return list(dict.fromkeys([*chosen, *uniform]))

    def _tried(self, steps: Sequence[int], order: int) -> Point:
        from lightcache_fx.quality import compare_videos

        fast, runtime = self._transformed(order)
        with _scheduled(runtime, steps):
            scores = [
                compare_videos(plain, self._generate(fast, place), measures=("psnr", "ssim"))
                for place, plain in enumerate(self.plain)
            ]
        differing = [score for score in scores if not score.identical]
        return Point(
            cut=self._cut,
            order=order,
            full_steps=list(steps),
            speedup=self.plan.speedup_of(len(steps), self.num_steps),
            psnr=float(np.mean([score.psnr.mean for score in differing])) if differing else None,  # type: ignore[union-attr]
            ssim=float(np.mean([1.0 if score.identical else score.ssim.mean for score in scores])),  # type: ignore[union-attr]
        )


class _Recorder:
    """Runs the reuse program beside each full step, with what each of the steps before has kept.

    Args:
        max_reuse: so many steps before.
        errors: takes, by the step that kept and the step that reuses, the root mean square of the outputs' difference.
    """

    def __init__(self, max_reuse: int, errors: dict[tuple[int, int], list[float]]) -> None:
        self._max_reuse = max_reuse
        self._errors = errors
        self._kept: dict[int, dict[int, dict[str, torch.Tensor]]] = defaultdict(dict)

    def __call__(self, seen: Observed) -> None:
        kept = self._kept[seen.branch]
        if seen.step == 0:
            kept.clear()
        reuse = seen.compiled.bound["reuse"]
        for source, slots in kept.items():
            stores = Stores(slots=dict(slots), hoisted=seen.stores.hoisted, weight_copies=seen.stores.weight_copies)
            outputs = reuse(seen.tensors, stores)
            pairs = [pair for pair in zip(outputs, seen.outputs, strict=True) if pair[1].is_floating_point()]
            self._errors[source, seen.step].append(max(_rms_of(a.double() - b.double()) for a, b in pairs))
        kept[seen.step] = dict(seen.stores.slots)
        kept.pop(seen.step - self._max_reuse, None)


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
