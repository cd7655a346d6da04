"""One video, plain and accelerated: `python examples/demo.py --help`.

The small trained model of this folder continues a first frame that it has never seen, twice from the same seed: by the
pipeline as it is, and by the same pipeline after `transform_pipeline`. Videos, plots and figures go to `--out`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples` is a package of the repository
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns as it is imported, if torchvision is not there

import diffusers
import numpy as np
import torch
import transformers
import typer
from diffusers import StableVideoDiffusionPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

import lightcache_fx as lc
from examples.pictures import plot_stages, write_videos
from examples.report import Caching, Comparison, Variant, grids, write_report
from examples.small_model.sample import MODEL_FOLDER, first_frame, heldout_clip
from examples.small_model.sprites import FPS
from examples.stages import Clock, Frames, Meter, Observer, Request, generate
from lightcache_fx.printer import diff
from lightcache_fx.quality import compare_videos


class DemoError(Exception):
    """Something that the user asked for cannot be done; its text is one line."""


@dataclass
class Ticker:
    """Moves the progress bar with every denoising step."""

    progress: Progress

    def __post_init__(self) -> None:
        self.task = self.progress.add_task("", total=None)

    def begin(self, what: str, steps: int) -> None:
        """Show what is being done."""
        self.progress.reset(self.task, description=what, total=steps)

    def stage(self, name: str) -> None:
        """Stages are not shown."""

    def step(self, _pipe: StableVideoDiffusionPipeline) -> None:
        """One step on."""
        self.progress.advance(self.task)


class Holding:
    """Reads what the transformed U-Net holds, at each step, as it lets go of everything when a run ends."""

    kept_bytes = 0
    hoisted_bytes = 0

    def stage(self, name: str) -> None:
        """Nothing is held outside the loop."""

    def step(self, pipe: StableVideoDiffusionPipeline) -> None:
        """Read the bytes held now."""
        report = lc.inspect(pipe.unet)
        self.kept_bytes = max(self.kept_bytes, report.kept_bytes)
        self.hoisted_bytes = max(self.hoisted_bytes, report.hoisted_bytes)


class Stopwatch:
    """Runs one pipeline, timed or metered, showing progress."""

    def __init__(self, name: str, pipe: StableVideoDiffusionPipeline, request: Request, ticker: Ticker) -> None:
        self.name, self.pipe, self.request, self.ticker = name, pipe, request, ticker
        self.clocks: list[Clock] = []

    def run(self, what: str, *observers: Observer, steps: int | None = None) -> Frames:
        """Generate once."""
        request = replace(self.request, steps=steps or self.request.steps)
        self.ticker.begin(f"{self.name}: {what}", request.steps)
        return generate(self.pipe, request, [*observers, self.ticker])

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


def load(folder: Path) -> StableVideoDiffusionPipeline:
    """Load a pipeline folder with diffusers, in float32 and without its own progress bars.

    Raises:
        DemoError: there is no such pipeline, or it cannot be read.
    """
    if not (folder / "model_index.json").is_file():
        raise DemoError(
            f"no pipeline in {folder} (it has no model_index.json); train the small model with `make train`,"
            f" or name a folder with --model"
        )
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe = StableVideoDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise DemoError(f"cannot load the pipeline in {folder}: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_policy(path: Path | None, interval: int, branch: int, decode_budget: str) -> lc.Policy:
    """Read the policy file, or make DeepCache's policy, with a decoder cut to a budget, where none is given."""
    if path is None:
        return lc.Policy(cache=lc.Cache(cut=branch, interval=interval), decode=lc.Decode(budget=decode_budget))
    if not path.is_file():
        raise DemoError(f"no policy file {path}")
    return lc.Policy.from_yaml(path)


