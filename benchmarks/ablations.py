"""What each part of `Policy.lightcache` does: alone and together, by interval, branch, scheduler and number of frames.

    python -m benchmarks.ablations                    # all, about an hour on two cores
    python -m benchmarks.ablations parts frames

`parts` and `frames` generate with the small system of Stable Video Diffusion's shape (random weights: time and memory
alone), `settings` and `schedulers` with the trained small models (quality). Ways take turns; ratios are to the plain
generation of the same round. Results go to results/ablations.json and .md, and the picture to docs/figures/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console

import lightcache_fx as lc
from benchmarks.common import (
    CPU,
    RESULTS,
    Spread,
    environment,
    in_turns,
    markdown_table,
    pairwise_ratio,
    print_rows,
    write_json,
)
from benchmarks.figures.style import FOLDER, written
from benchmarks.schedulers import SCHEDULERS, measure_schedulers
from benchmarks.systems import BENCH
from examples.random_pipelines import Scale
from examples.small_model import sample
from examples.stable_video_diffusion import SYSTEM
from examples.systems import Video
from lightcache_fx.cli.stages import STAGES, Stopwatch
from lightcache_fx.quality import compare_videos
from lightcache_fx.units import format_bytes

PARTS: Mapping[str, Mapping[str, bool] | None] = {
    "plain": None,
    "cache": {"swap": False, "chunk": False, "slice": False},
    "cache, swap": {"swap": True, "chunk": False, "slice": False},
    "cache, chunk": {"swap": False, "chunk": True, "slice": False},
    "cache, slice": {"swap": False, "chunk": False, "slice": True},
    "cache, swap, chunk, slice": {"swap": True, "chunk": True, "slice": True},
}
VIDEO = Video(128, 128, 8, 25)
FRAMES = (4, 8, 16, 32)
INTERVALS = tuple(range(1, 9))
BRANCHES = (0, 1, 2, 3)
SCHEDULED_INTERVALS = (2, 3)
KINDS = ("parts", "frames", "settings", "schedulers")
LEAST = "30%"
"""Of a step's activations: less than `Policy.lightcache` keeps to, for videos that are too long for it."""


@dataclass
class Way:
    """A pipeline of its own that has generated twice, which captures and plans.

    Attributes:
        chunk: share of a step's activations that chunks keep to, if another than the policy's.
        seconds: of each measured generation.
        peaks: by stage, weights that never leave included.
    """

    choice: Mapping[str, bool] | None
    scale: Scale
    video: Video
    chunk: str | None = None
    seconds: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pipe = SYSTEM.build(self.scale)
        pipe.set_progress_bar_config(disable=True)
        self.watch = Stopwatch(pipe, CPU)
        if self.choice is not None:
            policy = SYSTEM.policy(pipe, **self.choice)
            if self.chunk is not None:
                policy = policy.model_copy(update={"chunk": lc.Chunk(budget=self.chunk)})
            self.watch.pipe = lc.transform_pipeline(pipe, policy)
        for _ in range(2):
            self._run()

    def _run(self) -> Any:
        return self.watch.run(lambda: SYSTEM.generate(self.watch.pipe, self.video))

    def measure(self) -> None:
        """Generate once against the clock."""
        self._run()
        self.seconds.append(sum(self.watch.seconds.values()))

    def measure_peaks(self) -> None:
        """Generate once more, allocation by allocation."""
        self.peaks = self.watch.peaks(lambda: SYSTEM.generate(self.watch.pipe, self.video))

    def close(self) -> None:
        """Bring weights that are elsewhere back, so that no file is left."""
        if self.choice is not None:
            lc.restore(self.watch.pipe)


def in_ways(choices: Mapping[str, Mapping[str, bool] | None], video: Video, rounds: int) -> dict[str, Any]:
    """Seconds over those of the plain generation, and peaks, of each way."""
    with contextlib.ExitStack() as stack:
        ways = {}
        for name, choice in choices.items():
            ways[name] = Way(choice, BENCH, video)
            stack.callback(ways[name].close)
        for _, name in in_turns(tuple(ways), rounds):
            ways[name].measure()
        for way in ways.values():
            way.measure_peaks()
    plain = ways["plain"]
    return {
        name: {
            "seconds": Spread.of(way.seconds).as_dict(),
            "speedup": pairwise_ratio(plain.seconds, way.seconds).as_dict(),
            "peak_bytes": {stage: way.peaks[stage] for stage in STAGES},
        }
        for name, way in ways.items()
    }


