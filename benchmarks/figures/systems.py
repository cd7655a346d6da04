"""Speed and memory of the published systems against others' ways (the LightCache paper's figure 1).

Drawn from what `python -m benchmarks.systems` has measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.figures.style import COLOURS, FOLDER, written

OURS = ("cached", "lightcache-no-swap", "lightcache")
SAME_DB = 80
"""Above it a video differs from the plain one by rounding."""


def cells_of(system: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The ways of a system that were measured."""
    return {name: cell for name, cell in system["cells"].items() if "speedup" in cell}


def draw(result: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """One panel a system: how fast, and how much memory at most. Filled: the plain video, but for rounding."""
    systems = result["systems"]
    columns = 3
    rows = -(-len(systems) // columns)
    with written("systems", folder, figsize=(4.6 * columns, 3.5 * rows)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, system) in zip(panels, systems.items(), strict=False):
            _draw_system(axes, name, cells_of(system))
        for axes in panels[len(systems) :]:
            axes.set_axis_off()
        for axes in panels[-columns:]:
            axes.set_xlabel("times as fast as plain")
        for axes in panels[::columns]:
            axes.set_ylabel("peak, MiB")


def _draw_system(axes: Axes, name: str, cells: Mapping[str, Mapping[str, Any]]) -> None:
    places = {way: (cell["speedup"]["median"], max(cell["peak_bytes"].values()) / 2**20) for way, cell in cells.items()}
    for way, cell in cells.items():
        quality = cell["quality"]
        same = quality["identical"] or quality["psnr"] is None or quality["psnr"] > SAME_DB
        face = _colour(way) if same else "white"
        axes.plot(*places[way], "o", color=_colour(way), markerfacecolor=face, markersize=7)
    for ways in _close_together(places):
        below = -12 if ways[0] in OURS else 5
        where = {"xytext": (6, below), "textcoords": "offset points"}
        axes.annotate(", ".join(ways), places[ways[0]], fontsize=8, color=_colour(ways[0]), **where)
    axes.set_title(name)
    axes.set_ylim(0, 1.15 * max(peak for _, peak in places.values()))
    axes.margins(x=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)


def _colour(way: str) -> str:
    return COLOURS["ours" if way in OURS else "DeepCache" if way == "deepcache" else "plain"]


def _close_together(places: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Ways of one colour whose points would have labels on top of each other, gathered."""
    width = max(x for x, _ in places.values()) - min(x for x, _ in places.values()) or 1.0
    height = max(y for _, y in places.values())
    groups: list[list[str]] = []
    for way, (x, y) in sorted(places.items(), key=lambda item: item[1]):
        for group in groups:
            other = places[group[-1]]
            near = abs(other[0] - x) < 0.12 * width and abs(other[1] - y) < 0.05 * height
            if near and _colour(way) == _colour(group[0]):
                group.append(way)
                break
        else:
            groups.append([way])
    return groups
