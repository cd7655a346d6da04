"""The published systems in one table: plain, by others' caches and memory savers, and by ours; time, memory, quality.

    python -m benchmarks.systems                              # small systems on a CPU, about half an hour on two cores
    python -m benchmarks.systems --systems svd-xt --ways plain deepcache lightcache --repeats 1
    python -m benchmarks.systems --device cuda --full-size    # published sizes, random weights, within 8 minutes

All ways of a system take turns in one process, every second round backwards; a speed-up is the median of ratios to the
plain generation of the same round. The first two generations of each way are not among them: the first captures, plans
and compiles, and in the second a model learns what the next one needs. Each cell is kept in a file of its own as soon
as its system is done: what was measured with the same versions and settings is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import inspect
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common import (
    RESULTS,
    Goal,
    Spread,
    environment,
    in_turns,
    markdown_table,
    pairwise_ratio,
    usable_device,
    write_json,
)
from benchmarks.system_ways import OURS, WAYS, Setup, Skip
from examples import animatediff, animatediff_lightning, easyanimate, modelscope, stable_video_diffusion
from examples.random_pipelines import PUBLISHED, SMALL, Scale
from examples.small_model.sample import first_frame, heldout_clip, load_pipeline
from examples.small_model.sprites import FPS, IMAGE_SIZE, NUM_FRAMES
from examples.systems import System, Video
from lightcache_fx.cli.stages import STAGES, Stopwatch, predicted_peaks
from lightcache_fx.quality import Frames, compare_videos
from lightcache_fx.units import format_bytes

ROOT = Path(__file__).parents[1]
WORK = ROOT / "out" / "systems"
LONGEST = 300
"""Characters of a reason in the results."""
BENCH = Scale(widths=(32, 64, 64), layers=1, vae_width=16, blocks=8)
"""Some hundred milliseconds a step on one core."""
GPU_WAYS = ("plain", "deepcache", "cached", "lightcache")
GPU_SYSTEMS = ("svd-xt", "animatediff-lightning", "easyanimate")
GPU_MINUTES = 8.0
OUR_CACHES = ("cached", "lightcache-no-swap", "lightcache")
SAME_DB = 0.01
"""PSNRs that differ by less are the same."""


@dataclass(frozen=True)
class Case:
    """A row's system, at a size.

    Attributes:
        title: for tables.
        system: how it is made and called.
        scale: of its models.
        video: that is generated.
        trained: whether its weights are, so that quality means something.
        choice: of `Policy.lightcache`, where it differs.
    """

    title: str
    system: System
    scale: Scale
    video: Video
    trained: bool = False
    choice: Mapping[str, Any] = field(default_factory=dict)

    def build(self, device: str, dtype: str) -> Any:
        """Its pipeline; every time the same."""
        pipe = self.system.build(replace(self.scale, device=device, dtype=dtype))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, pipe: Any) -> Frames:
        """Its video."""
        return self.system.generate(pipe, self.video, first_frame(heldout_clip(0)) if self.trained else None)


def _sprites(scale: Scale) -> Any:
    return load_pipeline().to(scale.device, getattr(torch, scale.dtype))


SCRIPTS = (stable_video_diffusion, animatediff_lightning, animatediff, modelscope, easyanimate)
SYSTEMS = {script.SYSTEM.name: script.SYSTEM for script in SCRIPTS}
SPRITES = System(
    "svd-xt", "", load=lambda *_: None, build=_sprites, small=Video(IMAGE_SIZE, IMAGE_SIZE, NUM_FRAMES, 25),
    source=None, arguments={"fps": FPS, "motion_bucket_id": heldout_clip(0).motion_bucket_id},
)  # fmt: skip
NAMES = (*SYSTEMS, "svd-sprites")
STEPS = {"svd-xt": 25, "animatediff-lightning": 8, "animatediff": 16, "modelscope": 25, "easyanimate": 25}


def case_of(name: str, options: argparse.Namespace) -> Case:
    """A system at the size that is asked for."""
    if name == "svd-sprites":
        video = replace(SPRITES.small, steps=options.steps or (4 if options.quick else SPRITES.small.steps))
        return Case("svd-sprites, trained", SPRITES, SMALL, video, trained=True, choice={"interval": 3})
    system = SYSTEMS[name]
    if options.full_size:
        scale, video = replace(PUBLISHED, blocks=options.blocks), system.published
    elif options.quick:
        scale, video = SMALL, replace(system.small, frames=min(system.small.frames, 5), steps=4)
    else:
        scale, video = BENCH, Video(128, 128, 9 if name == "easyanimate" else 8, STEPS[name])
    return Case(system.title, system, scale, replace(video, steps=options.steps or video.steps))


class Run:
    """A pipeline of its own, run in one way, that has generated once.

    Attributes:
        first_seconds: of that generation.
        frames: that it made.
        seconds: of each measured generation, by stage.
        peaks: by stage.
    """

    def __init__(self, case: Case, way: str, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        device = torch.device(options.device)
        pipe = case.build(options.device, options.dtype)
        self.case, self.way = case, way
        self.watch = Stopwatch(pipe, device)
        policy = case.system.policy(pipe, **case.choice)
        self.pipe, self.forget = stack.enter_context(WAYS[way](Setup(pipe, policy, device)))
        self.watch.pipe = self.pipe
        self.seconds: list[dict[str, float]] = []
        self.peaks: dict[str, int] = {}
        self.device = device
        self.moves = way not in ("lightcache", "model-offload", "group-offload")
        self.frames = self.watch.run(lambda: case.generate(self.pipe))
        self.first_seconds = sum(self.watch.seconds.values())
        self.watch.run(lambda: case.generate(self.pipe))

    def measure(self) -> None:
        """Generate once against the clock."""
        self.watch.run(lambda: self.case.generate(self.pipe))
        self.seconds.append(dict(self.watch.seconds))

    def measure_peaks(self) -> None:
        """Generate once more, and see what it takes."""
        self.forget()
        self.peaks = self.watch.peaks(lambda: self.case.generate(self.pipe))

    @contextlib.contextmanager
    def on_device(self) -> Any:
        """The GPU has room for one pipeline: the others' weights wait in host memory."""
        if self.device.type == "cpu":
            yield
            return
        if self.moves:
            self.pipe.to(self.device)
        try:
            yield
        finally:
            self.forget()
            if self.moves:
                self.pipe.to("cpu", silence_dtype_warnings=True)
            gc.collect()
            torch.cuda.empty_cache()

    def totals(self) -> list[float]:
        """Seconds of each measured generation."""
        return [sum(stages.values()) for stages in self.seconds]


