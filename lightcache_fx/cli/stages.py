"""Watching one generation stage by stage: encode, denoise, decode; without changing what a pipeline computes.

Stages are told apart by what the pipeline does: it sets the scheduler's timesteps when everything is encoded, and asks
for the last of its steps before it decodes.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightcache_fx.cli.timing import synchronize
from lightcache_fx.errors import ArgumentError
from lightcache_fx.liveness import timeline
from lightcache_fx.measure import measure_stages
from lightcache_fx.module import TransformedModule
from lightcache_fx.pipeline import denoisers_of
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Policy, Swap
from lightcache_fx.runtime import Runtime

STAGES = ("encode", "denoise", "decode")
T = TypeVar("T")


class Observer(Protocol):
    """Told when a stage begins and when a denoising step ends."""

    def stage(self, name: str) -> None:
        """Stage `name` of `STAGES` begins, or `done`."""

    def step(self) -> None:
        """A denoising step has ended."""


def _nothing() -> None:
    """Nobody is told."""


def watched(scheduler: Any, begin: Callable[[str], None], stepped: Callable[[], None] = _nothing) -> Any:
    """A scheduler that is the given one and tells which stage begins: for any pipeline, whatever it calls back.

    Denoising begins as the timesteps are set, decoding with the last step's end. A pipeline's call begins encoding.

    Args:
        scheduler: of a diffusers pipeline; it stays as it is.
        begin: called with `denoise` and `decode`.
        stepped: called as each step ends, before decoding begins.
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
        stepped()
        if steps_left == 0:
            begin("decode")
        return result

    watching: Any = type(cls.__name__, (cls,), {"set_timesteps": set_timesteps, "step": step})
    return watching.from_config(scheduler.config)


def denoiser_of(pipe: Any) -> Any:
    """The component that is called at each step; of several the first.

    Raises:
        ArgumentError: there is none.
    """
    names = denoisers_of(pipe)
    if not names:
        raise ArgumentError(f"{type(pipe).__name__} has no component that takes a timestep, so nothing to accelerate")
    return pipe.components[names[0]]


def modules_of(pipe: Any) -> list[nn.Module]:
    """The networks of a pipeline."""
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def resident_weight_bytes(pipe: Any, device: torch.device) -> int:
    """Bytes of the weights that are on the device and never leave: all but those bound to their copies elsewhere."""
    homes = [
        runtime.homes
        for module in modules_of(pipe)
        if isinstance(module, TransformedModule)
        for runtime in module._lightcache.runtimes.values()
    ]
    weights = [weight for module in modules_of(pipe) for weight in module.parameters()]
    here = [weight for weight in weights if weight.device.type == device.type]
    return sum(weight.nbytes for weight in here if not any(home.is_home(weight) for home in homes))


def place(pipe: Any, policy: Policy | None, device: torch.device) -> tuple[Any, Policy | None]:
    """A pipeline where its policy wants it: what swaps to a GPU stays in host memory, everything else is moved."""
    if policy is None or not policy.is_about_memory() or device.type == "cpu":
        return pipe.to(device), policy
    swap = policy.swap or Swap()
    if not swap.weights:
        return pipe.to(device), policy
    return pipe, policy.model_copy(update={"swap": swap.model_copy(update={"device": str(device)})})


@dataclass
class Stopwatch:
    """Watches the stages of a pipeline's generations, whose scheduler it replaces before anything is transformed.

    Attributes:
        pipe: whose weights count; a transformed one that was made of it may be put in its place.
        device: that it runs on.
        seconds: of each stage of the last generation.
        listener: told of each stage as it begins, if there is one.
        observers: told of each stage and step of the generation that is under way.
    """

    pipe: Any
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    listener: Callable[[str], None] | None = None
    observers: tuple[Observer, ...] = ()

    def __post_init__(self) -> None:
        self._stage, self._since = "", 0.0
        self.pipe.scheduler = watched(self.pipe.scheduler, self.begin, self._stepped)

    def begin(self, stage: str) -> None:
        """A stage begins, or, with an empty name, none."""
        synchronize(self.device)
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = now - self._since
        self._stage, self._since = stage, now
        if self.listener is not None and stage:
            self.listener(stage)
        for observer in self.observers:
            observer.stage(stage or "done")

    def _stepped(self) -> None:
        for observer in self.observers:
            observer.step()

    def run(self, generate: Callable[[], T], *observers: Observer) -> T:
        """Generate once and tell the observers, in order, where it is."""
        self.seconds.clear()
        self._stage, self.observers = "", observers
        try:
            self.begin(STAGES[0])
            result = generate()
            self.begin("")
        finally:
            self.observers = ()
        return result

    def peaks(self, generate: Callable[[], object], *observers: Observer) -> dict[str, int]:
        """The most bytes that each stage of one more generation takes, weights that never leave included."""

        def listened(begin: Callable[[str], None]) -> object:
            self.listener = begin
            try:
                return self.run(generate, *observers)
            finally:
                self.listener = None

        found = measure_stages(listened, device_type=self.device.type)
        return {stage: peak + resident_weight_bytes(self.pipe, self.device) for stage, peak in found.items()}


def predicted_peaks(pipe: Any) -> dict[str, int]:
    """What our plans say that each stage takes on the device, weights included; nothing of what is not planned.

    What a pipeline holds beside its models (latents, the video that it puts together) is in no plan.
    """
    found: dict[str, int] = {}
    weights = {id(weight): weight for module in modules_of(pipe) for weight in module.parameters()}
    everything = sum(weight.nbytes for weight in weights.values())
    for name, module in pipe.components.items():
        if not isinstance(module, TransformedModule):
            continue
        for method, runtime in module._lightcache.runtimes.items():
            decodes = "decode" if (name, method) == ("vae", "decode") else "encode"
            stage = "denoise" if module is denoiser_of(pipe) else decodes
            for plan in (compiled.plan for compiled in runtime.repertoire.compiled.values()):
                swapped = plan.swap.plan.peak_bytes if plan.swap is not None else None
                peak = swapped or everything + _peak_beside_weights(runtime, plan)
                found[stage] = max(found.get(stage, 0), peak)
    return found


def _peak_beside_weights(runtime: Runtime, plan: Plan) -> int:
    programs = [program for compiled in runtime.repertoire.compiled.values() for program in compiled.programs.values()]
    steps = [timeline(p.graph_module.graph).peak_bytes for p in programs if p.name != "prologue"]
    return max(steps, default=0) + plan.kept_bytes + plan.hoist.num_bytes


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

    def step(self) -> None:
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
        super().__init__()  # type: ignore[no-untyped-call] # torch's
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
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
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

    def step(self) -> None:
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
