"""Memory plans of full-size models, float16, from fake tensors: the activation peak today, and cut to a goal.

    python -m benchmarks.memory_plans                # all models, about 7 minutes and 1 GB of memory
    python -m benchmarks.memory_plans --only svd-vae-8     # the others are kept as they are in the results file

Peaks are predicted for a CUDA device. A goal that cannot be reached is reported with the least that is.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks import plans
from benchmarks.common import RESULTS, environment, fake_models, markdown_table, write_json
from lightcache_fx.cli import presets

Inputs = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Goal:
    """A model, and the budget that it should keep.

    Attributes:
        title: name and size.
        build: makes the module and its inputs, where tensors are fake.
        goal: GiB of activations; a share of today's where `of_today`.
        overhead: predicted time that may be added, as a share; None where nothing is said.
    """

    title: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    goal: float
    of_today: bool = False
    overhead: float | None = None


def _image_vae(images: int, size: int) -> tuple[nn.Module, Inputs]:
    vae = diffusers.AutoencoderKL(**presets.IMAGE_VAE)
    return vae, {"z": torch.randn(images, 4, size // 8, size // 8)}


def _video_vae(frames: int) -> tuple[nn.Module, Inputs]:
    vae = diffusers.AutoencoderKLTemporalDecoder(**presets.VIDEO_VAE)
    return vae, {"z": torch.randn(frames, 4, 72, 128), "num_frames": frames}


GOALS = {
    "svd-xt": Goal("SVD-XT U-Net, 25 x 576 x 1024, guidance", plans.svd_xt, 1.9, overhead=0.05),
    "animatediff": Goal("AnimateDiff U-Net, 25 x 512 x 512", plans.animatediff, 0.42),
    "modelscope": Goal("ModelScope U-Net, 25 x 256 x 256, guidance", plans.modelscope, 0.25),
    "easyanimate": Goal("EasyAnimate 7 B, 25 x 512 x 512, guidance", plans.easyanimate, 0.5, of_today=True),
    "sd-vae-25": Goal("SD VAE decode, 25 frames of 512 x 512", lambda: _image_vae(25, 512), 0.40),
    "sd-vae-25-strips": Goal("SD VAE decode, 25 frames, in strips", lambda: _image_vae(25, 512), 0.15),
    "sd-vae-2048": Goal("SD VAE decode, one 2048 x 2048 image", lambda: _image_vae(1, 2048), 0.25, of_today=True),
    "svd-vae-8": Goal("SVD VAE decode, 8 frames of 576 x 1024", lambda: _video_vae(8), 3.8),
    "svd-vae-25": Goal("SVD VAE decode, 25 frames of 576 x 1024", lambda: _video_vae(25), 12),
}


def make_plan(goal: Goal) -> dict[str, Any]:
    """Today's peak, and the plan for the goal or the reason why there is none."""
    with fake_models(torch.float16):
        module, inputs = goal.build()
        module.eval().requires_grad_(False)
    begin = time.perf_counter()
    no_cut = lc.plan(module, kwargs=inputs, policy=lc.Policy(chunk=lc.Chunk(budget=2**50)), device="cuda")
    today = no_cut.chunks["full"].peak_before
    budget = int(goal.goal * (today if goal.of_today else GIB))
    result: dict[str, Any] = {"title": goal.title, "today": today, "goal": budget}
    try:
        plan = lc.plan(module, kwargs=inputs, policy=lc.Policy(chunk=lc.Chunk(budget=budget)), device="cuda")
    except lc.errors.BudgetError as error:
        result |= {"reached": error.reached, "met": False, "error": str(error)}
    else:
        facts = plan.as_dict()["chunks"]["full"]
        met = goal.overhead is None or facts["overhead"] <= goal.overhead
        result |= {"reached": facts["peak_after"], "met": met, **facts}
    return result | {"seconds": time.perf_counter() - begin}


def rows_of(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table, cell by cell."""
    return [
        [
            result["title"],
            f"{result['today'] / GIB:.2f}",
            f"{result['goal'] / GIB:.2f}",
            f"{result['reached'] / GIB:.2f}",
            f"{result['overhead']:.1%}" if "overhead" in result else "",
            "met" if result["met"] else "not met",
            f"{result['seconds']:.0f} s",
        ]
        for result in results.values()
    ]


COLUMNS = ("model", "today, GiB", "goal", "planned", "predicted overhead", "", "planned in")


def main() -> None:
    """Make the plans, print them, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(GOALS), action="append")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_plans.json")
    options = parser.parse_args()
    console = Console()
    kept = json.loads(options.out.read_text())["models"] if options.only and options.out.exists() else {}
    results: dict[str, dict[str, Any]] = {name: kept[name] for name in GOALS if name in kept}
    for name in options.only or GOALS:
        results[name] = make_plan(GOALS[name])
        console.print(rows_of({name: results[name]})[0], markup=False)
        gc.collect()
        write_json(options.out, {"environment": environment(), "models": results})
    options.out.with_suffix(".md").write_text(
        "\n".join(markdown_table(COLUMNS, rows_of(results))) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