def explained(error: BaseException) -> str:
    """The kind and the first line of a message, folders left out."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return re.sub(r"(?<!\S)/\S*/", "", f"{type(error).__name__}: {line}"[:LONGEST])


class Table:
    """The cells of a run: what is known already, what is to be measured, and where it is kept."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.environment = environment(torch.device(options.device)) | _versions()
        self.cases = {name: case_of(name, options) for name in options.systems}
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        self.digests = {way: _digest(way) for way in WAYS}  # of what was imported
        self.ends = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes

    def file(self, name: str, way: str) -> Path:
        """Where a cell is kept: of the same versions, sources and settings."""
        facts = {
            "environment": self.environment, "case": asdict(self.cases[name].scale),
            "video": str(self.cases[name].video), "dtype": self.options.dtype, "repeats": self.options.repeats,
            "threads": self.options.threads, "source": self.digests[way],
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.options.work) / f"{name}.{way}.{key}.json"

    def run(self) -> None:
        """Measure what is missing."""
        todo = {}
        for name in self.cases:
            missing = []
            for way in self.options.ways:
                if (path := self.file(name, way)).is_file():
                    self.cells[name, way] = json.loads(path.read_text(encoding="utf-8"))
                else:
                    missing.append(way)
            todo[name] = [way for way in missing if way != "plain"] or missing
        turns = sum(len(self._groups(ways)) + len(ways) for ways in todo.values() if ways) * (self.options.repeats + 2)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
        with Progress(*columns, console=self.console, speed_estimate_period=600) as progress:
            task = progress.add_task("", total=turns)
            for name, ways in todo.items():
                for group in self._groups(ways):
                    session = Session(
                        self, name, group, lambda what: progress.update(task, description=what, advance=1)
                    )
                    for way, cell in session.run().items():
                        self.keep(name, way, cell)

    def _groups(self, ways: Sequence[str]) -> list[Sequence[str]]:
        """On a CPU all ways of a system take turns; a GPU has one beside the plain pipeline."""
        if not ways:
            return []
        return [ways] if torch.device(self.options.device).type == "cpu" else [[way] for way in ways]

    def keep(self, name: str, way: str, cell: dict[str, Any]) -> None:
        """Note a cell and, unless there was no time for it, write it."""
        if way == "plain" and (name, way) in self.cells:
            return
        if way not in self.options.ways:
            return
        self.cells[name, way] = cell
        if "not_run" not in cell:
            write_json(self.file(name, way), cell)


