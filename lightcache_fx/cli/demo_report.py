"""What the demo has measured, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lightcache_fx.cli.stages import STAGES
from lightcache_fx.quality import Frames, Quality
from lightcache_fx.units import format_bytes

DATA_RANGE = 1.0
"""Of the frames that PSNR and SSIM compare."""
BUSY_CORES = 0.85
"""A generation that has the machine to itself keeps at least this many cores at work."""


@dataclass(frozen=True)
class Variant:
    """One pipeline's part: frames, the seconds of every timed run, the metered run's bytes and FLOPs; all by stage.

    `cores` is how many were at work on average in the timed runs; `memory` is what `Meter.over_time` returns.
    """

    frames: Frames
    runs: tuple[dict[str, float], ...]
    cores: float
    peak_bytes: dict[str, int]
    flops: dict[str, int]
    memory: dict[str, Any]

    @property
    def seconds(self) -> dict[str, float]:
        """The median of each stage over the runs, and their sum."""
        stages = {stage: float(np.median([run[stage] for run in self.runs])) for stage in STAGES}
        return {**stages, "total": sum(stages.values())}

    @property
    def total_flops(self) -> dict[str, int]:
        """FLOPs of each stage, and their sum."""
        return {**self.flops, "total": sum(self.flops.values())}


@dataclass(frozen=True)
class Caching:
    """What the accelerated pipeline did: `kept_bytes` and `hoisted_bytes` the most that was held between steps.

    `decode_difference` is the largest between its frames and those that the plain decoder makes of the same latents.
    """

    cut: str | None
    num_full: int
    num_reuse: int
    kept_bytes: int
    num_slots: int
    hoisted_bytes: int
    num_hoisted: int
    capture_seconds: float
    planned_flop_bound: float
    decode_difference: float


@dataclass(frozen=True)
class Comparison:
    """Plain and accelerated side by side; `settings` are what the user chose and where it ran.

    `plan` is for people; `diff` has the lines between the full and the reuse program, each with its module.
    """

    plain: Variant
    accelerated: Variant
    caching: Caching
    quality: Quality
    settings: dict[str, Any]
    plan: str
    diff: tuple[str, ...]

    def speedup(self, stage: str) -> float:
        """Plain over accelerated seconds of a stage or of the `total`."""
        return self.plain.seconds[stage] / self.accelerated.seconds[stage]

    def flop_bound(self, stage: str) -> float:
        """Plain over accelerated FLOPs, as counted: the speed-up where time goes by FLOPs alone."""
        return self.plain.total_flops[stage] / self.accelerated.total_flops[stage]

    def notes(self) -> list[str]:
        """What a reader should know before trusting the figures."""
        cores = min(self.plain.cores, self.accelerated.cores)
        if cores >= BUSY_CORES:
            return []
        busy = f"other programs kept the processor busy (this one had {cores:.2f} cores on average)"
        return [f"{busy}: seconds and speed-ups are not to be trusted, run it again on an idle machine"]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, valid JSON."""
        caching, quality = self.caching, self.quality
        variants = {"plain": self.plain, "accelerated": self.accelerated}
        return {
            "settings": self.settings,
            "seconds": {name: variant.seconds for name, variant in variants.items()},
            "runs_seconds": {name: list(variant.runs) for name, variant in variants.items()},
            "cores": {name: variant.cores for name, variant in variants.items()},
            "notes": self.notes(),
            "capture_seconds": caching.capture_seconds,
            "speedup": {"pipeline": self.speedup("total"), "denoise": self.speedup("denoise")},
            "flop_bound_speedup": {
                "pipeline": self.flop_bound("total"),
                "denoise": self.flop_bound("denoise"),
                "denoise_planned": caching.planned_flop_bound,
            },
            "flops": {name: variant.total_flops for name, variant in variants.items()},
            "peak_bytes": {name: variant.peak_bytes for name, variant in variants.items()},
            "cache": {
                "cut": caching.cut,
                "kept_bytes": caching.kept_bytes,
                "slots": caching.num_slots,
                "hoisted_bytes": caching.hoisted_bytes,
                "hoisted_values": caching.num_hoisted,
            },
            "decode_difference": caching.decode_difference,
            "steps": {"full": caching.num_full, "reuse": caching.num_reuse},
            "quality": {
                "psnr_db": None if quality.identical else quality.figure("psnr"),
                "ssim": quality.figure("ssim"),
                "max_difference": quality.max_difference,
                "identical": quality.identical,
                "data_range": DATA_RANGE,
            },
        }


