"""What the command `bench` does: one pipeline, plain and by one or more policies, measured in one run.

After each way has generated once, which captures, plans and warms up, ways take turns round by round; peaks are of one
more generation. Policies that swap, or keep a budget, have weights of their own, since these move.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import lightcache_fx as lc
from lightcache_fx.cli.generating import Asked, call_of, calls_explained, generator_of, open_pipeline, steps_of
from lightcache_fx.cli.stages import STAGES, Stopwatch, denoiser_of, place, predicted_peaks
from lightcache_fx.cli.timing import Spread, environment, in_turns, pairwise_ratio
from lightcache_fx.errors import ArgumentError, PolicyError
from lightcache_fx.quality import Frames, Quality, compare_videos
from lightcache_fx.units import format_bytes

PLAIN = "plain"


def read_policies(
    files: Sequence[Path], preset: str | None, interval: int | None, branch: int | None, memory_budget: str | None
) -> dict[str, lc.Policy]:
    """The policies to measure, by name: each file's, or one by a published system's name or by DeepCache's options.

    Raises:
        PolicyError: an impossible setting, a missing file, or two things that exclude each other.
    """
    if files:
        if preset is not None or interval is not None or branch is not None or memory_budget is not None:
            raise PolicyError("--policy says all: leave out --preset, --interval, --branch and --memory-budget")
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise PolicyError(f"there is no policy file {missing}")
        stems = [file.stem for file in files]
        names = stems if len({*stems, PLAIN}) == len(files) + 1 else [str(file) for file in files]
        found = {name: lc.Policy.from_yaml(file) for name, file in zip(names, files, strict=True)}
        if len(found) < len(files):
            raise PolicyError(f"the same policy file is named twice: {', '.join(names)}")
        return found
    if preset is not None:
        system = None if preset == "generic" else preset
        name, policy = f"lightcache {preset}", lc.Policy.lightcache(system, interval=interval, branch=branch)
    elif interval is None and branch is None and memory_budget is not None:
        name, policy = "", lc.Policy()
    else:
        cache = lc.Cache(cut=branch or 0, interval=3 if interval is None else interval)
        name, policy = f"interval {cache.interval}, branch {cache.cut}", lc.Policy(cache=cache)
    if memory_budget is not None:
        budget = lc.Policy(memory_budget=memory_budget).memory_budget  # type: ignore[arg-type] # read as a file's
        policy = policy.model_copy(update={"memory_budget": budget})
        name = ", ".join(filter(None, (name, f"within {memory_budget}")))
    return {name: policy}


@dataclass
class Way:
    """One way of running the pipeline, and what has been measured of it.

    Attributes:
        name: of the policy, or `plain`.
        pipe: that is called.
        watch: tells its stages apart.
        generate: runs it once.
        policy: None for the plain one.
        frames: of the last generation.
        first_seconds: of the generation that captures and plans.
        seconds: of each stage of each round.
        peaks: bytes of each stage.
        predicted: likewise, of those that are planned.
    """

    name: str
    pipe: Any
    watch: Stopwatch
    generate: Callable[[], Frames]
    policy: lc.Policy | None
    frames: Frames | None = None
    first_seconds: float = 0.0
    seconds: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    predicted: dict[str, int] = field(default_factory=dict)

    def totals(self) -> list[float]:
        """Seconds of each round."""
        return [sum(stages.values()) for stages in self.seconds]

    def warm_up(self, meter: Meter) -> None:
        """Generate once."""
        self.frames = self.watch.run(self.generate, meter)
        self.first_seconds = self.first_seconds or sum(self.watch.seconds.values())

    def time(self, meter: Meter) -> None:
        """Generate once against the clock."""
        self.frames = self.watch.run(self.generate, meter)
        self.seconds.append(dict(self.watch.seconds))

    def measure_peaks(self, meter: Meter) -> None:
        """Generate once more, and count bytes."""
        before, self.watch.pipe = self.watch.pipe, self.pipe
        self.peaks = self.watch.peaks(self.generate, meter)
        self.watch.pipe = before
        self.predicted = {} if self.policy is None else predicted_peaks(self.pipe)


@dataclass
class Meter:
    """Moves the progress bar: one for each generation, and parts of it for its steps."""

    progress: Progress
    generations: int
    steps: int | None

    def __post_init__(self) -> None:
        self.task = self.progress.add_task("", total=self.generations)
        self.done = 0

    def begin(self, what: str) -> None:
        """A generation begins."""
        self.progress.update(self.task, description=what, completed=self.done)
        self.done += 1

    def stage(self, name: str) -> None:
        """Only the end of the last stage is shown."""
        if name == "done":
            self.progress.update(self.task, completed=self.done)

    def step(self) -> None:
        """One step on."""
        if self.steps:
            self.progress.advance(self.task, 1 / (self.steps + 1))


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        source: a pipeline's folder or a model id.
        asked: what to generate.
        policies: by name.
        device, dtype: of weights.
        seed: decides all noise.
        rounds: timed generations of each way.
        warm_ups: generations of each before that.
    """

    source: str
    asked: Asked
    policies: Mapping[str, lc.Policy]
    device: torch.device
    dtype: torch.dtype
    seed: int
    rounds: int
    warm_ups: int

    def measure(self, console: Console) -> Measured:
        """Open, warm up, take turns, and count bytes.

        Raises:
            LightcacheError: the pipeline, the call or a policy is not possible.
        """
        with _bar(console) as progress:
            ways = self._ways()
            plain = ways[0]
            meter = Meter(progress, len(ways) * (self.warm_ups + self.rounds + 1), steps_of(plain.pipe, self.asked))
            for way in ways:
                for _ in range(self.warm_ups):
                    meter.begin(f"{way.name}: warming up")
                    with calls_explained(way.pipe) if way is plain else _as_it_is():
                        way.warm_up(meter)
            by_name = {way.name: way for way in ways}
            for number, name in in_turns(list(by_name), self.rounds):
                meter.begin(f"{name}: round {number + 1} of {self.rounds}")
                by_name[name].time(meter)
            for way in ways:
                meter.begin(f"{way.name}: counting bytes")
                way.measure_peaks(meter)
        assert plain.frames is not None
        quality = {}
        for way in ways[1:]:
            assert way.frames is not None
            quality[way.name] = compare_videos(plain.frames, way.frames, measures=("psnr", "ssim"))
        return Measured(self, tuple(ways), quality)

    def _ways(self) -> list[Way]:
        pipe = open_pipeline(self.source, self.dtype)
        call = call_of(pipe, self.asked)
        denoiser_of(pipe)  # or there is nothing to accelerate
        shared = Stopwatch(place(pipe, None, self.device)[0], self.device)
        ways = [Way(PLAIN, pipe, shared, generator_of(pipe, call, self.seed), None)]
        for name, policy in self.policies.items():
            watch, placed = shared, policy
            if policy.is_about_memory():
                own, at = place(open_pipeline(self.source, self.dtype), policy, self.device)
                assert at is not None
                watch, placed = Stopwatch(own, self.device), at
            fast = lc.transform_pipeline(watch.pipe, placed)
            ways.append(Way(name, fast, watch, generator_of(fast, call, self.seed), policy))
        gc.collect()
        return ways


