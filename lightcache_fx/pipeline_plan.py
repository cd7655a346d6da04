"""One budget for a whole pipeline: what each stage has on the device while it runs, and how long that takes.

stages = [
    Stage("encode", text_encoder, kwargs={"input_ids": ids}),
    Stage("denoise", unet, kwargs=inputs, calls=25),
    Stage("decode", vae, kwargs={"z": latents, "num_frames": 8}, calls=4),
]
print(lightcache_fx.plan_pipeline(stages, Policy(memory_budget="6GiB"), device="cuda"))
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from lightcache_fx.errors import ArgumentError, BudgetError
from lightcache_fx.handover import HandOver, last_call, plan_hand_over, saved_seconds
from lightcache_fx.hardware import Hardware
from lightcache_fx.module import capture_and_plan
from lightcache_fx.pipeline import policy_for_component
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Policy
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.units import format_bytes


@dataclass(frozen=True)
class Stage:
    """A module of a pipeline and one call of it, real, fake or on the meta device.

    Attributes:
        name: `encode`, `denoise`, `decode`, say.
        module: in evaluation mode.
        args, kwargs: of the call.
        calls: how often it is called in one generation: denoising steps, or groups of frames.
        method: which method is called; by default forward, or an autoencoder's decode.
    """

    name: str
    module: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 1
    method: str | None = None


@dataclass(frozen=True)
class PlannedStage:
    """A stage's plan, or why there is none.

    Attributes:
        stage: what was asked for.
        plan: what is done.
        refusal: why its budget cannot be kept, with the least that can be and what sets it.
        hands_over: what its last call fetches for the next stage, from the second generation on.
        saved_seconds: predicted, of what the stage before hands over to this one.
    """

    stage: Stage
    plan: Plan | None
    refusal: BudgetError | None = None
    hands_over: HandOver | None = None
    saved_seconds: float = 0.0

    @property
    def swap(self) -> SwapSchedule | None:
        """What is copied when."""
        return self.plan.swap if self.plan is not None else None

    @property
    def peak_bytes(self) -> int:
        """The most on the device; where the stage does not fit, the least that it would take."""
        if self.refusal is not None:
            return self.refusal.reached or 0
        last = self.hands_over.peak_bytes if self.hands_over is not None else 0
        return max(last, self.swap.plan.peak_bytes) if self.swap is not None else 0

    @property
    def seconds(self) -> float:
        """Predicted, from nothing on the device to the last call's end, as in a first generation."""
        return self.swap.seconds_of(self.stage.calls) if self.swap is not None else math.nan

    @property
    def whole_seconds(self) -> float:
        """Predicted with everything on the device, nothing cut and nothing copied."""
        return self.swap.whole_seconds_of(self.stage.calls) if self.swap is not None else math.nan