@dataclass(frozen=True)
class Grid:
    """A table's title, column heads and rows, to be shown by rich or written as Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """For a file."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def grids(comparison: Comparison) -> list[Grid]:
    """Time, memory, and what caching did."""
    settings = comparison.settings
    return [
        Grid(
            f"seconds (median of {settings['repeats']}), {settings['steps']} steps, threads: {settings['threads']}",
            ("stage", "plain", "accelerated", "speed-up", "FLOP-bound speed-up"),
            tuple(_time_row(comparison, stage) for stage in (*STAGES, "total")),
        ),
        Grid(
            "peak memory beside the weights",
            ("stage", "plain", "accelerated"),
            tuple(_memory_row(comparison, stage) for stage in STAGES),
        ),
        Grid("caching and its price", ("", "accelerated against plain"), _caching_rows(comparison)),
    ]


def _time_row(comparison: Comparison, stage: str) -> tuple[str, ...]:
    plain, accelerated = comparison.plain.seconds[stage], comparison.accelerated.seconds[stage]
    name = "whole pipeline" if stage == "total" else stage
    ratios = (f"{comparison.speedup(stage):.2f}×", f"{comparison.flop_bound(stage):.2f}×")
    return (name, f"{plain:.3f}", f"{accelerated:.3f}", *ratios)


def _memory_row(comparison: Comparison, stage: str) -> tuple[str, ...]:
    variants = (comparison.plain, comparison.accelerated)
    return (stage, *(format_bytes(variant.peak_bytes[stage]) for variant in variants))


def _caching_rows(comparison: Comparison) -> tuple[tuple[str, ...], ...]:
    caching, quality = comparison.caching, comparison.quality
    psnr = "identical frames" if quality.identical else f"{quality.figure('psnr'):.2f} dB"
    return (
        ("cut", caching.cut or "none"),
        ("steps", f"{caching.num_full} full, {caching.num_reuse} reuse"),
        ("kept between steps", f"{format_bytes(caching.kept_bytes)} in {caching.num_slots} slots"),
        ("hoisted, once a run", f"{format_bytes(caching.hoisted_bytes)} in {caching.num_hoisted} values"),
        ("capture, once a process", f"{caching.capture_seconds:.1f} s"),
        ("PSNR (frames in 0..1)", psnr),
        ("SSIM (frames in 0..1)", f"{quality.figure('ssim'):.4f}"),
        ("largest pixel difference", f"{quality.max_difference:.4f}"),
        ("of which by decoding in chunks", f"{caching.decode_difference:.1e}"),
    )


def write_report(comparison: Comparison, folder: Path, fps: int) -> None:
    """Write `report.json`, `report.md`, the frames that the figures are of, `frames.npz`, and `details.json`.

    `lightcache-fx report` makes its page of them.
    """
    details = {
        "fps": fps,
        "memory": {"plain": comparison.plain.memory, "accelerated": comparison.accelerated.memory},
        "plan": comparison.plan,
        "diff": list(comparison.diff),
    }
    (folder / "details.json").write_text(json.dumps(details, allow_nan=False) + "\n", encoding="utf-8")
    text = json.dumps(comparison.as_dict(), indent=2, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    markdown = "\n\n".join(grid.to_markdown() for grid in grids(comparison))
    notes = "".join(f"\n\nNote: {note}." for note in comparison.notes())
    (folder / "report.md").write_text(markdown + notes + "\n", encoding="utf-8")
    np.savez(folder / "frames.npz", plain=comparison.plain.frames, accelerated=comparison.accelerated.frames)
