"""One video, plain and accelerated, side by side: what the command `demo` does.

A pipeline generates twice from the same seed: as it is, and after `transform_pipeline`. Videos, plots and figures go to
a folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import lightcache_fx as lc
from lightcache_fx.cli.demo_report import Caching, Comparison, Variant, write_report
from lightcache_fx.cli.generating import Asked, call_of, calls_explained, check_source, generator_of, open_pipeline
from lightcache_fx.cli.pictures import plot_stages, write_videos
from lightcache_fx.cli.stages import Clock, Meter, Observer, Stopwatch, denoiser_of
from lightcache_fx.cli.timing import CPU
from lightcache_fx.errors import ArgumentError, ConfigError
from lightcache_fx.module import TransformedModule
from lightcache_fx.printer import diff
from lightcache_fx.quality import Frames, compare_videos

SHIPPED = Path("examples", "small_model", "svd-sprites")
"""Of a checkout: the trained model that the project ships, which is not in the wheel."""
FPS = 8
"""Of the files, where nothing is said."""


def shipped_model() -> Path:
    """The folder of the trained model that a checkout has: around this package, or where the user is.

    Raises:
        ConfigError: neither is a checkout.
    """
    for folder in (Path(__file__).parents[2], Path()):
        if (folder / SHIPPED / "model_index.json").is_file():
            return folder / SHIPPED
    raise ConfigError(
        f"the small model is not in the wheel, and {SHIPPED} is not here: name a pipeline's folder with --model, or run"
        f" this in a checkout of the repository"
    )


@dataclass
class Ticker:
    """Moves the progress bar with every denoising step."""

    progress: Progress

    def __post_init__(self) -> None:
        self.task = self.progress.add_task("", total=None)

    def begin(self, what: str, steps: int | None) -> None:
        """Show what is being done."""
        self.progress.reset(self.task, description=what, total=steps)

    def stage(self, name: str) -> None:
        """Stages are not shown."""

    def step(self) -> None:
        """One step on."""
        self.progress.advance(self.task)


@dataclass
class Holding:
    """Reads what a transformed denoiser holds, at each step, as it lets go of everything when a run ends."""

    denoiser: Any
    kept_bytes: int = 0
    hoisted_bytes: int = 0

    def stage(self, name: str) -> None:
        """Nothing is held outside the loop."""

    def step(self) -> None:
        """Read the bytes held now."""
        report = lc.inspect(self.denoiser)
        self.kept_bytes = max(self.kept_bytes, report.kept_bytes)
        self.hoisted_bytes = max(self.hoisted_bytes, report.hoisted_bytes)


class Runner:
    """Runs one pipeline, timed or metered, showing progress."""

    def __init__(
        self, name: str, watch: Stopwatch, generate: Callable[[], Frames], steps: int | None, ticker: Ticker
    ) -> None:
        self.name, self.watch, self.generate, self.steps, self.ticker = name, watch, generate, steps, ticker
        self.clocks: list[Clock] = []

    def run(self, what: str, *observers: Observer) -> Frames:
        """Generate once."""
        self.ticker.begin(f"{self.name}: {what}", self.steps)
        return self.watch.run(self.generate, *observers, self.ticker)

    def time(self, what: str) -> Frames:
        """Generate once against the clock."""
        clock = Clock()
        frames = self.run(what, clock)
        self.clocks.append(clock)
        return frames

    def variant(self, frames: Frames, *observers: Observer) -> Variant:
        """Generate once more, metered, and sum up."""
        with Meter() as meter:
            self.run("counting bytes and FLOPs", meter, *observers)
        return Variant(
            frames=frames,
            runs=tuple(clock.seconds for clock in self.clocks),
            cores=float(np.mean([clock.cores for clock in self.clocks])),
            peak_bytes=meter.peak_bytes,
            flops=meter.flops,
            memory=meter.over_time(),
        )


def read_policy(path: Path | None, interval: int, branch: int, decode_budget: str) -> lc.Policy:
    """Read the policy file, or make DeepCache's policy, with a decoder cut to a budget, where none is given.

    Raises:
        ArgumentError, PolicyError: there is no such file, or it says what is impossible.
    """
    if path is None:
        return lc.Policy(cache=lc.Cache(cut=branch, interval=interval), decode=lc.Decode(budget=decode_budget))
    if not path.is_file():
        raise ArgumentError(f"no policy file {path}")
    return lc.Policy.from_yaml(path)


def compare(
    open_pipe: Callable[[], Any], policy: lc.Policy, asked: Asked, seed: int, repeats: int, progress: Progress
) -> Comparison:
    """Run plain and accelerated in turn: each once to warm up, `repeats` times timed, once metered.

    What swaps has weights of its own: the plain pipeline's stay where they are.
    """
    pipe = open_pipe()
    call, ticker = call_of(pipe, asked), Ticker(progress)
    steps = call["num_inference_steps"]
    watch = Stopwatch(pipe, CPU)
    base = Stopwatch(open_pipe(), CPU) if policy.is_about_memory() else watch
    fast_pipe = lc.transform_pipeline(base.pipe, policy)
    plain = Runner("plain", watch, generator_of(pipe, call, seed), steps, ticker)
    fast = Runner("accelerated", base, generator_of(fast_pipe, call, seed), steps, ticker)
    first, denoiser = Clock(), denoiser_of(fast_pipe)
    with calls_explained(pipe):
        Runner("plain", watch, generator_of(pipe, call | {"num_inference_steps": 1}, seed), 1, ticker).run("warming up")
    fast.run("capturing", first)
    for number in range(1, repeats + 1):
        plain_frames = plain.time(f"run {number} of {repeats}")
        fast_frames = fast.time(f"run {number} of {repeats}")
    decode_difference = 0.0
    if isinstance(cut_vae := fast_pipe.components.get("vae"), TransformedModule):
        fast_pipe.vae = pipe.vae
        decoded_whole = fast.run("decoding as it was")
        fast_pipe.vae = cut_vae
        decode_difference = float(np.abs(fast_frames - decoded_whole).max())
    holding = Holding(denoiser)
    before = lc.inspect(denoiser).counts
    plain_variant = plain.variant(plain_frames)
    fast_variant = fast.variant(fast_frames, holding)
    report = lc.inspect(denoiser)
    cut, hoist = report.plan.cut, report.plan.hoist
    warm_step = min(clock.step_seconds[0] for clock in fast.clocks)
    return Comparison(
        plain=plain_variant,
        accelerated=fast_variant,
        caching=Caching(
            cut=cut.label if cut else None,
            num_full=report.counts["full"] - before["full"],
            num_reuse=_reused(report.counts) - _reused(before),
            kept_bytes=holding.kept_bytes,
            num_slots=len(cut.slots) if cut else 0,
            hoisted_bytes=holding.hoisted_bytes,
            num_hoisted=len(hoist.values),
            capture_seconds=max(0.0, first.step_seconds[0] - warm_step),
            planned_flop_bound=report.plan.flop_bound_speedup(steps),
            decode_difference=decode_difference,
        ),
        quality=compare_videos(plain_frames, fast_frames, measures=("psnr", "ssim")),
        settings={
            "policy": policy.to_yaml(),
            "steps": steps,
            "seed": seed,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "frames": list(plain_frames.shape),
        },
        plan=str(report),
        diff=tuple(program_diff(report)),
    )


def _reused(counts: Mapping[str, int]) -> int:
    """How many steps have reused something."""
    return sum(count for name, count in counts.items() if name not in ("full", "prologue", "probe"))


def program_diff(report: lc.Report) -> list[str]:
    """The printed lines between the full and the first reuse program; none where nothing is cached."""
    programs = report.programs
    reuse = next((name for name in programs if name.startswith("reuse")), None)
    if reuse is None:
        return []
    return diff(programs["full"], programs[reuse], names=("full", reuse), modules=True).splitlines()


def run(
    model: str, asked: Asked, policy: lc.Policy, *, out: Path, seed: int, repeats: int, console: Console
) -> Comparison:
    """Do all that the command does but print.

    Args:
        model: a pipeline's folder, or a model id.
        asked: what to generate.
        policy: of the accelerated one.
        out: folder for videos, plots, `report.json` and `report.md`.
        seed: decides all noise.
        repeats: timed generations of each.
        console: for the progress bar, if it is a terminal.

    Raises:
        LightcacheError, OSError: a setting or a folder is wrong.
    """
    check_source(model)
    out.mkdir(parents=True, exist_ok=True)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*bars, TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        comparison = compare(
            functools.partial(open_pipeline, model, torch.float32), policy, asked, seed, repeats, progress
        )
    fps = asked.fps or FPS
    write_report(comparison, out, fps)
    write_videos(comparison, out, fps)
    plot_stages(comparison, out / "stages.png")
    return comparison
