"""Memory through encoding, denoising and decoding (the LightCache paper's figure 3).

One generation of the small system of Stable Video Diffusion's shape in each way, on a CPU, followed allocation by
allocation; weights that never leave the device are in it. Weights are random: memory does not depend on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CPU, environment
from benchmarks.figures.style import COLOURS, FOLDER, written
from benchmarks.system_ways import WAYS, Setup
from benchmarks.systems import BENCH
from examples.stable_video_diffusion import SYSTEM
from examples.systems import Video
from lightcache_fx.cli.stages import STAGES, Stopwatch, resident_weight_bytes
from lightcache_fx.measure import MemoryMoment, measure_over_time

SHOWN = {"plain": "plain", "DeepCache": "deepcache", "ours": "lightcache"}
"""The ways, by the names that the figure gives them."""
VIDEO = Video(128, 128, 8, 25)
BINS = 600
"""Intervals of equal length of which the highest moment is kept."""
_SHADES = {"encode": "#eef1f4", "denoise": "#ffffff", "decode": "#f6ece6"}


def measure(video: Video, log: Callable[[str], None]) -> dict[str, Any]:
    """Each way in turn: two generations that warm up, and one that is followed."""
    found = {}
    for name, way in SHOWN.items():
        with contextlib.ExitStack() as stack:
            pipe = SYSTEM.build(BENCH)
            pipe.set_progress_bar_config(disable=True)
            watch = Stopwatch(pipe, CPU)
            watch.pipe, forget = stack.enter_context(WAYS[way](Setup(pipe, SYSTEM.policy(pipe), CPU)))
            for _ in range(2):
                watch.run(lambda watch=watch: SYSTEM.generate(watch.pipe, video))
            forget()
            moments = measure_over_time(lambda begin, watch=watch: _listened(watch, begin, video))
            found[name] = curve(moments, resident_weight_bytes(watch.pipe, CPU))
        log(f"{name}: {max(found[name]['bytes']) / 2**20:.1f} MiB at most")
    return {
        "environment": environment(),
        "system": SYSTEM.title,
        "video": str(video),
        "threads": torch.get_num_threads(),
        "ways": found,
    }


def _listened(watch: Stopwatch, begin: Callable[[str], None], video: Video) -> Any:
    watch.listener = begin
    try:
        return watch.run(lambda: SYSTEM.generate(watch.pipe, video))
    finally:
        watch.listener = None


def curve(moments: Sequence[MemoryMoment], resident: int) -> dict[str, Any]:
    """The most in each of `BINS` intervals, when each stage begins, and its peak; bytes with the resident weights."""
    inside = [moment for moment in moments if moment.stage is not None]
    first, last = inside[0].seconds, inside[-1].seconds
    width = (last - first) / BINS or 1.0
    highest, begins, peaks = [0] * BINS, {}, {}
    before, total = 0, 0
    for moment in inside:
        place = min(BINS - 1, int((moment.seconds - first) / width))
        for between in range(before + 1, place + 1):
            highest[between] = total  # nothing was allocated or released meanwhile
        before, total = place, moment.num_bytes + resident
        highest[place] = max(highest[place], total)
        begins.setdefault(moment.stage, moment.seconds - first)
        peaks[moment.stage] = max(peaks.get(moment.stage, 0), total)
    return {"seconds": last - first, "bytes": highest, "begins": begins, "peaks": peaks, "resident": resident}


def draw(result: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """One row a way, on common axes."""
    ways = result["ways"]
    with written("memory", folder, figsize=(11, 2.3 * len(ways))) as figure:
        rows = figure.subplots(len(ways), 1, sharex=True, sharey=True)
        longest = max(way["seconds"] for way in ways.values())
        for axes, (name, way) in zip(rows, ways.items(), strict=True):
            width = way["seconds"] / len(way["bytes"])
            heights = [size / 2**20 for size in way["bytes"]]
            axes.fill_between([width * i for i in range(len(heights))], heights, step="post", color=COLOURS[name])
            axes.axhline(way["resident"] / 2**20, color="#2b2f36", linewidth=0.8, linestyle=":")
            ends = [*list(way["begins"].values())[1:], way["seconds"]]
            for (stage, begin), end in zip(way["begins"].items(), ends, strict=True):
                axes.axvspan(begin, end, color=_SHADES[stage], zorder=-1)
                if end - begin > 0.04 * longest:
                    place = ((begin + end) / 2, 0.95)
                    axes.annotate(stage, place, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=9)
            stages = ", ".join(f"{stage} {peak / 2**20:.1f}" for stage, peak in way["peaks"].items())
            axes.set_title(f"{name}: {max(way['bytes']) / 2**20:.1f} MiB at most ({stages})")
            axes.set_ylabel("MiB")
            axes.spines[["top", "right"]].set_visible(False)
        rows[0].set_ylim(0, 1.25 * max(max(way["bytes"]) for way in ways.values()) / 2**20)
        rows[0].set_xlim(0, 1.01 * longest)
        rows[-1].set_xlabel("seconds, while being watched; dotted: weights that never leave the device")
        figure.suptitle(f"{result['system']}, small: {result['video']}", x=0.01, ha="left")


assert set(_SHADES) == set(STAGES)
