"""How far accelerated videos are from plain ones, over many clips (the LightCache paper's figure 5).

Each held-out first frame is continued by the trained small model as it is, and then with one step in so many computed
in full: by our programs, and by the PyPI package `DeepCache`, at the same branch. The plain video is the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableVideoDiffusionPipeline
from matplotlib.axes import Axes

import lightcache_fx as lc
from benchmarks.common import environment
from benchmarks.figures.style import COLOURS, FOLDER, written
from examples.small_model import sample
from lightcache_fx.quality import compare_videos

STEPS = 25
BRANCH = 0
INTERVALS = (2, 3, 5, 8)
MEASURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "flip": "FLIP, less is closer"}


@contextmanager
def ours(pipe: StableVideoDiffusionPipeline, interval: int) -> Iterator[StableVideoDiffusionPipeline]:
    """By our programs."""
    yield lc.transform_pipeline(pipe, lc.Policy.deepcache(interval=interval, branch=BRANCH))


@contextmanager
def deepcache(pipe: StableVideoDiffusionPipeline, interval: int) -> Iterator[StableVideoDiffusionPipeline]:
    """By the package, which patches the pipeline while it is enabled."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=BRANCH)
    helper.enable()
    try:
        yield pipe
    finally:
        helper.disable()


WAYS: Mapping[str, Callable[..., Any]] = {"ours": ours, "DeepCache": deepcache}


def measure(clips: int, work: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Every way at every interval; clips that a file under `work` has already are not made again."""
    pipe = sample.load_pipeline()
    work.mkdir(parents=True, exist_ok=True)
    plain: dict[int, Any] = {}
    scores: dict[str, dict[str, list[dict[str, float]]]] = {way: {} for way in WAYS}
    for way, accelerated in WAYS.items():
        for interval in INTERVALS:
            path = work / f"{way}-{interval}-{clips}.json"
            if not path.exists():
                with accelerated(pipe, interval) as fast:
                    videos = [_video(fast, index) for index in range(clips)]
                for index in range(clips):
                    if index not in plain:
                        plain[index] = _video(pipe, index)
                rows = [_scores(plain[index], video) for index, video in enumerate(videos)]
                path.write_text(json.dumps(rows), encoding="utf-8")
            scores[way][str(interval)] = json.loads(path.read_text(encoding="utf-8"))
            log(f"{way}, interval {interval}: {_median(scores[way][str(interval)], 'psnr'):.1f} dB")
    return {
        "environment": environment(),
        "steps": STEPS,
        "branch": BRANCH,
        "clips": clips,
        "flop_speedup": _speedups(pipe),
        "scores": scores,
    }


def _video(pipe: StableVideoDiffusionPipeline, index: int) -> Any:
    spec = sample.heldout_clip(index)
    return sample.generate(pipe, spec, steps=STEPS, max_guidance_scale=1.5, seed=index)


def _scores(plain: Any, accelerated: Any) -> dict[str, float]:
    one, other = (frames.transpose(0, 2, 3, 1) for frames in (plain, accelerated))
    found = compare_videos(one, other, measures=tuple(MEASURES))
    return {name: float(getattr(found, name).mean) for name in MEASURES}


def _speedups(pipe: StableVideoDiffusionPipeline) -> dict[str, float]:
    """How much faster a run could be by FLOPs alone, at each interval."""
    found = {}
    for interval in INTERVALS:
        with ours(pipe, interval) as fast:
            sample.generate(fast, sample.heldout_clip(0), steps=interval + 1, max_guidance_scale=1.5, seed=0)
            found[str(interval)] = round(lc.inspect(fast.unet).plan.flop_bound_speedup(STEPS), 3)
    return found


def _median(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


def draw(result: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Violins: the distribution over clips at each interval, ours beside the package's."""
    with written("quality", folder, figsize=(12, 3.9)) as figure:
        for axes, (name, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            for number, (way, by_interval) in enumerate(result["scores"].items()):
                places = np.arange(len(by_interval)) + (number - 0.5) * 0.4
                _violins(axes, places, [[row[name] for row in rows] for rows in by_interval.values()], COLOURS[way])
            speedups = result["flop_speedup"]
            labels = [f"{interval}\n{speedups[interval]:.2f}×" for interval in speedups]
            axes.set_xticks(range(len(labels)), labels)
            axes.set(title=label, xlabel="interval, and speed-up by FLOPs")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
            axes.set_axisbelow(True)
        handles = [mpl_patch(COLOURS[way], way) for way in result["scores"]]
        figure.axes[0].legend(handles=handles, frameon=False)
        figure.suptitle(
            f"{result['clips']} held-out clips of the trained small model, {result['steps']} steps, branch"
            f" {result['branch']}; against the plain video",
            x=0.01,
            ha="left",
        )


def mpl_patch(colour: str, label: str) -> Any:
    """An entry of a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.6, label=label)


def _violins(axes: Axes, places: np.ndarray, values: list[list[float]], colour: str) -> None:
    parts = axes.violinplot(values, places, widths=0.36, showextrema=False)
    for body in parts["bodies"]:
        body.set(facecolor=colour, edgecolor=colour, alpha=0.6)
    for place, each in zip(places, values, strict=True):
        low, middle, high = np.percentile(each, (25, 50, 75))
        axes.vlines(place, low, high, color=colour, linewidth=3)
        axes.plot(place, middle, "o", color="white", markeredgecolor=colour, markersize=5)