class Session:
    """Some ways of one system and the plain one, in turns."""

    def __init__(self, table: Table, name: str, ways: Sequence[str], tick: Any) -> None:
        self.table, self.name, self.case, self.tick = table, name, table.cases[name], tick
        self.ways = ["plain", *(way for way in ways if way != "plain")]

    def run(self) -> dict[str, dict[str, Any]]:
        """The cells of these ways."""
        options, cells, runs = self.table.options, dict[str, dict[str, Any]](), dict[str, Run]()
        if time.monotonic() > self.table.ends:
            return {way: {"not_run": f"the {options.minutes:g} minutes were over"} for way in self.ways}
        with contextlib.ExitStack() as stack:
            for way in self.ways:
                self.tick(f"{self.name}: {way}, the first time")
                try:
                    run = Run(self.case, way, options, stack)
                except Skip as reason:
                    cells[way] = {"skipped": str(reason)}
                    self.table.console.log(f"{self.name}: {way}: {reason}", markup=False)
                    continue
                except Exception as error:  # noqa: BLE001 - what a way does not support is reported
                    cells[way] = {"failed": explained(error)}
                    self.table.console.log(f"{self.name}: {way}: {explained(error)}", markup=False)
                    continue
                runs[way] = run
                with run.on_device():
                    pass
            for index, way in in_turns(tuple(runs), options.repeats):
                self.tick(f"{self.name}: {way}, round {index + 1} of {options.repeats}")
                with runs[way].on_device():
                    runs[way].measure()
            for way, run in runs.items():
                self.tick(f"{self.name}: {way}, its memory")
                with run.on_device():
                    run.measure_peaks()
                cells[way] = self._cell(run, runs["plain"])
                self.table.console.log(f"{self.name}: {line_of(cells[way])}", markup=False)
        return cells

    def _cell(self, run: Run, plain: Run) -> dict[str, Any]:
        quality = compare_videos(plain.frames, run.frames, measures=("psnr", "ssim")).as_dict()
        stages = {stage: Spread.of(s[stage] for s in run.seconds).as_dict() for stage in STAGES}
        return {
            "way": run.way,
            "first_seconds": run.first_seconds,
            "seconds": Spread.of(run.totals()).as_dict(),
            "stage_seconds": stages,
            "speedup": pairwise_ratio(plain.totals(), run.totals()).as_dict(),
            "denoise_speedup": pairwise_ratio(
                [s["denoise"] for s in plain.seconds], [s["denoise"] for s in run.seconds]
            ).as_dict(),
            "peak_bytes": run.peaks,
            "predicted_peak_bytes": predicted_peaks(run.pipe),
            "quality": {
                "identical": quality["identical"],
                "psnr": quality["psnr"]["mean"],
                "ssim": quality["ssim"].get("mean"),
            },
            "between_black_and_white": float(np.mean((run.frames > 0) & (run.frames < 1))),
        }


