"""What the commands `plan` and `diff` do: a system's models from fake tensors, its policy, and plans or programs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from lightcache_fx.caching import Cache
from lightcache_fx.cli.recipes import Inputs, Request, factor_of, read_input, resolve, stage_calls, step_inputs
from lightcache_fx.cli.systems import Component, System, build, fake_models
from lightcache_fx.costs import CPU, GPU_FLOAT, GPU_HALF
from lightcache_fx.errors import CaptureError, ConfigError, LightcacheError, PolicyError
from lightcache_fx.hardware import PCIE, Hardware, measured_link
from lightcache_fx.module import capture_and_plan, plan
from lightcache_fx.pipeline_plan import PipelinePlan, Stage, plan_pipeline
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Policy
from lightcache_fx.program import build_programs

Kind = Literal["cpu", "cuda"]
Dtype = Literal["float16", "bfloat16", "float32"]
_OF_THE_MODEL = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What a model's own code raises when it is called with what it does not take."""


@dataclass(frozen=True)
class Wish:
    """What is asked for, beside the policy.

    Attributes:
        component: the one to plan; None for the denoiser or, within a budget, for all.
        batch: how many videos.
        dtype: of weights and inputs.
        sizes: `height`, `width`, `frames`, `steps`, `guidance`, `decode_frames`; None where the system says.
        inputs: arguments of the component's call, as `--input` has them.
    """

    component: str | None = None
    batch: int = 1
    dtype: Dtype = "float16"
    sizes: Mapping[str, int | bool | None] = field(default_factory=dict)
    inputs: Sequence[str] = ()


@dataclass(frozen=True)
class Made:
    """A system's models with their calls, of fake tensors.

    Attributes:
        system: that it is.
        request: what is generated.
        stages: in order.
        left_out: components that are not among them, and why.
    """

    system: System
    request: Request
    stages: tuple[Stage, ...]
    left_out: Mapping[str, str]

    @property
    def weight_bytes(self) -> int:
        """Of all models that are planned."""
        modules = {id(stage.module): stage.module for stage in self.stages}
        return sum(weight.nbytes for module in modules.values() for weight in module.parameters())


def make(system: System, wish: Wish, *, whole: bool) -> Made:
    """Build the models of a system and the tensors that they are called with, without memory.

    Args:
        system: of configurations.
        wish: what is generated.
        whole: all of its models; otherwise the wish's component or the denoiser.

    Raises:
        ConfigError: a model cannot be built or is not known how to call.
    """
    main = system.component(wish.component)
    factor = factor_of(next((c for c in system.components if c.name.startswith("vae")), None))
    components = list(system.components) if whole else [main]
    left_out = dict(system.left_out) if whole else {}
    begin: list[Stage] = []
    end: list[Stage] = []
    with fake_models(getattr(torch, wish.dtype)):
        own = dict(map(read_input, wish.inputs))
        module = build(main)
        request = resolve(system.defaults, system.denoiser or main, factor, wish.batch, **wish.sizes)
        main_stages = _main_stages(main, module, request, own)
        for component in components:
            if component is main:
                continue
            other = build(component)
            calls = stage_calls(component, other, request)
            if not calls:
                left_out[component.name] = f"how {component.cls} is called is not known here"
            for call in calls:
                stage = Stage(call.name, other, kwargs=call.kwargs, calls=call.calls, method=call.method)
                (end if call.name == "decode" else begin).append(stage)
    return Made(system, request, (*begin, *main_stages, *end), left_out)


def _main_stages(component: Component, module: Any, request: Request, own: Inputs) -> list[Stage]:
    """The component that was asked for: most often a denoiser, whose calls are the steps."""
    calls = [] if own else stage_calls(component, module, request)
    if calls:
        return [Stage(call.name, module, kwargs=call.kwargs, calls=call.calls, method=call.method) for call in calls]
    return [Stage("denoise", module, kwargs=step_inputs(module, request, own), calls=request.steps)]


def make_policy(
    system: System,
    *,
    file: Path | None = None,
    interval: int | None = None,
    branch: int | None = None,
    cache: bool = True,
    memory_budget: str | None = None,
) -> Policy:
    """The policy file's, or DeepCache's, or the published one of a preset, with the budget.

    Raises:
        PolicyError: an impossible setting, or two that exclude each other.
    """
    if file is not None and (interval is not None or branch is not None or not cache):
        raise PolicyError("--policy says what is cached: leave out --interval, --branch and --no-cache")
    if not cache and (interval is not None or branch is not None):
        raise PolicyError("--no-cache leaves nothing for --interval and --branch: leave it out")
    if file is not None:
        if not file.is_file():
            raise PolicyError(f"there is no policy file {file}")
        policy = Policy.from_yaml(file)
    elif cache and (system.cache is not None or interval is not None or branch is not None):
        policy = Policy(cache=_cache(system.cache, interval, branch))
    else:
        policy = Policy()
    if memory_budget is None:
        return policy
    budget = Policy(memory_budget=memory_budget).memory_budget  # type: ignore[arg-type] # read as a file's
    return policy.model_copy(update={"memory_budget": budget})


