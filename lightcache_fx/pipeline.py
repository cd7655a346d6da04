"""`transform_pipeline`: a diffusers pipeline whose denoisers run programs and whose runs are marked.

The pipeline's own code is not changed. Pipeline and scheduler are second views too: the pipeline's `__call__` begins
and ends a run, the scheduler's `step` ends a denoising step, so no step has to read a timestep from the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lightcache_fx.calls import default_rate
from lightcache_fx.errors import ArgumentError, TransformError, nearest
from lightcache_fx.ledger import Ledger
from lightcache_fx.module import TransformedModule, is_autoencoder, restore_module, runtime_of, transform_component
from lightcache_fx.policy import Policy
from lightcache_fx.runs import current_run, marked_run, step_done
from lightcache_fx.views import second_view

P = TypeVar("P")


@dataclass(frozen=True)
class _AddedPipeline:
    original: Any
    components: tuple[str, ...]
    ledger: Ledger


class MarkedScheduler:
    """Mixin of a scheduler that tells the current run about its steps."""

    __slots__ = ()


class TransformedPipeline:
    """Mixin of a transformed pipeline; its other base is the original's class."""

    __slots__ = ()
    _lightcache: _AddedPipeline


def transform_pipeline(pipe: P, policy: Policy, components: Sequence[str] | None = None) -> P:
    """A pipeline of the same class with transformed denoisers; the given one is untouched and shares its weights.

    Args:
        pipe: a diffusers pipeline, or an object with its attributes: `components`, `scheduler`, `__call__`.
        policy: applied to every component; of it an autoencoder takes what is about memory.
        components: names of the components to transform; by default every module whose forward takes a timestep, except
            those that only condition another (the pipeline's `model_cpu_offload_seq` does not name them); the
            autoencoder where the policy has `decode`; and, where it has `swap` or a `memory_budget`, everything that
            `model_cpu_offload_seq` names: each then has the device to itself while it runs.

    Raises:
        ArgumentError: not a pipeline, or a component that it does not have.
        TransformError: a pipeline that is transformed already, or one without a denoiser.
    """
    if not isinstance(getattr(pipe, "components", None), dict) or not callable(pipe):
        raise ArgumentError(
            f"transform_pipeline: expected a diffusers pipeline, got {type(pipe).__name__}; for a module use transform"
        )
    if not callable(getattr(getattr(pipe, "scheduler", None), "step", None)):
        raise ArgumentError(
            f"transform_pipeline: {type(pipe).__name__} has no scheduler whose steps could mark a run; transform its"
            f" denoiser with transform, and mark runs with marked_run and step_done"
        )
    if isinstance(pipe, TransformedPipeline):
        raise TransformError(
            "transform_pipeline: this pipeline is transformed already; call lightcache_fx.restore(pipe) first"
        )
    modules: dict[str, nn.Module] = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}  # type: ignore[attr-defined]
    if components is None:
        names = _denoisers(pipe, modules)
        if policy.runs_autoencoders():
            names += [name for name, module in modules.items() if is_autoencoder(module)]
        if policy.is_about_memory():
            names += [name for name in _main_components(pipe, modules) if name not in names]
    else:
        names = list(components)
    for name in names:
        if name not in modules:
            raise ArgumentError(
                f"transform_pipeline: the pipeline has no module {name!r}{nearest(name, modules)}; it has"
                f" {', '.join(modules)}"
            )
    if not names:
        raise TransformError(
            f"transform_pipeline: no component of {type(pipe).__name__} takes a timestep; name one in components=[...]"
        )
    ledger = Ledger(is_shared=True)
    transformed = {name: _transformed(modules[name], policy, ledger) for name in names}
    copy = object.__new__(type(pipe))
    vars(copy).update(vars(pipe))
    view = second_view(copy, _pipeline_mixin(type(pipe)), _AddedPipeline(pipe, tuple(names), ledger))
    for name, module in transformed.items():
        setattr(view, name, module)
    return view


def restore_pipeline(pipe: P) -> P:
    """The very pipeline that was given to `transform_pipeline`, its weights on the device that they were on."""
    if not isinstance(pipe, TransformedPipeline):
        raise TransformError(f"restore: this {type(pipe).__name__} is not transformed")
    for module in _transformed_modules(pipe):
        runtime_of(module).recall()
    return pipe._lightcache.original  # type: ignore[no-any-return]