def measure_parts(options: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """Each part alone on top of the cache, and all of them."""
    found = in_ways(PARTS, replace(VIDEO, steps=options.steps), options.rounds)
    log("parts: " + ", ".join(f"{name} {way['speedup']['median']:.2f}x" for name, way in found.items()))
    return found


def measure_frames(options: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """Peaks of videos of more and more frames, plain and with everything on; a few steps show a step's peak."""
    ways: Mapping[str, tuple[Mapping[str, bool] | None, str | None]] = {
        "plain": (None, None),
        "lightcache": ({}, None),
        f"lightcache, chunks of {LEAST}": ({}, LEAST),
    }
    found: dict[str, Any] = {name: {} for name in ways}
    for frames in options.frames:
        for name, (choice, chunk) in ways.items():
            way = Way(choice, BENCH, replace(VIDEO, frames=frames, steps=3), chunk)
            way.measure_peaks()
            way.close()
            found[name][str(frames)] = way.peaks
        peaks = (format_bytes(one[str(frames)]["denoise"]) for one in found.values())
        log(f"{frames} frames: denoising {', '.join(peaks)}")
    return found


def measure_settings(options: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """Quality of the trained small model by interval and branch, with what FLOPs allow."""
    pipe = sample.load_pipeline()
    specs = [sample.heldout_clip(index) for index in range(options.clips)]

    def videos(of: Any) -> list[Any]:
        return [
            sample.generate(of, spec, steps=options.steps, max_guidance_scale=1.5, seed=seed)
            for seed, spec in enumerate(specs)
        ]

    plain, found = videos(pipe), []
    for branch in options.branches:
        for interval in options.intervals:
            fast = lc.transform_pipeline(pipe, lc.Policy.deepcache(interval=interval, branch=branch))
            scores = [
                compare_videos(one.transpose(0, 2, 3, 1), other.transpose(0, 2, 3, 1), measures=("psnr",))
                for one, other in zip(plain, videos(fast), strict=True)
            ]
            found.append(
                {
                    "branch": branch,
                    "interval": interval,
                    "flop_speedup": lc.inspect(fast.unet).plan.flop_bound_speedup(options.steps),
                    "identical": all(score.identical for score in scores),
                    "psnr": None
                    if all(score.identical for score in scores)
                    else float(np.mean([score.psnr.mean for score in scores if not score.identical])),
                }
            )
        log(f"branch {branch}: {', '.join(_decibels(row) for row in found if row['branch'] == branch)}")
    return {"clips": options.clips, "rows": found}


def _decibels(row: Mapping[str, Any]) -> str:
    return "same" if row["identical"] else f"{row['psnr']:.1f}"


# What is printed and drawn --------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """By title: the columns and rows of each table that there are results for."""
    found: dict[str, tuple[Sequence[str], list[list[str]]]] = {}
    if "parts" in result:
        rows = [
            [
                name,
                f"{way['speedup']['median']:.2f}x ({way['speedup']['min']:.2f} to {way['speedup']['max']:.2f})",
                format_bytes(max(way["peak_bytes"].values())),
                *(format_bytes(way["peak_bytes"][stage]) for stage in STAGES),
            ]
            for name, way in result["parts"].items()
        ]
        found["Parts"] = (("", "faster than plain", "peak", *STAGES), rows)
    if "frames" in result:
        ways = result["frames"]
        numbers = list(ways["plain"])
        columns = [f"{name}: {what}" for name in ways for what in ("denoising", "whole")]
        rows = [[n, *(format_bytes(size) for way in ways.values() for size in _sizes(way[n]))] for n in numbers]
        grown = [
            last - first
            for way in ways.values()
            for first, last in zip(_sizes(way[numbers[0]]), _sizes(way[numbers[-1]]), strict=True)
        ]
        found["Frames"] = (("frames", *columns), [*rows, ["grown by", *map(format_bytes, grown)]])
    if "settings" in result:
        by_place = {(row["branch"], row["interval"]): row for row in result["settings"]["rows"]}
        intervals = sorted({interval for _, interval in by_place})
        rows = [
            [f"branch {branch}"]
            + [f"{_decibels(row)}, {row['flop_speedup']:.2f}x" for row in (by_place[branch, i] for i in intervals)]
            for branch in sorted({branch for branch, _ in by_place})
        ]
        found["Settings: PSNR against the plain video, dB, and speed-up by FLOPs"] = (
            ("", *(f"interval {interval}" for interval in intervals)),
            rows,
        )
    if "schedulers" in result:
        for model, by_name in result["schedulers"].items():
            title = f"Schedulers, {model}: PSNR against the same scheduler's plain video, dB, and speed-up by FLOPs"
            rows = [
                [name, f"{of[0]['calls_per_step']:.2f}", *(f"{r['psnr']:.1f}, {r['flop_speedup']:.2f}x" for r in of)]
                for name, of in by_name.items()
            ]
            intervals = [row["interval"] for row in next(iter(by_name.values()))]
            found[title] = (("", "calls a step", *(f"interval {interval}" for interval in intervals)), rows)
    return found


def _sizes(peaks: Mapping[str, int]) -> tuple[int, int]:
    """Of denoising, and of the whole."""
    return peaks["denoise"], max(peaks.values())


def draw(result: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Time and peak of the parts, peaks by frames, and quality by setting, as far as there are results."""
    kinds = [kind for kind in KINDS if kind in result]
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    with written("ablations", folder, figsize=(5.6 * columns, 3.9 * rows)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, kind in zip(panels, kinds, strict=False):
            _DRAWN[kind](axes, result[kind])
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e3e7ec", linewidth=0.8)
            axes.set_axisbelow(True)
        for axes in list(panels)[len(kinds) :]:
            axes.remove()


def _draw_parts(axes: Axes, parts: Mapping[str, Any]) -> None:
    names = list(parts)
    for offset, stage, colour in ((-0.2, "denoise", "#e0662f"), (0.2, "decode", "#7a8799")):
        peaks = [parts[name]["peak_bytes"][stage] / 2**20 for name in names]
        axes.barh([place + offset for place in range(len(names))], peaks, height=0.38, color=colour, label=stage)
    axes.set_yticks(
        range(len(names)), [f"{name}\n{parts[name]['speedup']['median']:.2f}x" for name in names], fontsize=8
    )
    axes.invert_yaxis()
    axes.set(title="parts, and times as fast as plain", xlabel="peak, MiB")
    axes.legend(frameon=False)


def _draw_frames(axes: Axes, frames: Mapping[str, Any]) -> None:
    for (name, by_frames), colour in zip(frames.items(), ("#7a8799", "#e0662f", "#2f8f6b"), strict=True):
        peaks = {int(number): stages["denoise"] / 2**20 for number, stages in by_frames.items()}
        axes.plot(list(peaks), list(peaks.values()), "o-", color=colour, label=name)
    axes.set(title="frames", xlabel="frames", ylabel="peak of denoising, MiB", ylim=(0, None))
    axes.legend(frameon=False)


def _draw_settings(axes: Axes, settings: Mapping[str, Any]) -> None:
    rows = [row for row in settings["rows"] if not row["identical"]]
    for branch in sorted({row["branch"] for row in rows}):
        mine = [row for row in rows if row["branch"] == branch]
        axes.plot([r["flop_speedup"] for r in mine], [r["psnr"] for r in mine], "o-", label=f"branch {branch}")
        for row in mine:
            axes.annotate(row["interval"], (row["flop_speedup"], row["psnr"]), xytext=(3, 3),
                          textcoords="offset points", fontsize=7)  # fmt: skip
    axes.set(title="interval (numbers) and branch", xlabel="speed-up by FLOPs", ylabel="PSNR, dB")
    axes.legend(frameon=False)


def _draw_schedulers(axes: Axes, schedulers: Mapping[str, Any]) -> None:
    names = list(next(iter(schedulers.values())))
    for (model, by_name), colour in zip(schedulers.items(), ("#3b6fb5", "#e0662f"), strict=True):
        for place, marker in enumerate("os"):
            rows = [by_name[name][place] for name in names if place < len(by_name[name])]
            if rows:
                label = f"{model}, interval {rows[0]['interval']}"
                axes.plot([row["psnr"] for row in rows], names[: len(rows)], marker, color=colour, label=label)
    axes.invert_yaxis()
    axes.set(title="schedulers", xlabel="PSNR, dB")
    axes.legend(frameon=False, fontsize=8)


_DRAWN = {"parts": _draw_parts, "frames": _draw_frames, "settings": _draw_settings, "schedulers": _draw_schedulers}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line; kinds that are not asked for keep the results that they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, default=VIDEO.steps)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--intervals", type=int, nargs="+", default=INTERVALS)
    parser.add_argument("--branches", type=int, nargs="+", default=BRANCHES)
    parser.add_argument("--schedulers", nargs="+", choices=[*SCHEDULERS], default=[*SCHEDULERS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.json")
    parser.add_argument("--pictures", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, log = Console(width=140), Console(stderr=True).print
    measures = {
        "parts": measure_parts,
        "frames": measure_frames,
        "settings": measure_settings,
        "schedulers": lambda options, log: measure_schedulers(
            options.schedulers, SCHEDULED_INTERVALS, clips=options.clips, steps=options.steps, log=log
        ),
    }
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for kind in options.kinds or KINDS:
        result[kind] = measures[kind](options, log)
        settings = {"steps": options.steps, "rounds": options.rounds, "video": str(replace(VIDEO, steps=options.steps))}
        result[f"{kind}_measured_with"] = {**environment(), **settings}
        write_json(options.out, result)  # what is done is kept, whatever comes
    page = ["# Ablations", ""]
    for title, (columns, rows) in tables(result).items():
        print_rows(title, columns, rows, console)
        page += [f"## {title}", "", *markdown_table(columns, rows), ""]
    options.out.with_suffix(".md").write_text("\n".join(page), encoding="utf-8")
    draw(result, options.pictures)


if __name__ == "__main__":
    main()
