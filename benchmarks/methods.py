"""Ways to decide what is reused, beside each other: quality and measured speed on the trained small models.

    OMP_NUM_THREADS=1 python -m benchmarks.methods               # all models, about two hours on one core
    python -m benchmarks.methods svd-sprites --clips 4 --families interval calibrated
    python -m benchmarks.methods --only quality                  # which other work does not change
    python -m benchmarks.methods --only speed                    # alone on the machine

Quality is over held-out clips, against the same clip with every step in full. Calibrations and magnitudes come of other
clips. Speed is that of the whole pipeline, of all settings of a model in turns, each beside the plain one, so that what
the machine does meanwhile falls on all alike. What is done already is not done again: results/methods.json is written
behind each family and each model's speeds, and is kept where settings and code are the same.

`sd-random` is a picture U-Net shaped like Stable Diffusion's with random weights: what its pictures lose says nothing
of trained ones, but steps that decide can be held against intervals of as many FLOPs there as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console

import lightcache_fx as lc
from benchmarks.common import (
    RESULTS,
    Goal,
    environment,
    in_turns,
    markdown_table,
    pairwise_ratio,
    print_rows,
    seconds_of,
    write_json,
)
from benchmarks.figures.style import FOLDER, written
from benchmarks.schedulers import transformer_clip, unet_clip
from examples import random_pipelines
from examples.random_pipelines import Scale
from examples.small_model import sample, sample_dit
from lightcache_fx.cli.stages import denoiser_of
from lightcache_fx.quality import compare_videos

STEPS = 25
CLIPS = 32
CALIBRATED_ON = tuple(range(32, 48))
ROUNDS = 6
INTERVALS = (2, 3, 4, 5, 7)
SPEEDS = (1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.0, 2.2, 2.4, 2.7, 3.0, 3.5)
VIOLINS = (1.5, 2.0, 2.6)
"""Speeds near which distributions are shown."""


@dataclass(frozen=True)
class Model:
    """A trained model, and how each family is asked of it.

    Attributes:
        load: its pipeline.
        generate: a clip by its index: uint8 (frames, height, width, 3).
        cut: what all families but the calibrated one keep.
        first_block: what is looked at before it.
        modulated: the input of the first block, modulated by the time.
        attention: its spatial, temporal and cross attention; of pictures, self and cross attention.
        trained: whether its pictures are any.
    """

    load: Callable[[], Any]
    generate: Callable[[Any, int, int], Any]
    cut: int | lc.Residual
    first_block: str
    modulated: str
    attention: tuple[str, ...]
    trained: bool = True


PICTURES = Scale(widths=(32, 64, 64), layers=1, vae_width=16)


def picture(pipe: Any, index: int, steps: int) -> Any:
    """A picture by its seed: uint8 (1, 128, 128, 3)."""
    made = pipe(
        f"a box, {index}",
        height=128,
        width=128,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(index),
        output_type="np",
    )
    return np.clip(np.rint(255 * made.images), 0, 255).astype(np.uint8)


def load_pictures() -> Any:
    """The pipeline of `sd-random`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = random_pipelines.stable_diffusion(PICTURES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


MODELS: Mapping[str, Model] = {
    "svd-sprites": Model(
        sample.load_pipeline,
        unet_clip,
        0,
        "down_blocks.0",
        "down_blocks.0.resnets.0",
        ("**.transformer_blocks.*.attn1", "**.temporal_transformer_blocks.*.attn1", "**.attn2"),
    ),
    "latte-sprites": Model(
        sample_dit.load_pipeline,
        transformer_clip,
        lc.Residual(first="transformer_blocks.1", last="transformer_blocks.5"),
        "transformer_blocks.0",
        "transformer_blocks.0.norm1",
        ("transformer_blocks.*.attn1", "temporal_transformer_blocks.*.attn1", "transformer_blocks.*.attn2"),
    ),
    "sd-random": Model(
        load_pictures, picture, 0, "down_blocks.0", "down_blocks.0.resnets.0", ("**.attn1", "**.attn2"), trained=False
    ),
}
THRESHOLDS = {
    "first block": {
        "svd-sprites": (0.05, 0.1, 0.2, 0.4),
        "latte-sprites": (0.1, 0.2, 0.35, 0.6),
        "sd-random": (0.15, 0.2, 0.4, 0.8),
    },
    "summed changes": {
        "svd-sprites": (0.05, 0.1, 0.2, 0.4),
        "latte-sprites": (0.05, 0.1, 0.2, 0.4),
        "sd-random": (0.15, 0.2, 0.4, 0.8),
    },
    "magnitudes": dict.fromkeys(("svd-sprites", "latte-sprites", "sd-random"), (0.02, 0.05, 0.1, 0.2)),
}
BROADCASTS = ((2, 2, 2), (2, 4, 6), (3, 5, 7), (6, 6, 6))
"""Intervals of the three kinds of attention; the second are those that PAB was published with (Zhao et al. 2024)."""
FAMILIES = ("interval", "taylor 1", "first block", "summed changes", "magnitudes", "attention", "calibrated")


def ways(name: str, family: str, pipe: Any, log: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """The settings of a family, by what tells them apart."""
    model = MODELS[name]
    match family:
        case "interval" | "taylor 1":
            order = 0 if family == "interval" else int(family[-1])
            for interval in INTERVALS if not order else INTERVALS[:4]:
                yield f"{interval}", lc.Cache(cut=model.cut, interval=interval, order=order)
        case "first block" | "summed changes":
            sums = family == "summed changes"
            for threshold in THRESHOLDS[family][name]:
                rule = lc.Adaptive(
                    threshold=threshold,
                    indicator=model.modulated if sums else model.first_block,
                    of="output" if sums else None,
                    since="step" if sums else "full",
                    max_reuse=7,
                )
                yield f"{threshold:g}", lc.Cache(cut=model.cut, adaptive=rule)
        case "magnitudes":
            ratios = magnitude_ratios(model, pipe)
            for threshold in THRESHOLDS[family][name]:
                magnitude = lc.Magnitude(ratios=ratios, threshold=threshold, max_reuse=7, retention=0.1)
                yield f"{threshold:g}", lc.Cache(cut=model.cut, magnitude=magnitude, num_steps=STEPS)
        case "attention":
            for intervals in BROADCASTS:
                kinds = zip(model.attention, intervals, strict=False)
                yield (
                    ", ".join(map(str, intervals)),
                    [lc.Cache(cut=cut, interval=n, first=2, last=2, num_steps=STEPS) for cut, n in kinds],
                )
        case _:
            found = calibrated(name, pipe, log)
            best = [point for point in (best_of(found, speed) for speed in SPEEDS) if point is not None]
            points = {(*point.full_steps, str(point.cut), point.order): point for point in best}
            for point in points.values():
                steps = " ".join(map(str, point.full_steps))
                yield f"{_kept(point.cut)}, order {point.order}, full {steps}", point.cache(found.num_steps)


def calibrated(name: str, pipe: Any, log: Callable[[str], None]) -> lc.Calibration:
    """The calibration of a model, made now."""
    generate = MODELS[name].generate
    inputs = [lambda pipe, index=index: generate(pipe, index, STEPS) for index in CALIBRATED_ON]
    return lc.calibrate(pipe, inputs, points=12, progress=log)


def _kept(cut: Any) -> str:
    """A cut in few words."""
    return f"{cut.first} .. {cut.last}" if isinstance(cut, lc.Residual) else f"branch {cut}"


def best_of(calibration: lc.Calibration, speed: float) -> lc.Point | None:
    """The best point of a speed; None where none is so fast."""
    fast = any(point.speedup >= speed for point in calibration.points)
    return calibration.best(speedup=speed) if fast else None


def magnitude_ratios(model: Model, pipe: Any) -> list[float]:
    """How the norm of what is kept, token by token, changes from step to step (MagCache's calibration)."""
    fast = lc.transform_pipeline(pipe, lc.Policy(cache=lc.Cache(cut=model.cut, interval=1)))
    with lc.record_kept(denoiser_of(fast)) as recording:
        model.generate(fast, CALIBRATED_ON[0], STEPS)
    values = recording.at(recording.names[0])
    dim = 1 if values[0].ndim == 4 else -1  # channels of a U-Net come second
    norms = [value.float().norm(dim=dim) for value in values]
    return [1.0, *(float((now / before.clamp_min(1e-8)).mean()) for before, now in pairwise(norms))]


def measure_quality(
    name: str, family: str, pipe: Any, plain: Sequence[Any], log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """A family against clips of full steps: its rows, by key."""
    model, clips, found = MODELS[name], len(plain), {}
    for setting, cache in ways(name, family, pipe, log):
        key, policy = f"{name}, {family}, {setting}", lc.Policy(cache=cache)
        fast = lc.transform_pipeline(pipe, policy)
        videos = [model.generate(fast, index, STEPS) for index in range(clips)]
        scores = [compare_videos(*pair, measures=("psnr", "ssim")) for pair in zip(plain, videos, strict=True)]
        report = lc.inspect(denoiser_of(fast))
        plain_flops = clips * STEPS * _branches(report) * report.plan.full_flops
        found[key] = {
            "model": name,
            "family": family,
            "setting": setting,
            "policy": policy.to_yaml(),
            "full_steps": report.counts["full"] / clips / _branches(report),
            "flops": sum(report.programs[ran].flops * n for ran, n in report.counts.items()) / plain_flops,
            "psnr": [None if score.identical else float(score.psnr.mean) for score in scores],
            "ssim": [1.0 if score.identical else float(score.ssim.mean) for score in scores],
        }
        log(f"{key}: {found[key]['flops']:.0%} of the FLOPs, {median_psnr(found[key]):.1f} dB")
    return found


def measure_speed(
    name: str, pipe: Any, rows: Mapping[str, Mapping[str, Any]], rounds: int, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """How much faster than plain each row of a model is: all in turns, each beside a plain clip."""
    generate = MODELS[name].generate
    fast = {key: lc.transform_pipeline(pipe, lc.Policy.from_yaml(row["policy"])) for key, row in rows.items()}
    for one in (pipe, *fast.values()):  # captures, and warms
        generate(one, 0, STEPS)
    pairs: dict[str, list[tuple[float, float]]] = {key: [] for key in rows}
    for index, key in in_turns(list(rows), rounds):
        plain, other = (seconds_of(lambda of=of, i=index: generate(of, i, STEPS)) for of in (pipe, fast[key]))
        pairs[key].append((plain, other))
    found = {key: pairwise_ratio(*zip(*of, strict=True)) for key, of in pairs.items()}
    for key, speed in found.items():
        log(f"{key}: {speed.format('{:.2f}')}x, {median_psnr(rows[key]):.1f} dB")
    return {key: speed.as_dict() for key, speed in found.items()}


def _branches(report: lc.Report) -> int:
    return 1 + max(run.branch for run in report.timeline)


def median_psnr(row: Mapping[str, Any]) -> float:
    """Over clips; one that is the plain clip counts as infinitely good."""
    return float(np.median([np.inf if value is None else value for value in row["psnr"]]))


def goals(rows: Mapping[str, Any]) -> list[Goal]:
    """What the curves, read between their points, are to show.

    Of trained models the calibrated one is on or above each other of 1.3 to 3 times the speed. Of U-Nets, steps that
    decide lose less than intervals of as many FLOPs.
    """
    found = []
    timed = [row for row in rows.values() if "speedup" in row]
    for name, model in MODELS.items():
        curve = sorted((r["speedup"]["median"], median_psnr(r)) for r in timed if is_of(r, name, "calibrated"))
        for family in FAMILIES[:-1] if model.trained else ():
            leads = [
                float(np.interp(x, *zip(*curve, strict=True))) - median_psnr(row)
                for row in timed
                if is_of(row, name, family) and curve and 1.3 <= (x := row["speedup"]["median"]) <= min(3, curve[-1][0])
            ]
            if leads:
                found.append(Goal(f"{name}: calibrated over {family}, least lead in dB", min(leads), "at least", 0))
        if isinstance(model.cut, int):
            found += _goals_of_deciding(rows, name)
    return found


def _goals_of_deciding(rows: Mapping[str, Any], name: str) -> Iterator[Goal]:
    """By how much steps that decide lead intervals of as many FLOPs, in dB, at the least and in the middle."""
    curve = sorted((r["flops"], median_psnr(r)) for r in rows.values() if is_of(r, name, "interval"))
    for family in ("first block", "summed changes"):
        leads = [
            median_psnr(row) - float(np.interp(row["flops"], *zip(*curve, strict=True)))
            for row in rows.values()
            if is_of(row, name, family) and curve and curve[0][0] <= row["flops"] <= curve[-1][0]
        ]
        if leads:
            label = f"{name}: {family} over interval at equal FLOPs"
            yield Goal(f"{label}, least lead in dB", min(leads), "at least", 0)
            yield Goal(f"{label}, median lead in dB", float(np.median(leads)), "at least", 0)


def is_of(row: Mapping[str, Any], name: str, family: str) -> bool:
    """Whether a row is of a model and a family."""
    return bool(row["model"] == name and row["family"] == family)


# What is printed and drawn --------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Any], name: str) -> tuple[Sequence[str], list[list[str]]]:
    """The columns and rows of a model."""
    cells = [
        [
            row["family"],
            row["setting"],
            "{median:.2f}x ({min:.2f} to {max:.2f})".format(**row["speedup"]) if "speedup" in row else "",
            f"{row['full_steps']:.1f}",
            f"{row['flops']:.0%}",
            f"{median_psnr(row):.1f}",
            f"{np.median(row['ssim']):.4f}",
        ]
        for row in rows.values()
        if row["model"] == name
    ]
    columns = ("family", "setting", "faster than plain", f"full of {STEPS} steps", "FLOPs of plain", "PSNR, dB", "SSIM")
    return columns, cells


def draw(rows: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Above PSNR and SSIM over speed, below the distributions near three speeds; a row of pictures for each model."""
    timed = [row for row in rows.values() if "speedup" in row]
    names = [name for name in MODELS if any(row["model"] == name for row in timed)]
    if not names:
        return
    with written("methods", folder, figsize=(13, 4.4 * len(names))) as figure:
        panels = figure.subplots(len(names), 3, squeeze=False)
        for line, name in zip(panels, names, strict=True):
            of_model = [row for row in timed if row["model"] == name]
            _curves(line[0], of_model, median_psnr, f"{name}: PSNR, dB")
            _curves(line[1], of_model, lambda row: float(np.median(row["ssim"])), f"{name}: SSIM")
            _violins(line[2], of_model, f"{name}: PSNR by clip, dB")
        panels[-1][0].legend(frameon=False, fontsize=8)


def _curves(
    axes: Axes, rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], title: str
) -> None:
    for number, family in enumerate(FAMILIES):
        points = sorted((row["speedup"]["median"], value(row)) for row in rows if row["family"] == family)
        if points:
            wide = 2.4 if family == "calibrated" else 1.2
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=wide, color=f"C{number}", label=family)
    axes.set(title=title, xlabel="times as fast as plain, measured")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e7ec", linewidth=0.8)


def _violins(axes: Axes, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    for number, family in enumerate(FAMILIES):
        mine = [row for row in rows if row["family"] == family]
        for place, speed in enumerate(VIOLINS):
            near = min(mine, key=lambda row: abs(row["speedup"]["median"] - speed), default=None)
            if near is None or abs(near["speedup"]["median"] - speed) > 0.3:
                continue
            values = [value for value in near["psnr"] if value is not None]
            parts = axes.violinplot(
                [values], [place + (number - 3) * 0.12], widths=0.11, showextrema=False, showmedians=True
            )
            for body in parts["bodies"]:
                body.set(facecolor=f"C{number}", alpha=0.7)
            parts["cmedians"].set(color="black", linewidth=0.8)
    axes.set_xticks(range(len(VIOLINS)), [f"about {speed:g}x" for speed in VIOLINS])
    axes.set(title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)


def _digest() -> str:
    """Of the code that results depend on."""
    folders = (Path(lc.__file__).parent, Path(__file__).parents[1] / "passes")
    files = sorted(path for folder in folders for path in folder.rglob("*.py") if "cli" not in path.parts)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"rows": {}, "measured": {}, "timed": {}} | result


@contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    """The results so far, to be changed; written at the end, at once, so that models can be measured side by side."""
    result = read(path)
    yield result
    result["environment"] = environment()
    result["goals"] = {goal.name: goal.as_dict() for goal in goals(result["rows"])}
    write_json(path, result)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of speeds")
    parser.add_argument("--only", choices=("quality", "speed"), help="measure this; speeds want the machine alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="draw anew, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    parser.add_argument("--pictures", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, log = Console(width=150), Console(stderr=True).print
    code = _digest()
    names = options.models or list(MODELS)
    for name in [] if options.draw else names:
        pipe = MODELS[name].load()
        if options.only != "speed":
            by = {"code": code, "clips": options.clips, "calibrated_on": len(CALIBRATED_ON), "steps": STEPS}
            plain: list[Any] = []
            for family in options.families:
                if read(options.out)["measured"].get(f"{name}, {family}") == by:
                    continue
                plain = plain or [MODELS[name].generate(pipe, index, STEPS) for index in range(options.clips)]
                found = measure_quality(name, family, pipe, plain, log)
                with changed(options.out) as result:
                    others = {key: row for key, row in result["rows"].items() if not is_of(row, name, family)}
                    result["rows"] = others | found
                    result["measured"][f"{name}, {family}"] = by
        if options.only != "quality":
            result = read(options.out)
            rows = {key: row for key, row in result["rows"].items() if row["model"] == name}
            by = {"code": code, "rounds": options.rounds, "steps": STEPS}
            if result["timed"].get(name) == by and all("speedup" in row for row in rows.values()):
                continue
            speeds = measure_speed(name, pipe, rows, options.rounds, log)
            with changed(options.out) as result:
                result["timed"][name] = by
                for key, speed in speeds.items():
                    result["rows"][key]["speedup"] = speed
    result = read(options.out)
    page = ["# Methods", ""]
    for name in MODELS:
        columns, cells = table(result["rows"], name)
        if cells:
            print_rows(name, columns, cells, console)
            page += [f"## {name}", "", *markdown_table(columns, cells), ""]
    reached = [[goal.name, f"{goal.value:.2f}", goal.format()] for goal in goals(result["rows"])]
    if reached:
        page += ["## Goals", "", *markdown_table(("", "value", "goal"), reached), ""]
        print_rows("goals", ("", "value", "goal"), reached, console)
    options.out.with_suffix(".md").write_text("\n".join(page), encoding="utf-8")
    draw(result["rows"], options.pictures)


if __name__ == "__main__":
    main()
