"""Plans of full-size models on a small machine: from fake tensors, so no weight is ever allocated.

python -m benchmarks.plans                   # all models, about 4 minutes and 1 GB of memory
python -m benchmarks.plans --only svd-xt
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks.common import (
    RESULTS,
    environment,
    fake_models,
    markdown_table,
    peak_process_bytes,
    print_rows,
    write_json,
)
from lightcache_fx.caching import Cut
from lightcache_fx.cli import presets
from lightcache_fx.cuts import CutChoice
from lightcache_fx.units import format_bytes

MEMORY_LIMIT = 2 * 10**9
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A full-size model, one step's inputs, and the cut and schedule that its papers use.

    Attributes:
        title: name and size, for tables.
        build: makes the model and its inputs; called where tensors are fake.
        cut, interval, steps: the published setting.
        measured: figures taken before the planner existed, on the same shapes: TFLOP of a full step, reuse
            FLOPs over full ones (a range), kept MiB. None where it says nothing.
    """

    title: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    cut: Cut
    interval: int
    steps: int
    measured: tuple[float, tuple[float, float], float] | None = None


# B batch (guidance included), F frames, C channels, H height, W width, L tokens. Latents are an eighth of the pixels.
# fmt: off


def svd_xt() -> tuple[nn.Module, Inputs]:
    """stable-video-diffusion-img2vid-xt."""
    model = diffusers.UNetSpatioTemporalConditionModel(**presets.SVD_XT_UNET)
    return model, {
        "sample": torch.randn(2, 25, 8, 72, 128),  # B F C H W
        "timestep": torch.tensor(1.0, dtype=torch.float32),
        "encoder_hidden_states": torch.randn(2, 1, 1024),
        "added_time_ids": torch.randn(2, 3),
        "return_dict": False,
    }


def animatediff() -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 1.5 with a motion adapter that has no mid block (v1.5.3); guidance 1.0, so a batch of one."""
    model = diffusers.UNetMotionModel(**{**presets.MOTION_UNET, "use_motion_mid_block": False})
    return model, {
        "sample": torch.randn(1, 4, 25, 64, 64),  # B C F H W
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(25, 77, 768),  # B*F L C
        "return_dict": False,
    }


def modelscope() -> tuple[nn.Module, Inputs]:
    """text-to-video-ms-1.7b."""
    model = diffusers.UNet3DConditionModel(**presets.MODELSCOPE_UNET)
    return model, {
        "sample": torch.randn(2, 4, 25, 32, 32),  # B C F H W
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(2, 77, 1024),
        "return_dict": False,
    }


def easyanimate() -> tuple[nn.Module, Inputs]:
    """EasyAnimate V5.1 7B text-to-video: 25 frames are 7 latent frames of 16 channels."""
    model = diffusers.EasyAnimateTransformer3DModel(**presets.EASYANIMATE_TRANSFORMER)
    return model, {
        "hidden_states": torch.randn(2, 16, 7, 64, 64),  # B C F H W
        "timestep": torch.randn(2),
        "encoder_hidden_states": torch.randn(2, 256, 3584),  # B L C
        "encoder_hidden_states_t5": None,
        "return_dict": False,
    }


MODELS = {
    "svd-xt": Model("SVD-XT, 25 x 576 x 1024, guidance", svd_xt, 0, 8, 25, (160, (0.085, 0.085), 281)),
    "animatediff": Model("AnimateDiff, 25 x 512 x 512", animatediff, 0, 2, 8, (27.8, (0.074, 0.091), 62)),
    "modelscope": Model("ModelScope, 25 x 256 x 256, guidance", modelscope, 0, 2, 25, (15.3, (0.10, 0.10), 31)),
    "easyanimate": Model(
        "EasyAnimate V5.1 7B, 25 x 512 x 512, guidance", easyanimate,
        lc.Residual(first="transformer_blocks.1", last="transformer_blocks.26"), 2, 50,
    ),
}
# fmt: on


def make_plans(model: Model, console: Console, *, auto: bool = True) -> dict[str, Any]:
    """The plan of the published setting and of the automatic cut, with what each took to make."""
    with fake_models(torch.float16):
        module, inputs = model.build()
        module.eval().requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    settings: dict[str, Cut] = {"published": model.cut} | ({"auto": lc.Auto()} if auto else {})
    result: dict[str, Any] = {"title": model.title, "weight_bytes": weights, "steps": model.steps, "plans": {}}
    for name, cut in settings.items():
        begin, begin_cpu = time.perf_counter(), time.process_time()
        policy = lc.Policy(cache=lc.Cache(cut=cut, interval=model.interval))
        try:
            plan = lc.plan(module, kwargs=inputs, policy=policy)
        except lc.errors.LightcacheError as error:
            console.print(f"{model.title}, {name}: {type(error).__name__}: {error}", markup=False)
            result["plans"][name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        console.print(f"\n{model.title}: {name}, planned in {seconds:.1f} s ({cpu:.1f} s of processor time)")
        for table in plan.tables():
            console.print(table)
        result["plans"][name] = summary(plan, model.steps) | {"seconds": seconds, "processor_seconds": cpu}
        gc.collect()
    result["peak_process_bytes"] = peak_process_bytes()
    if model.measured is not None and "error" not in result["plans"]["published"]:
        result["compared"] = compare(result["plans"]["published"], model.measured)
    return result


def summary(plan: lc.Plan, steps: int) -> dict[str, Any]:
    """A plan's figures, the automatic cut's first candidates, and what is hoisted, by operator."""
    facts = plan.as_dict()
    hoisted = sorted(plan.hoist.values, key=lambda value: -value.num_bytes)[:5]
    return {
        **facts,
        "kept_bytes": plan.kept_bytes,
        "reuse_over_full": plan.reuse_flops() / plan.full_flops if plan.full_flops else 1.0,
        "flop_bound_speedup": plan.flop_bound_speedup(steps),
        "largest_hoisted": [{"node": v.node, "bytes": v.num_bytes, "flops": v.flops} for v in hoisted],
        "candidates": [_candidate(choice) for choice in plan.candidates[:10]],
    }


def _candidate(cut: CutChoice) -> dict[str, Any]:
    return {
        "cut": cut.label,
        "kept_bytes": cut.kept_bytes,
        "reuse_flops": cut.reuse_flops,
        "weight_bytes": cut.reuse_weight_bytes,
    }


def compare(plan: Mapping[str, Any], measured: tuple[float, tuple[float, float], float]) -> dict[str, Any]:
    """A plan's figures beside the measured ones, and whether they agree: FLOPs within 3 %, bytes within 1 %.

    Hoisted FLOPs are counted with the full step here, as the measured figure has them in.
    """
    tera, (low, high), mebi = measured
    full = (plan["full"]["flops"] + plan["hoisted"]["flops"]) / 1e12
    kept = plan["kept_bytes"] / 2**20
    ratio = plan["reuse_over_full"]
    return {
        "full_tflop": {"plan": full, "measured": tera, "agrees": abs(full / tera - 1) <= 0.03},
        "reuse_over_full": {
            "plan": ratio,
            "measured": [low, high],
            "agrees": low * 0.97 - 0.0005 <= ratio <= high * 1.03 + 0.0005,
        },
        "kept_mib": {"plan": kept, "measured": mebi, "agrees": abs(kept / mebi - 1) <= 0.01},
    }


COLUMNS = ("model", "cut", "TFLOP", "reuse", "weights read", "kept", "hoisted", "bound", "planned in")


def rows_of(models: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a plan."""
    rows = []
    for model in models.values():
        for name, plan in model["plans"].items():
            if "error" in plan:
                rows.append((model["title"], f"{name}: {plan['error']}", *[""] * (len(COLUMNS) - 2)))
                continue
            hoisted, reuse = plan["hoisted"], plan["reuse"]
            rows.append(
                (
                    model["title"],
                    f"{name}: {plan['cut']['label']}",
                    f"{plan['full']['flops'] / 1e12:.2f}",
                    f"{plan['reuse_over_full']:.1%}",
                    f"{format_bytes(reuse['weight_bytes'])} of {format_bytes(model['weight_bytes'])}",
                    f"{format_bytes(plan['kept_bytes'])} in {plan['cut']['slots']}",
                    f"{format_bytes(hoisted['bytes'])} in {hoisted['values']}, {hoisted['flops'] / 1e9:.1f} GFLOP",
                    f"{plan['flop_bound_speedup']:.2f}x in {model['steps']} steps, {plan['schedule']}",
                    f"{plan['seconds']:.0f} s",
                )
            )
    return rows


