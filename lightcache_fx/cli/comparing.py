"""What `compare` prints, and the limits that it holds figures against."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table

from lightcache_fx.errors import QualityError, nearest
from lightcache_fx.quality import MEASURES, NotAvailable, PerPair, Quality

_DIRECTIONS = {**MEASURES, "max_difference": "lower"}
_TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "flip": "FLIP",
    "lpips": "LPIPS",
    "temporal": "temporal difference",
    "warping": "warping error",
}


@dataclass(frozen=True)
class Limit:
    """A figure, and the value that it must reach or keep.

    Attributes:
        figure: `psnr`, or `psnr.worst`.
        value: the least or the most.
        is_least: which of the two.
    """

    figure: str
    value: float
    is_least: bool


def read_limits(below: Sequence[str], above: Sequence[str], measures: Collection[str] | None) -> list[Limit]:
    """`psnr=30` and the like, as options have them.

    Args:
        below: least values, of measures that are better when higher.
        above: most values, of the others.
        measures: those that are taken; None for all.

    Raises:
        QualityError: another form, an unknown figure, one of the other kind, or one that is not taken.
    """
    return [_read_limit(text, True, measures) for text in below] + [
        _read_limit(text, False, measures) for text in above
    ]


def _read_limit(text: str, is_least: bool, measures: Collection[str] | None) -> Limit:
    option = "--fail-below" if is_least else "--fail-above"
    figure, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        example = "psnr=30" if is_least else "flip=0.05"
        raise QualityError(f"{option} must read NAME=NUMBER, such as {example}; got {text!r}")
    name, dot, which = figure.partition(".")
    if name not in _DIRECTIONS or (dot and (which not in ("mean", "worst") or name == "max_difference")):
        known = ", ".join(_DIRECTIONS)
        raise QualityError(f"{option}: no figure {figure!r}{nearest(name, _DIRECTIONS)}; there are {known}")
    if (_DIRECTIONS[name] == "higher") != is_least:
        better, other = _DIRECTIONS[name], "--fail-above" if is_least else "--fail-below"
        raise QualityError(f"{option} {text}: {name} is better when {better}, so its limit is given by {other}")
    if measures is not None and name in MEASURES and name not in measures:
        raise QualityError(f"{option} {text}: add --measure {name}, or it is not measured")
    return Limit(figure, value, is_least)


def failures(quality: Quality, limits: Sequence[Limit]) -> list[str]:
    """One line for each limit that is not kept.

    Raises:
        QualityError: a figure that a limit is of is not available.
    """
    found = []
    for limit in limits:
        value = quality.figure(limit.figure)
        if value < limit.value if limit.is_least else value > limit.value:
            found.append(f"{limit.figure} is {value:.4g}, {'below' if limit.is_least else 'above'} {limit.value:g}")
    return found


def quality_table(quality: Quality) -> Iterator[RenderableType]:
    """The table, and a line for what is not in it."""
    size = f"{quality.num_frames} frames of {quality.width} x {quality.height}"
    table = Table(title=f"accelerated against plain, {size}", title_justify="left")
    for column in ("measure", "mean", "worst", "at frame", "plain alone"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    missing = []
    for name, found in quality.measured().items():
        if isinstance(found, NotAvailable):
            missing.append(f"{_TITLES[name]}: not available, {found.not_available}")
            continue
        alone = _number(found.reference) if isinstance(found, PerPair) else ""
        cells = (_number(found.mean), _number(found.worst), str(found.worst_frame), alone)
        better = "↑" if MEASURES[name] == "higher" else "↓"
        table.add_row(f"{_TITLES[name]} {better}", *cells)
    yield table
    yield from missing
    same = "; the videos are identical" if quality.identical else ""
    yield f"largest difference of a pixel's channel: {_number(quality.max_difference)}{same}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
