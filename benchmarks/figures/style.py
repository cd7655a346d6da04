"""What the figures have in common: colours, sizes, and where they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
COLOURS = {"plain": "#7a8799", "DeepCache": "#3b7dd8", "ours": "#e0662f"}
INK = "#2b2f36"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa3ae",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "lightcache_fx",  # or the ids of each SVG would be others
    "svg.fonttype": "none",
}


@contextmanager
def written(name: str, folder: Path = FOLDER, **settings: Any) -> Iterator[Figure]:
    """A figure to draw on, written as PNG and SVG when that is done."""
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained", **settings)
        yield figure
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=144)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
