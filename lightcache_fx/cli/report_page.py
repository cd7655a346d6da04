"""One self-contained HTML page of what a run of the demo left in its folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from lightcache_fx.errors import ArgumentError
from lightcache_fx.quality import Frames, compare_videos, read_video
from lightcache_fx.quality.results import PerFrame
from lightcache_fx.units import format_bytes

FILES = ("report.json", "details.json", "frames.npz")
"""What a run leaves, of which the page is made."""
_STAGES = {"encode": "#eef1f4", "denoise": "#e1eaf6", "decode": "#f6ece6"}
_WIDTH, _HEIGHT = 420, 170


def page(folder: Path) -> str:
    """The page, which needs no other file.

    Raises:
        ArgumentError: the folder lacks one of `FILES`, or holds one that is not what the demo writes.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ArgumentError(
            f"{folder} has no {', '.join(missing)}: name a folder that a run left, as `make demo` leaves out/demo"
        )
    plain, fast = (read_video(f"{folder / 'frames.npz'}:{name}") for name in ("plain", "accelerated"))
    try:
        report, details = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES[:2])
        facts = _facts(report, details, plain, fast)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{folder}: its files are not as the demo writes them ({error!r}); run it again") from None
    template = resources.files("lightcache_fx.cli").joinpath("report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(template).render(facts)


def _facts(report: dict[str, Any], details: dict[str, Any], plain: Frames, fast: Frames) -> dict[str, Any]:
    difference = np.abs(plain - fast)
    factor = 1 / max(float(difference.max()), 1e-6)
    panels = {"plain": plain, "accelerated": fast, f"difference × {factor:.3g}": difference * factor}
    settings, speedup = report["settings"], report["speedup"]["pipeline"]
    slowest = max(seconds["total"] for seconds in report["seconds"].values())
    highest = max(max(memory["bytes"]) for memory in details["memory"].values())
    return {
        "title": "Plain and accelerated",
        "summary": f"{settings['steps']} steps, seed {settings['seed']}, torch {settings['torch']}: {speedup:.2f} times"
        " as fast as plain, end to end, in this run.",
        "notes": report["notes"],
        "videos": [{"name": name, "uri": _sheet(frames)} for name, frames in panels.items()],
        "count": len(plain),
        "height": plain.shape[1],
        "width": plain.shape[2],
        "fps": int(details["fps"]),
        "stages": {name: _bar(seconds, slowest) for name, seconds in report["seconds"].items()},
        "memory": [_memory(name, memory, highest) for name, memory in details["memory"].items()],
        "policy": settings["policy"],
        "plan": details["plan"],
        "modules": by_module(details["diff"]),
        "quality": _quality(plain, fast),
    }


def _sheet(frames: Frames) -> str:
    """All frames below one another, as a PNG in a data URI."""
    pixels = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(pixels))).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _bar(seconds: Mapping[str, float], slowest: float) -> dict[str, Any]:
    total = seconds["total"]
    parts = [{"name": name, "seconds": seconds[name], "share": 100 * seconds[name] / total} for name in _STAGES]
    return {"total": total, "share": 100 * total / slowest, "parts": parts}


def _memory(name: str, memory: Mapping[str, Any], highest: int) -> dict[str, Any]:
    heights, step = memory["bytes"], _WIDTH / len(memory["bytes"])
    outline = [(i * step, _HEIGHT - 0.95 * _HEIGHT * size / max(highest, 1)) for i, size in enumerate(heights)]
    points = [(0.0, _HEIGHT), *outline, (_WIDTH, _HEIGHT)]
    begins = {stage: _WIDTH * share for stage, share in memory["begins"].items()}
    ends = [*list(begins.values())[1:], _WIDTH]
    bands = [
        {"name": stage, "x": round(begin, 1), "width": round(end - begin, 1), "fill": _STAGES[stage]}
        for (stage, begin), end in zip(begins.items(), ends, strict=True)
    ]
    alive = [{**item, "size": format_bytes(item["bytes"])} for item in memory["alive"]]
    peak = format_bytes(max(heights))
    return {"name": name, "peak": peak, "bands": bands, "points": _points(points), "alive": alive} | {
        "stage": memory["stage"]
    }


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def by_module(diff: Sequence[str]) -> list[dict[str, Any]]:
    """A unified diff's lines, gathered by the first two parts of their modules' paths, in order of appearance.

    Args:
        diff: lines of `lightcache_fx.printer.diff` with `modules=True`.
    """
    groups: dict[str, list[str]] = {}
    for line in diff[2:]:
        if line.startswith("@@"):
            continue
        _, _, path = line.partition("  # ")
        groups.setdefault(".".join(path.split(".")[:2]) or "(the model itself)", []).append(line)
    found = [
        {"name": name, "lines": lines, "gone": _count(lines, "-"), "new": _count(lines, "+")}
        for name, lines in groups.items()
    ]
    return [group for group in found if group["gone"] or group["new"]]


def _count(lines: Sequence[str], sign: str) -> int:
    return sum(line.startswith(sign) for line in lines)


def _quality(plain: Frames, fast: Frames) -> list[dict[str, Any]]:
    quality = compare_videos(plain, fast, measures=("psnr", "ssim"))
    if quality.identical:
        return []
    charts = []
    for name, found in (("PSNR, dB", quality.psnr), ("SSIM", quality.ssim)):
        if not isinstance(found, PerFrame):
            continue
        figures = np.array(found.frames)
        finite = figures[np.isfinite(figures)]
        least, most = float(finite.min()), float(finite.max())
        across = 400 / max(len(figures) - 1, 1)
        points = [
            (10 + i * across, 140 - 125 * (min(float(figure), most) - least) / ((most - least) or 1))
            for i, figure in enumerate(figures)
        ]
        charts.append({"name": name, "least": f"{least:.4g}", "most": f"{most:.4g}", "points": _points(points)})
    return charts