@contextmanager
def _as_it_is() -> Iterator[None]:
    """Errors of what is ours are told as they are."""
    yield


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield progress


@dataclass(frozen=True)
class Measured:
    """What a bench has found."""

    bench: Bench
    ways: tuple[Way, ...]
    quality: Mapping[str, Quality]

    def speedup(self, way: Way) -> Spread:
        """Plain over this way's seconds, round by round."""
        return pairwise_ratio(self.ways[0].totals(), way.totals())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, with what they depend on; no path but the name of the folder."""
        frames = self.ways[0].frames
        assert frames is not None
        asked = self.bench.asked.model_dump(exclude_none=True, exclude={"fps"})
        if "image" in asked:
            asked["image"] = Path(asked["image"]).name
        return {
            "environment": environment(self.bench.device),
            "source": Path(self.bench.source).name if Path(self.bench.source).exists() else self.bench.source,
            "pipeline": type(self.ways[0].pipe).__name__,
            "asked": asked,
            "frames": list(frames.shape),
            "device": str(self.bench.device),
            "dtype": str(self.bench.dtype).removeprefix("torch."),
            "seed": self.bench.seed,
            "rounds": self.bench.rounds,
            "ways": {way.name: self._facts(way) for way in self.ways},
        }

    def _facts(self, way: Way) -> dict[str, Any]:
        stages = {stage: [seconds[stage] for seconds in way.seconds] for stage in STAGES}
        quality = self.quality.get(way.name)
        return {
            "policy": way.policy.to_yaml() if way.policy is not None else None,
            "first_seconds": way.first_seconds,
            "seconds": {stage: Spread.of(values).as_dict() for stage, values in stages.items()}
            | {"total": Spread.of(way.totals()).as_dict()},
            "speedup": self.speedup(way).as_dict(),
            "peak_bytes": way.peaks,
            "predicted_peak_bytes": way.predicted,
            "quality": quality.as_dict() if quality is not None else None,
        }

    def table(self) -> Table:
        """One column a way."""
        frames = self.ways[0].frames
        assert frames is not None
        size = f"{len(frames)} frames of {frames.shape[2]} x {frames.shape[1]}"
        rounds = "one round" if self.bench.rounds == 1 else f"medians of {self.bench.rounds} rounds"
        table = Table(title=f"{type(self.ways[0].pipe).__name__}: {size}, {rounds}", title_justify="left")
        table.add_column("")
        for way in self.ways:
            table.add_column(way.name, justify="right")
        for name, cells in self._rows():
            if any(cells):
                table.add_row(name, *cells)
        return table

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        for stage in STAGES:
            medians = (Spread.of(seconds[stage] for seconds in way.seconds).median for way in self.ways)
            yield f"{stage}, s", [f"{median:.3f}" for median in medians]
        yield "all, s", [f"{Spread.of(way.totals()).median:.3f}" for way in self.ways]
        yield "times as fast", ["", *(self.speedup(way).format("{:.2f}") for way in self.ways[1:])]
        for stage in STAGES:
            yield f"peak of {stage}", [format_bytes(way.peaks[stage]) for way in self.ways]
            predicted = [way.predicted.get(stage) for way in self.ways]
            yield "  predicted", [format_bytes(size) if size is not None else "" for size in predicted]
        found = [self.quality.get(way.name) for way in self.ways]
        same = ["the same" if q is not None and q.identical else "" for q in found]
        yield (
            "PSNR, dB",
            [s or (f"{q.figure('psnr'):.2f}" if q is not None else "") for q, s in zip(found, same, strict=True)],
        )
        yield "SSIM", [f"{q.figure('ssim'):.4f}" if q is not None else "" for q in found]

    def lines(self) -> list[str]:
        """What stands below the table."""
        first = ", ".join(f"{way.name} {way.first_seconds:.1f} s" for way in self.ways)
        lines = [f"first generation, with capturing and planning: {first}"]
        if any(way.predicted for way in self.ways):
            lines.append("predicted: of the models that are planned; what a pipeline holds beside them is in no plan")
        return lines


def check_positive(**counts: int) -> None:
    """Refuse counts below one.

    Raises:
        ArgumentError: names the option.
    """
    for name, count in counts.items():
        if count < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} must be at least 1, got {count}")