@dataclass(frozen=True)
class PipelinePlan:
    """The plans of all stages, which have the device in turns."""

    stages: tuple[PlannedStage, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage keeps the budget."""
        return all(stage.refusal is None for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most on the device; where something does not fit, the least that the largest stage would take."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def slowdown(self) -> float:
        """Predicted time of a first generation over that of everything on the device, less one."""
        return sum(stage.seconds for stage in self.stages) / sum(stage.whole_seconds for stage in self.stages) - 1

    @property
    def saved_seconds(self) -> float:
        """Predicted, of each further generation, because its stages hand over."""
        return sum(stage.saved_seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "slowdown": self.slowdown if self.fits else None,
            "saved_seconds": self.saved_seconds,
            "stages": {
                planned.stage.name: {
                    "model": type(planned.stage.module).__name__,
                    "calls": planned.stage.calls,
                    "peak_bytes": planned.peak_bytes,
                    "seconds": planned.seconds if planned.plan is not None else None,
                    "whole_seconds": planned.whole_seconds if planned.plan is not None else None,
                    "handed_over_bytes": planned.hands_over.num_bytes if planned.hands_over is not None else 0,
                    "refusal": str(planned.refusal) if planned.refusal is not None else None,
                    "plan": planned.plan.as_dict() if planned.plan is not None else None,
                }
                for planned in self.stages
            },
        }

    def table(self) -> Table:
        """One row a stage."""
        table = Table(title="the pipeline, one stage on the device at a time", title_justify="left")
        columns = (
            "stage",
            "calls",
            "weights",
            "on the device",
            "chunks",
            "copied there",
            "handed over",
            "predicted",
            "slower by",
        )
        for column in columns:
            table.add_column(column, justify="left" if column == "stage" else "right")
        for planned in self.stages:
            table.add_row(*_cells(planned))
        return table

    def lines(self) -> list[str]:
        """What stands below the table."""
        found = [
            f"{planned.stage.name} does not fit: {planned.refusal}"
            for planned in self.stages
            if planned.refusal is not None
        ]
        if self.fits:
            found.append(f"{format_bytes(self.peak_bytes)} at most; {self.slowdown:.1%} slower than all resident")
            if any(stage.hands_over is not None for stage in self.stages):
                saved = f"{1e3 * self.saved_seconds:.1f} ms"
                found.append(f"from the second generation on stages hand over their first weights: {saved} less")
        return found

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, force_terminal=False, highlight=False)
        console.print(self.table())
        for line in self.lines():
            console.print(line)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()


def _cells(planned: PlannedStage) -> list[str]:
    plan, swap, stage = planned.plan, planned.swap, planned.stage
    if plan is None or swap is None:
        return [stage.name, str(stage.calls), "", f"at least {format_bytes(planned.peak_bytes)}", *[""] * 5]
    regions = sum(len(chunk.regions) for chunk in plan.chunks.values())
    slower = planned.seconds / planned.whole_seconds - 1 if planned.whole_seconds else 0.0
    return [
        stage.name,
        str(stage.calls),
        format_bytes(plan.weight_bytes),
        format_bytes(planned.peak_bytes),
        str(regions or ""),
        format_bytes(int(swap.copied_bytes_of(stage.calls))),
        format_bytes(planned.hands_over.num_bytes) if planned.hands_over is not None else "",
        f"{planned.seconds:.2f} s",
        f"{slower:.1%}",
    ]


def plan_pipeline(
    stages: Sequence[Stage],
    policy: Policy,
    *,
    device: Literal["cpu", "cuda"] | None = None,
    hardware: Hardware | None = None,
) -> PipelinePlan:
    """What `transform_pipeline` would do for the modules of a pipeline, each of which has the device in its turn.

    Works from fake tensors and on the meta device, with no weights allocated.

    Args:
        stages: in the order in which they run.
        policy: with a `memory_budget` or `swap`; each stage takes of it what applies.
        device: as for `plan`.
        hardware: as for `plan`.

    Raises:
        ArgumentError: no stages, or a policy that asks for neither.
        CaptureError: as for `plan`.
    """
    if not stages:
        raise ArgumentError("plan_pipeline: expected at least one Stage, got none")
    if not policy.is_about_memory():
        raise ArgumentError(
            "plan_pipeline: expected a policy with memory_budget=... or swap=..., got one without; for one module alone"
            " use plan"
        )
    return PipelinePlan(tuple(_handing_over([_planned(stage, policy, device, hardware) for stage in stages])))


def _handing_over(stages: list[PlannedStage]) -> Iterator[PlannedStage]:
    """The stages, with what the last call of each fetches for the next one."""
    saved = 0.0
    for stage, following in zip_longest(stages, stages[1:]):
        stage, saved = replace(stage, saved_seconds=saved), 0.0
        if stage.plan is not None and stage.swap is not None and following is not None and following.swap is not None:
            prefetches = stage.plan.policy.swap is None or stage.plan.policy.swap.prefetch
            needs = following.swap.found_at_begin if prefetches else {}
            last = plan_hand_over(stage.swap, last_call(stage.plan, stage.stage.calls), needs)
            if last.sizes:
                stage = replace(stage, hands_over=last)
                saved = saved_seconds(following.swap, last.in_time)
        yield stage


def _planned(
    stage: Stage, policy: Policy, device: Literal["cpu", "cuda"] | None, hardware: Hardware | None
) -> PlannedStage:
    try:
        _, plan = capture_and_plan(
            stage.module, stage.args, stage.kwargs, policy_for_component(stage.module, policy),
            method=stage.method, device=device, hardware=hardware, takes_turns=True,
        )  # fmt: skip
    except BudgetError as error:
        return PlannedStage(stage, None, error)
    return PlannedStage(stage, plan)