def _versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("transformers", "DeepCache", "cache-dit"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _digest(way: str) -> str:
    """Of the sources that a cell depends on: the way's own, the scripts' and, where it is ours, the whole package's."""
    files = [ROOT / "examples" / name for name in ("random_pipelines.py", "systems.py")]
    files += [ROOT / "lightcache_fx" / "cli" / name for name in ("stages.py", "timing.py")]
    if way in OURS:
        files += [path for folder in ("lightcache_fx", "passes") for path in (ROOT / folder).rglob("*.py")]
    digest = hashlib.sha256(inspect.getsource(WAYS[way]).encode())
    for path in sorted(set(files)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# What is printed ------------------------------------------------------------------------------------------------------

COLUMNS = (
    "way", "seconds", "encode / denoise / decode", "faster than plain", "peak", "encode / denoise / decode",
    "predicted", "PSNR, dB", "SSIM", "first time",
)  # fmt: skip


def line_of(cell: Mapping[str, Any]) -> str:
    """A cell in one line, for the log."""
    return ", ".join(filter(None, row_of(cell["way"], cell)))


def row_of(way: str, cell: Mapping[str, Any]) -> list[str]:
    """One row of a system's table; empty cells where there is a reason instead."""
    if "seconds" not in cell:
        return [way, "–", *[""] * (len(COLUMNS) - 2)]
    ratio, quality, peaks = cell["speedup"], cell["quality"], cell["peak_bytes"]
    predicted = cell["predicted_peak_bytes"]
    psnr = "same" if quality["identical"] else "∞" if quality["psnr"] is None else f"{quality['psnr']:.1f}"
    return [
        way,
        f"{cell['seconds']['median']:.2f}",
        " / ".join(f"{cell['stage_seconds'][stage]['median']:.2f}" for stage in STAGES),
        f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})",
        format_bytes(max(peaks.values())),
        " / ".join(format_bytes(peaks[stage]) for stage in STAGES),
        " / ".join(format_bytes(predicted[stage]) if stage in predicted else "–" for stage in STAGES)
        if predicted
        else "",
        psnr,
        "" if quality["ssim"] is None else f"{quality['ssim']:.3f}",
        f"{cell['first_seconds']:.1f} s",
    ]


def peak_of(cell: Mapping[str, Any]) -> int:
    """The most bytes in any stage."""
    return max(cell["peak_bytes"].values())


def goals_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Goal]:
    """What one system should show: the lowest peak, and the fastest of the interval caches at equal or better PSNR."""
    measured = {way: cell for way, cell in cells.items() if "seconds" in cell}
    goals = {}
    others = [peak_of(cell) for way, cell in measured.items() if way not in OUR_CACHES]
    if "lightcache" in measured and others:
        goals["peak of ours / lowest of the others'"] = Goal(
            "peak", peak_of(measured["lightcache"]) / min(others), "at most", 1.0
        )
    peer = measured.get("deepcache")
    for way in OUR_CACHES:
        if peer is None or way not in measured:
            continue
        ours = measured[way]
        if _decibels(ours) >= _decibels(peer) - SAME_DB:
            ratio = ours["speedup"]["median"] / peer["speedup"]["median"]
            goals[f"speed of {way} / of DeepCache, at equal or better PSNR"] = Goal("speed", ratio, "at least", 1.0)
    if "lightcache" in measured:
        ratio = measured["lightcache"]["speedup"]["median"]
        goals["speed of lightcache / of plain"] = Goal("speed", ratio, "above", 1.0)
    return goals


def _decibels(cell: Mapping[str, Any]) -> float:
    psnr = cell["quality"]["psnr"]
    return math.inf if psnr is None else float(psnr)


