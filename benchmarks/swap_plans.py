"""Swap plans of full-size pipelines, float16, from fake tensors: how much slower they get within a memory budget.

    python -m benchmarks.swap_plans                       # all, half an hour and 2 GB of memory
    python -m benchmarks.swap_plans --only svd-xt-4       # the others are kept as they are in the results file

Everything is predicted, for a card that does 60 TFLOP/s, reads and writes 1 TB/s and copies 25 GB/s each way, and told
against everything resident and nothing cut. Beside it, for the denoiser within the same budget: what it would be if
nothing were fetched for the next step (no wrap-around), if reuse steps fetched the weights that they skip (no reuse
awareness), and both.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from rich.console import Console

import lightcache_fx as lc
from benchmarks import plans
from benchmarks.common import RESULTS, environment, fake_models, markdown_table, print_rows, write_json
from lightcache_fx.cli import presets
from lightcache_fx.costs import Machine
from lightcache_fx.hardware import Hardware
from lightcache_fx.swap_planner import plan_swaps
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.units import format_bytes
from lightcache_fx.workload import Link, Op, Step, Workload

CARD = Hardware(Machine(flops=6e13, bytes=1e12, launch=4e-6, run=64), Link(to_device=2.5e10, from_device=2.5e10))
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """A pipeline within a budget.

    Attributes:
        title: what it is.
        stages: makes its modules and their calls, with fake tensors.
        cache: what is kept between steps.
        gib: of the budget; None for a third of the denoiser's weights.
        goal: the most that it may be slower by, as a share; None where nothing is said.
    """

    title: str
    stages: Callable[[], list[lc.Stage]]
    cache: lc.Cache
    gib: float | None
    goal: float | None


def svd_xt() -> list[lc.Stage]:
    """Stable Video Diffusion img2vid-XT: 25 frames of 576 x 1024, 25 steps, frames decoded by eight."""
    vision = transformers.CLIPVisionConfig(**presets.CLIP_VISION_H)
    vae = diffusers.AutoencoderKLTemporalDecoder(**presets.VIDEO_VAE)
    unet, inputs = plans.svd_xt()
    return [
        lc.Stage("image encoder", transformers.CLIPVisionModelWithProjection(vision), (torch.randn(1, 3, 224, 224),)),
        lc.Stage("encode", vae, (torch.randn(1, 3, 576, 1024),), method="encode"),
        lc.Stage("denoise", unet, kwargs=inputs, calls=25),
        lc.Stage("decode", vae, kwargs={"z": torch.randn(8, 4, 72, 128), "num_frames": 8}, calls=4),
    ]


def easyanimate() -> list[lc.Stage]:
    """The transformer of EasyAnimate V5.1 7B: 25 frames of 512 x 512 with guidance, 50 steps."""
    model, inputs = plans.easyanimate()
    return [lc.Stage("denoise", model, kwargs=inputs, calls=50)]


def wan() -> list[lc.Stage]:
    """The transformer of Wan 2.1 14B: 33 frames of 480 x 832, one of the two calls that guidance makes, 50 steps."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 9, 60, 104),  # B C F H W
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": torch.randn(1, 512, 4096),  # B L C
        "return_dict": False,
    }
    return [lc.Stage("denoise", model, kwargs=inputs, calls=50)]


_BRANCH_0 = lc.Cache(cut=0, interval=8)
_BLOCKS = lc.Cache(cut=lc.Residual(first="transformer_blocks.1", last="transformer_blocks.26"), interval=2)
_WAN_BLOCKS = lc.Cache(cut=lc.Residual(first="blocks.1", last="blocks.38"), interval=2)
SETTINGS = {
    "svd-xt-12": Setting("SVD-XT pipeline, interval 8", svd_xt, _BRANCH_0, 12, None),
    "svd-xt-8": Setting("SVD-XT pipeline, interval 8", svd_xt, _BRANCH_0, 8, None),
    "svd-xt-6": Setting("SVD-XT pipeline, interval 8", svd_xt, _BRANCH_0, 6, 0.03),
    "svd-xt-4": Setting("SVD-XT pipeline, interval 8", svd_xt, _BRANCH_0, 4, 0.10),
    "easyanimate": Setting("EasyAnimate 7 B, interval 2", easyanimate, _BLOCKS, None, 0.05),
    "wan": Setting("Wan 14 B, interval 2", wan, _WAN_BLOCKS, None, 0.05),
}