def compare(
    pipe: StableVideoDiffusionPipeline, policy: lc.Policy, request: Request, repeats: int, ticker: Ticker
) -> Comparison:
    """Run plain and accelerated in turn: each once to warm up, `repeats` times timed, once metered."""
    plain = Stopwatch("plain", pipe, request, ticker)
    fast = Stopwatch("accelerated", lc.transform_pipeline(pipe, policy), request, ticker)
    first = Clock()
    plain.run("warming up", steps=1)
    fast.run("capturing", first)
    for number in range(1, repeats + 1):
        plain_frames = plain.time(f"run {number} of {repeats}")
        fast_frames = fast.time(f"run {number} of {repeats}")
    whole = StableVideoDiffusionPipeline(**{**fast.pipe.components, "vae": pipe.vae})
    whole.set_progress_bar_config(disable=True)
    decoded_whole = Stopwatch("accelerated", whole, request, ticker).run("decoding as it was")
    holding = Holding()
    before = lc.inspect(fast.pipe.unet).counts
    plain_variant = plain.variant(plain_frames)
    fast_variant = fast.variant(fast_frames, holding)
    report = lc.inspect(fast.pipe.unet)
    cut, hoist = report.plan.cut, report.plan.hoist
    warm_step = min(clock.step_seconds[0] for clock in fast.clocks)
    return Comparison(
        plain=plain_variant,
        accelerated=fast_variant,
        caching=Caching(
            cut=cut.label if cut else None,
            num_full=report.counts["full"] - before["full"],
            num_reuse=report.counts.get("reuse", 0) - before.get("reuse", 0),
            kept_bytes=holding.kept_bytes,
            num_slots=len(cut.slots) if cut else 0,
            hoisted_bytes=holding.hoisted_bytes,
            num_hoisted=len(hoist.values),
            capture_seconds=max(0.0, first.step_seconds[0] - warm_step),
            planned_flop_bound=report.plan.flop_bound_speedup(request.steps),
            decode_difference=float(np.abs(fast_frames - decoded_whole).max()),
        ),
        quality=compare_videos(plain_frames, fast_frames, measures=("psnr", "ssim")),
        settings={
            "policy": policy.to_yaml(),
            "steps": request.steps,
            "seed": request.seed,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "frames": list(plain_frames.shape),
        },
        plan=str(report),
        diff=tuple(program_diff(report)),
    )


def program_diff(report: lc.Report) -> list[str]:
    """The printed lines between the full and the first reuse program; none where nothing is cached."""
    programs = report.programs
    reuse = next((name for name in programs if name.startswith("reuse")), None)
    if reuse is None:
        return []
    return diff(programs["full"], programs[reuse], names=("full", reuse), modules=True).splitlines()


@dataclass(frozen=True)
class Options:
    """The command line, read."""

    out: Path
    model: Path
    interval: int
    branch: int
    decode_budget: str
    steps: int
    seed: int
    clip: int
    repeats: int
    policy: Path | None


def run(options: Options, console: Console) -> Comparison:
    """Do everything that the options ask for.

    Raises:
        DemoError, LightcacheError, OSError: a setting or a folder is wrong.
    """
    for name in ("steps", "repeats"):
        if getattr(options, name) < 1:
            raise DemoError(f"--{name} must be at least 1, got {getattr(options, name)}")
    policy = read_policy(options.policy, options.interval, options.branch, options.decode_budget)
    pipe = load(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    clip = heldout_clip(options.clip)
    request = Request(first_frame(clip), options.steps, options.seed, FPS, clip.motion_bucket_id)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        comparison = compare(pipe, policy, request, options.repeats, Ticker(progress))
    write_report(comparison, options.out, FPS)
    write_videos(comparison, options.out, FPS)
    plot_stages(comparison, options.out / "stages.png")
    return comparison


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    model: Annotated[Path, typer.Option(help="Pipeline folder.")] = MODEL_FOLDER,
    interval: Annotated[int, typer.Option(help="One step in so many is full.")] = 3,
    branch: Annotated[int, typer.Option(help="DeepCache's branch: the skip connection to cut at.")] = 0,
    decode_budget: Annotated[
        str, typer.Option(help="Memory for decoding: bytes, or a share of what it takes as it is.")
    ] = "60%",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    seed: Annotated[int, typer.Option(help="Decides all noise.")] = 0,
    clip: Annotated[int, typer.Option(help="Which held-out clip gives the first frame.")] = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each pipeline; medians are shown.")] = 3,
    policy: Annotated[Path | None, typer.Option(help="YAML policy, instead of interval, branch and budget.")] = None,
) -> None:
    """Make one video, plain and accelerated, and compare them."""
    try:
        options = Options(out, model, interval, branch, decode_budget, steps, seed, clip, repeats, policy)
        comparison = run(options, Console(stderr=True))
    except (DemoError, lc.errors.LightcacheError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console = Console()
    for grid in grids(comparison):
        console.print(grid.to_rich())
    for note in comparison.notes():
        console.print(f"[bold]note:[/bold] {note}")
    console.print(f"Results are in {out}; begin with {out / 'side_by_side.gif'}.")
    console.print(f"One page of it all: lightcache-fx report report.html --run {out}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
