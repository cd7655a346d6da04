"""Watching one generation stage by stage: encode, denoise, decode; without changing pipeline or models.

Stages are told apart by what the pipeline does: it sets the scheduler's timesteps when everything is encoded, and calls
back after each denoising step.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from diffusers import StableVideoDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

STAGES = ("encode", "denoise", "decode")
Frames = NDArray[np.float32]
"""RGB in 0..1: (frames, height, width, 3)."""


@dataclass(frozen=True)
class Request:
    """What is asked of the pipeline: `image` is the first frame, `seed` decides all noise."""

    image: Image.Image
    steps: int
    seed: int
    fps: int
    motion_bucket_id: int


class Observer(Protocol):
    """Told when a stage begins and when a denoising step ends."""

    def stage(self, name: str) -> None:
        """Stage `name` of `STAGES` begins, or `done`."""

    def step(self, pipe: StableVideoDiffusionPipeline) -> None:
        """A denoising step has ended."""


def generate(pipe: StableVideoDiffusionPipeline, request: Request, observers: Sequence[Observer] = ()) -> Frames:
    """Run the pipeline once and tell the observers, in order, where it is."""

    def begin(name: str) -> None:
        for observer in observers:
            observer.stage(name)

    def step_ended(pipe: StableVideoDiffusionPipeline, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        for observer in observers:
            observer.step(pipe)
        if step == pipe.num_timesteps - 1:
            begin("decode")
        return {}

    set_timesteps = pipe.scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def steps_are_set(*args: Any, **kwargs: Any) -> None:
        begin("denoise")
        set_timesteps(*args, **kwargs)

    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    begin("encode")
    with mock.patch.object(pipe.scheduler, "set_timesteps", steps_are_set):
        frames = pipe(
            request.image,
            height=size,
            width=size,
            num_inference_steps=request.steps,
            fps=request.fps,
            motion_bucket_id=request.motion_bucket_id,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            callback_on_step_end=step_ended,
        ).frames[0]
    begin("done")
    return np.asarray(frames, dtype=np.float32)


def watched(scheduler: Any, begin: Callable[[str], None]) -> Any:
    """A scheduler that is the given one and tells which stage begins: for any pipeline, whatever it calls back.

    Denoising begins as the timesteps are set, decoding with the last step's end. A pipeline's call begins encoding.

    Args:
        scheduler: of a diffusers pipeline; it stays as it is.
        begin: called with `denoise` and `decode`.
    """
    cls = type(scheduler)
    steps_left = 0

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal steps_left
        begin("denoise")
        cls.set_timesteps(self, *args, **kwargs)
        steps_left = len(self.timesteps)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps_left
        result = cls.step(self, *args, **kwargs)
        steps_left -= 1
        if steps_left == 0:
            begin("decode")
        return result

    watching = type(cls.__name__, (cls,), {"set_timesteps": set_timesteps, "step": step})
    return watching.from_config(scheduler.config)


class Clock:
    """Wall-clock seconds of each stage and of each denoising step, and the mean number of cores that were at work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []
        self.cores = 0.0
        self._cpu_began = 0.0
        self._stage = "done"
        self._since = self._step_since = 0.0

    def stage(self, name: str) -> None:
        """Close the stage before."""
        now = time.perf_counter()
        if self._stage != "done":
            self.seconds[self._stage] = now - self._since
        else:
            self._cpu_began = time.process_time()
        if name == "done":
            self.cores = (time.process_time() - self._cpu_began) / sum(self.seconds.values())
        self._stage, self._since, self._step_since = name, now, now

    def step(self, _pipe: StableVideoDiffusionPipeline) -> None:
        """Close the step."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._step_since)
        self._step_since = now


class Meter(TorchDispatchMode):
    """Peak tensor bytes and FLOPs of each stage, counted operator by operator while the mode is entered.

    Bytes are those of storages that operators have allocated and that are still alive; weights and inputs are not among
    them, nor is scratch memory inside a kernel. So the figures are the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.operators = 0
        self.moments: list[tuple[int, int]] = []
        self.begins: dict[str, int] = {}
        self.peak_stage = ""
        self.peak_alive: list[tuple[str, tuple[int, ...], int]] = []
        self._alive: dict[int, tuple[str, tuple[int, ...], int]] = {}
        self._highest = 0
        self._live_bytes = self._allocations = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._stage = "done"
        self._flops_before = 0
        self._counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)

    def __enter__(self) -> Meter:
        self._counter.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._counter.__exit__(*error)

    def stage(self, name: str) -> None:
        """Close the stage before and begin another from what is alive now."""
        total = self._counter.get_total_flops()
        if self._stage != "done":
            self.flops[self._stage] = total - self._flops_before
        if name != "done":
            self.peak_bytes[name] = self._live_bytes
            self.begins[name] = self.operators
        self._stage, self._flops_before = name, total

    def step(self, _pipe: StableVideoDiffusionPipeline) -> None:
        """Steps are not told apart here."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operator; storages first seen among its results are new."""
        for storage in _storages((args, kwargs)):
            self._seen.add(storage)
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._live_bytes += storage.nbytes()
                key = self._allocations
                self._allocations += 1
                self._alive[key] = (str(func), tuple(leaf.shape), storage.nbytes())
                weakref.finalize(storage, self._freed, key)
        self._note()
        if self._stage != "done":
            self.peak_bytes[self._stage] = max(self.peak_bytes[self._stage], self._live_bytes)
        return result

    def _note(self) -> None:
        if self._stage == "done":
            return
        self.operators += 1
        self.moments.append((self.operators, self._live_bytes))
        if self._live_bytes > self._highest:
            self._highest, self.peak_stage, self.peak_alive = self._live_bytes, self._stage, [*self._alive.values()]

    def over_time(self, bins: int = 400, largest: int = 8) -> dict[str, Any]:
        """The most in each of `bins` equal shares of the operators, where stages begin, and what the peak held.

        Returns:
            `bytes` of each bin; `begins`, of each stage the share of operators before it; `stage` of the peak; `alive`,
            the `largest` storages then, with the operator that made each, its result's shape, and bytes.
        """
        heights = [0] * bins
        last = before = 0
        for operator, num_bytes in self.moments:
            place = (operator - 1) * bins // self.operators
            for between in range(last + 1, place):
                heights[between] = before
            heights[place] = max(heights[place], num_bytes)
            last, before = place, num_bytes
        alive = sorted(self.peak_alive, key=lambda item: -item[2])[:largest]
        return {
            "bytes": heights,
            "begins": {stage: begin / self.operators for stage, begin in self.begins.items()},
            "stage": self.peak_stage,
            "alive": [
                {"operator": operator, "shape": " × ".join(map(str, shape)), "bytes": num_bytes}
                for operator, shape, num_bytes in alive
            ],
        }

    def _freed(self, key: int) -> None:
        self._live_bytes -= self._alive.pop(key)[2]


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **_kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}  # noqa: SLF001 - an operator's name
"""The attention kernel of a CPU, which torch's registry of formulas leaves out: it would count as nothing."""