def as_markdown(models: Mapping[str, Any]) -> str:
    """The table of plans, and where it differs from what was measured before."""
    lines = ["# Plans of full-size models", "", "By `python -m benchmarks.plans`: float16, fake tensors, no weights."]
    lines += ["", *markdown_table(COLUMNS, rows_of(models))]
    lines += [
        "",
        "Beside the figures measured before the planner existed:",
        "",
        "| model | figure | plan | measured | |",
    ]
    lines += ["|---|---|---|---|---|"]
    for model in models.values():
        for name, fact in model.get("compared", {}).items():
            low_high = fact["measured"] if isinstance(fact["measured"], list) else [fact["measured"]]
            measured = " to ".join(f"{value:.4g}" for value in dict.fromkeys(low_high))
            verdict = "agrees" if fact["agrees"] else "**differs**"
            lines.append(f"| {model['title']} | {name} | {fact['plan']:.4g} | {measured} | {verdict} |")
    return "\n".join([*lines, ""])


def run_alone(name: str) -> dict[str, Any]:
    """One model's plans in a process of their own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.plans", "--only", name, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=list(MODELS), action="append", help="a model; all of them by default")
    parser.add_argument("--no-auto", action="store_true", help="leave out the automatic cut")
    parser.add_argument(
        "--json", action="store_true", help="one model's result on standard output, tables on the other"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "plans.json", help="JSON file; a .md is written beside it"
    )
    options = parser.parse_args(arguments)
    names = options.only or list(MODELS)
    if options.json:
        if len(names) != 1:
            parser.error("--json takes one --only")
        console = Console(stderr=True, width=140)
        print(json.dumps(make_plans(MODELS[names[0]], console, auto=not options.no_auto)))
        return
    console = Console(width=160)
    models = {name: run_alone(name) for name in names}
    print_rows("Plans", COLUMNS, rows_of(models), console)
    write_json(options.out, {"environment": environment(), "models": models})
    options.out.with_suffix(".md").write_text(as_markdown(models), encoding="utf-8")
    over = [m["title"] for m in models.values() if m["peak_process_bytes"] > MEMORY_LIMIT]
    if over:
        raise SystemExit(f"more than 2 GB of memory: {', '.join(over)}")


if __name__ == "__main__":
    main()