def restore(transformed: P) -> P:
    """The original of a transformed module or pipeline, untouched.

    Raises:
        TransformError: it is not transformed, or hooks were put on it since.
    """
    if isinstance(transformed, TransformedPipeline):
        return restore_pipeline(transformed)
    if isinstance(transformed, nn.Module):
        return restore_module(transformed)
    raise TransformError(f"restore: expected a transformed module or pipeline, got {type(transformed).__name__}")


def _main_components(pipe: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Those that run one after the other, and not within one another."""
    sequence = getattr(pipe, "model_cpu_offload_seq", None)
    main = set(sequence.split("->")) if isinstance(sequence, str) else set(modules)
    return [name for name in modules if name in main]


def denoisers_of(pipe: Any) -> list[str]:
    """The names of a pipeline's components that take a timestep and run by themselves."""
    return _denoisers(pipe, {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)})


def _denoisers(pipe: Any, modules: dict[str, nn.Module]) -> list[str]:
    return [name for name in _main_components(pipe, modules) if _takes_timestep(modules[name])]


def _transformed(module: nn.Module, policy: Policy, ledger: Ledger) -> nn.Module:
    """A component by what of the policy applies to it."""
    applies = policy_for_component(module, policy)
    return transform_component(module, applies, ledger, may_stay_eager=applies is not policy)


def policy_for_component(module: nn.Module, policy: Policy) -> Policy:
    """All of a policy; for what neither denoises nor decodes, what it says of where weights are."""
    return policy if is_autoencoder(module) or _takes_timestep(module) else policy.of_encoder()


def _takes_timestep(module: nn.Module) -> bool:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return any(default_rate(name, first=i == 0) == "step" for i, name in enumerate(names))


def _pipeline_mixin(cls: type) -> type:
    original_call = cls.__call__

    @functools.wraps(original_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - a method made outside its class
        _mark_scheduler(self)
        with marked_run(), self._lightcache.ledger.generation():
            return original_call(self, *args, **kwargs)

    namespace: dict[str, Any] = {"__slots__": (), "__call__": __call__}
    for name in ("device", "_execution_device"):
        original = inspect.getattr_static(cls, name, None)
        if isinstance(original, property):
            namespace[name] = property(functools.partial(_device_of, original=original))
    return type("TransformedPipeline", (TransformedPipeline,), namespace)


def _transformed_modules(pipe: Any) -> list[TransformedModule]:
    found = (getattr(pipe, name) for name in pipe._lightcache.components)
    return [module for module in found if isinstance(module, TransformedModule)]


def _device_of(pipe: Any, original: property) -> Any:
    """A device that the original tells by its weights, which may be kept elsewhere: of what swaps, where it runs."""
    swapping = (runtime_of(module) for module in _transformed_modules(pipe))
    return next((run.homes.device for run in swapping if run.policy.is_about_memory()), None) or original.fget(pipe)  # type: ignore[misc]


def _mark_scheduler(pipe: Any) -> None:
    """Let the pipeline's present scheduler, which the user may have replaced, tell about its steps."""
    scheduler = pipe.scheduler
    if not isinstance(scheduler, MarkedScheduler):
        pipe.scheduler = second_view(scheduler, _scheduler_mixin(type(scheduler)), None)


def _scheduler_mixin(cls: type) -> type:
    original_step = cls.step  # type: ignore[attr-defined]
    original_set_timesteps = cls.set_timesteps  # type: ignore[attr-defined]

    @functools.wraps(original_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original_step(self, *args, **kwargs)
        step_done()
        return result

    @functools.wraps(original_set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original_set_timesteps(self, *args, **kwargs)
        run = current_run()
        if run is not None:
            run.begin(len(self.timesteps))
        return result

    original_set_begin_index: Any = getattr(cls, "set_begin_index", None)

    def set_begin_index(self: Any, begin_index: int = 0) -> None:
        """Image to image begins in mid-schedule: fewer steps are to come."""
        original_set_begin_index(self, begin_index)
        run = current_run()
        if run is not None and run.num_steps is not None:
            run.num_steps = len(self.timesteps) - begin_index

    methods: dict[str, Any] = {"__slots__": (), "step": step, "set_timesteps": set_timesteps}
    if original_set_begin_index is not None:
        methods["set_begin_index"] = set_begin_index
    return type("MarkedScheduler", (MarkedScheduler,), methods)