def without_reuse_awareness(workload: Workload) -> Workload:
    """The same, but each step fetches every weight, those of skipped layers too, as hooks on layers do."""
    weights = [name for name, movable in workload.movables.items() if movable.kind == "weight"]
    steps = []
    for step in workload.steps:
        read = {name for op in step.ops for name in op.reads}
        skipped = (Op(f"skipped {name}", 0.0, 0, (name,)) for name in weights if name not in read)
        steps.append(Step(step.program, (*step.ops[:1], *skipped, *step.ops[1:])))
    return Workload(tuple(steps), workload.movables, workload.cyclic)


def compared(swap: SwapSchedule) -> dict[str, float]:
    """How much slower the denoiser's steady period is without what this planner adds."""
    link, budget, plain = swap.hardware.link, swap.plan.budget, without_reuse_awareness(swap.workload)
    return {
        "planned": swap.plan.slowdown,
        "no wrap-around": plan_swaps(swap.workload, budget, link, wrap=False).slowdown,
        "no reuse awareness": plan_swaps(plain, budget, link).slowdown,
        "neither": plan_swaps(plain, budget, link, wrap=False).slowdown,
    }


def make_plan(setting: Setting) -> dict[str, Any]:
    """The plan within the budget, and what it is compared with."""
    with fake_models(torch.float16):
        stages = setting.stages()
        for stage in stages:
            stage.module.eval().requires_grad_(False)
    weights = {stage.name: sum(w.nbytes for w in stage.module.parameters()) for stage in stages}
    budget = weights["denoise"] // 3 if setting.gib is None else int(setting.gib * GIB)
    begin = time.perf_counter()
    policy = lc.Policy(cache=setting.cache, memory_budget=budget)
    plan = lc.plan_pipeline(stages, policy, device="cuda", hardware=CARD)
    seconds = time.perf_counter() - begin
    result: dict[str, Any] = {"title": setting.title, "budget": budget, "goal": setting.goal, "seconds": seconds}
    result |= {"weights": weights, **_without_programs(plan.as_dict()), "text": str(plan)}
    if plan.fits:
        denoiser = next(planned for planned in plan.stages if planned.stage.name == "denoise")
        assert denoiser.swap is not None
        result["compared"] = compared(denoiser.swap)
        result["met"] = setting.goal is None or plan.slowdown <= setting.goal
    else:
        result["met"] = False
    return result


def _without_programs(facts: dict[str, Any]) -> dict[str, Any]:
    """Without lists of regions, which are long."""
    for stage in facts["stages"].values():
        for chunk in (stage["plan"] or {"chunks": {}})["chunks"].values():
            chunk["regions"] = len(chunk["regions"])
    return facts


COLUMNS = (
    "pipeline", "budget", "weights of the denoiser", "on the device", "slower by", "goal", "",
    "denoiser's waiting", "no wrap-around", "no reuse awareness", "neither", "planned in",
)  # fmt: skip


def rows_of(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table, cell by cell."""
    rows = []
    for result in results.values():
        goal = "" if result["goal"] is None else f"{result['goal']:.0%}"
        verdict = "" if result["goal"] is None else "met" if result["met"] else "not met"
        shares = [f"{share:.2%}" for share in result["compared"].values()] if result["fits"] else [""] * 4
        slower = f"{result['slowdown']:.2%}" if result["fits"] else "does not fit"
        rows.append(
            [
                result["title"], format_bytes(result["budget"]), format_bytes(result["weights"]["denoise"]),
                format_bytes(result["peak_bytes"]), slower, goal, verdict, *shares, f"{result['seconds']:.0f} s",
            ]
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the plans, print them, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SETTINGS), action="append")
    parser.add_argument("--out", type=Path, default=RESULTS / "swap_plans.json")
    options = parser.parse_args(arguments)
    console = Console(width=200)
    kept = json.loads(options.out.read_text())["pipelines"] if options.only and options.out.exists() else {}
    results: dict[str, dict[str, Any]] = {name: kept[name] for name in SETTINGS if name in kept}
    for name in options.only or SETTINGS:
        results[name] = make_plan(SETTINGS[name])
        console.print(results[name]["text"], markup=False)
        gc.collect()
        ordered = {key: results[key] for key in SETTINGS if key in results}
        write_json(options.out, {"environment": environment(), "pipelines": ordered})
        table = markdown_table(COLUMNS, rows_of(ordered))
        options.out.with_suffix(".md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print_rows("Swap plans", COLUMNS, rows_of(results), console)


if __name__ == "__main__":
    main()