def _cache(published: Cache | None, interval: int | None, branch: int | None) -> Cache:
    if branch is not None or published is None:
        cut: Any = branch or 0
    else:
        cut = published.cut
    own = published.interval if published is not None else None
    return Cache(cut=cut, interval=interval if interval is not None else own or 3)


def describe_hardware(
    device: Kind, dtype: Dtype, tflops: float | None, memory_bandwidth: float | None, link: float | None
) -> Hardware | None:
    """The machine that is planned for: what is given, the rest as is typical; None where nothing is given.

    Args:
        device: `cpu` or `cuda`.
        dtype: of weights.
        tflops: 10¹² floating-point operations a second; a multiply-add counts as two.
        memory_bandwidth: of the device's memory, 10⁹ bytes a second.
        link: to and from where weights are kept, 10⁹ bytes a second each way.
    """
    if tflops is None and memory_bandwidth is None and link is None:
        return None
    typical = CPU if device == "cpu" else GPU_FLOAT if dtype == "float32" else GPU_HALF
    machine = replace(
        typical,
        flops=typical.flops if tflops is None else tflops * 1e12,
        bytes=typical.bytes if memory_bandwidth is None else memory_bandwidth * 1e9,
    )
    if link is not None:
        return Hardware(machine, replace(PCIE, to_device=link * 1e9, from_device=link * 1e9))
    return Hardware(machine, PCIE if device == "cuda" else measured_link(torch.device("cpu")))


@dataclass(frozen=True)
class Planned:
    """A plan and what it is of.

    Attributes:
        made: the models.
        policy: that it carries out.
        device: that it is for.
        plan: of one model, or of the whole pipeline.
        seconds: that making the models and the plan took.
    """

    made: Made
    policy: Policy
    device: Kind
    plan: Plan | PipelinePlan
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        request = self.made.request
        facts: dict[str, Any] = {
            "system": self.made.system.title,
            "request": {name: value for name, value in vars(request).items() if name != "factor"},
            "device": self.device,
            "policy": self.policy.to_yaml(),
            "weight_bytes": self.made.weight_bytes,
            "seconds": self.seconds,
        }
        if isinstance(self.plan, PipelinePlan):
            left_out = dict(self.made.left_out)
            return facts | {"fits": self.plan.fits, "left_out": left_out, "pipeline": self.plan.as_dict()}
        figures = {
            "kept_bytes": self.plan.kept_bytes,
            "reuse_over_full": self.plan.reuse_flops() / self.plan.full_flops if self.plan.full_flops else 1.0,
            "flop_bound_speedup": self.plan.flop_bound_speedup(request.steps),
        }
        return facts | {"fits": True, "plan": {**self.plan.as_dict(), **figures}}


def plan_system(system: System, wish: Wish, policy: Policy, device: Kind, hardware: Hardware | None) -> Planned:
    """The plan of a system's denoiser or, where the policy is about memory, of all its models.

    Raises:
        ConfigError: a model cannot be built or called so.
        LightcacheError: as for `lightcache_fx.plan`.
    """
    begin = time.perf_counter()
    whole = policy.is_about_memory() and wish.component is None and len(system.components) > 1
    made = make(system, wish, whole=whole)
    with _calls_explained(made, wish.inputs):
        if whole:
            found: Plan | PipelinePlan = plan_pipeline(made.stages, policy, device=device, hardware=hardware)
        else:
            stage = made.stages[-1]
            found = plan(
                stage.module, stage.args, stage.kwargs, policy, method=stage.method, device=device, hardware=hardware
            )
    return Planned(made, policy, device, found, time.perf_counter() - begin)


def programs_of(system: System, wish: Wish, policy: Policy, device: Kind) -> dict[str, fx.GraphModule]:
    """The graph of a system's denoiser as it was captured, `model`, and its programs.

    Raises:
        ConfigError, LightcacheError: as `plan_system`.
    """
    made = make(system, wish, whole=False)
    stage = made.stages[-1]
    with _calls_explained(made, wish.inputs):
        captured, found = capture_and_plan(
            stage.module, stage.args, stage.kwargs, policy, method=stage.method, device=device, hardware=None
        )
        programs = build_programs(captured, found)
    graphs = {name: program.graph_module for name, program in programs.items()}
    return {"model": captured.graph_module, **graphs}


@contextmanager
def _calls_explained(made: Made, own: Sequence[str]) -> Iterator[None]:
    """Turns what a model's own code raises on a call that it does not take into one line."""
    try:
        yield
    except CaptureError as error:
        if not own:
            raise
        raise ConfigError(f"the call that --input describes cannot be captured: {error}") from error
    except LightcacheError:
        raise
    except _OF_THE_MODEL as error:
        names = ", ".join(dict.fromkeys(type(stage.module).__name__ for stage in made.stages))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{names} cannot be called so: {reason}; see --input, --height, --width, --frames") from error