def as_result(table: Table) -> dict[str, Any]:
    """Everything, for JSON."""
    options = table.options
    systems: dict[str, Any] = {}
    for name, case in table.cases.items():
        cells = {way: table.cells[name, way] for way in options.ways if (name, way) in table.cells}
        systems[name] = {
            "title": case.title, "video": str(case.video), "trained": case.trained, "cells": cells,
            "goals": {goal: value.as_dict() for goal, value in goals_of(cells).items()},
        }  # fmt: skip
    return {
        "environment": table.environment,
        "setting": {
            "device": torch.device(options.device).type, "dtype": options.dtype, "repeats": options.repeats,
            "threads": options.threads,
            "size": "full" if options.full_size else "quick" if options.quick else "small",
        },
        "systems": systems,
    }  # fmt: skip


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables."""
    machine, setting = result["environment"], result["setting"]
    where = machine.get("gpu", f"{machine['processor']}, {setting['threads']} thread(s)")
    lines = [
        f"# The systems on {where}",
        "",
        f"By `python -m benchmarks.systems`: {setting['size']} size, {setting['dtype']}, {setting['repeats']} rounds,",
        f"torch {machine['torch']}, diffusers {machine['diffusers']}. Peaks include the weights that do not leave.",
        "Weights are random unless it says trained: then PSNR and SSIM, against the plain video, only tell which ways",
        "compute the same.",
    ]
    for name, system in result["systems"].items():
        lines += ["", f"## {name}", "", f"{system['title']}: {system['video']}.", ""]
        lines += markdown_table(COLUMNS, [row_of(way, cell) for way, cell in system["cells"].items()])
        lines += [""] + [f"* {line}" for line in _notes(system["cells"], system["goals"])]
    return "\n".join([*lines, ""])


def _notes(cells: Mapping[str, Any], goals: Mapping[str, Any]) -> Iterable[str]:
    for goal, facts in goals.items():
        yield f"{goal}: {facts['value']:.2f} ({facts['goal']}: {'met' if facts['met'] else 'not met'})"
    for way, cell in cells.items():
        for kind in ("skipped", "failed", "not_run"):
            if kind in cell:
                yield f"{way}: {kind.replace('_', ' ')}: {cell[kind]}"


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float16, on a CPU float32")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="small models; the default")
    size.add_argument("--quick", action="store_true", help="tiny ones, to try the script; nothing to report")
    size.add_argument("--full-size", action="store_true", help="the published models; on a GPU only")
    parser.add_argument("--systems", nargs="+", choices=NAMES, help="all; at full size three of them")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="all; at full size four of them")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, help="denoising steps, instead of each system's own")
    parser.add_argument("--blocks", type=int, help="of EasyAnimate at full size; 8 of its 28 unless told otherwise")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many; at full size 8")
    parser.add_argument("--threads", type=int, default=1, help="torch's intra-op threads")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the cells")
    parser.add_argument("--out", type=Path, help="JSON file, a .md beside it; benchmarks/results/systems.json")
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    if options.full_size and on_cpu:
        parser.error("argument --full-size: expected --device cuda or cuda:N with it, got cpu, where it takes days")
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1")
    options.dtype = options.dtype or ("float32" if on_cpu else "float16")
    options.systems = options.systems or list(GPU_SYSTEMS if options.full_size else NAMES)
    options.ways = [way for way in WAYS if way in (options.ways or (GPU_WAYS if options.full_size else WAYS))]
    if options.full_size:
        options.blocks, options.minutes = options.blocks or 8, options.minutes or GPU_MINUTES
    if options.out is None and not options.quick:
        options.out = RESULTS / ("systems.json" if on_cpu else "systems-cuda.json")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep the results."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    diffusers.utils.logging.set_verbosity_error()
    console = Console(width=200)
    table = Table(options, console)
    table.run()
    result = as_result(table)
    page = as_markdown(result)
    console.print(page, markup=False, highlight=False)
    if options.out is not None:
        write_json(options.out, result)
        options.out.with_suffix(".md").write_text(page, encoding="utf-8")
        console.print(f"written: {options.out.name}")


if __name__ == "__main__":
    main()
