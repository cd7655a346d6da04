"""Read a generated clip back: which sprite, where, on which backdrop, by finding the drawing that fits each frame best.

There is no real clip to compare a text-to-video clip with, for the words leave much open. But whatever the clip shows
can be drawn again by `sprites`, and the drawing says what it is: kind, colour, heading, place and size are read from
the one that fits best, and how well it fits says how clean the frame is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from examples.small_model.captions import PACES, heading_name, ninth, pace, pace_range
from examples.small_model.measures import SPRITE_CONTRAST, Frames, centres
from examples.small_model.sprites import (
    BACKDROPS,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    MAX_RADIUS,
    MIN_RADIUS,
    PIXELS_PER_FRAME_AT_127,
    ClipSpec,
    FloatArray,
    SpriteSpec,
    backdrop_column,
    paint,
)

HORIZONS = np.arange(0.55, 0.95, 0.0125) * IMAGE_SIZE
RADII = tuple(np.linspace(MIN_RADIUS, MAX_RADIUS, 4))


@dataclass(frozen=True)
class Reading:
    """What one frame shows, and the mean squared difference (of 0..255) from a drawing of just that."""

    sprite: SpriteSpec
    error: float


def read_backdrop(frames: Frames) -> tuple[str, float]:
    """Return the backdrop and the horizon whose column is nearest to the clip's, that of medians over its columns."""
    column = np.median(frames.astype(np.float32), axis=(0, 3))
    candidates = list(product(BACKDROPS, HORIZONS))
    errors = [np.abs(backdrop_column(name, horizon) - column).mean() for name, horizon in candidates]
    name, horizon = candidates[int(np.argmin(errors))]
    return name, float(horizon)


def _headings(kind: str) -> list[float]:
    """All headings that a sprite of this kind has, the ones after it turned round too."""
    return sorted({round(float(h + turn) % (2 * np.pi), 6) for h in KINDS[kind].headings for turn in (0, np.pi)})


def _fit(
    frame: FloatArray,
    bare: FloatArray,
    kinds: list[str],
    colours: list[str],
    radii: tuple[float, ...],
    grid: FloatArray,
) -> Reading:
    """Draw every combination at every centre of `grid` (centres, 2) and return the nearest to `frame` (CHW)."""
    best: Reading | None = None
    for kind, colour, radius in product(kinds, colours, radii):
        headings = _headings(kind)
        places = np.tile(grid, (len(headings), 1))
        angles = np.repeat(headings, len(grid))
        drawn = np.broadcast_to(bare, (len(places), *bare.shape)).copy()
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1).round(6).astype(np.float32)
        paint(drawn, (kind, colour, radius), places, directions)
        errors = np.square(drawn - frame).mean(axis=(1, 2, 3))
        nearest = int(np.argmin(errors))
        if best is None or errors[nearest] < best.error:
            x, y = (float(coordinate) for coordinate in places[nearest])
            best = Reading(SpriteSpec(kind, colour, radius, (x, y), float(angles[nearest])), float(errors[nearest]))
    assert best is not None
    return best


def _grid(centre: NDArray[np.float64], reach: int, step: float) -> FloatArray:
    offsets = np.arange(-reach, reach + 1) * step
    return np.array([np.add(centre, (dx, dy)) for dx, dy in product(offsets, offsets)], dtype=np.float32)


def read_frame(frame: Frames, backdrop: tuple[str, float]) -> Reading | None:
    """Return what a frame (CHW) shows before its backdrop, or nothing where no pixel differs from it."""
    column = backdrop_column(*backdrop)
    bare = np.broadcast_to(column[:, :, None], frame.shape).astype(np.float32)
    mask = np.abs(frame.astype(np.float32) - bare).max(axis=0) > SPRITE_CONTRAST
    if not mask.any():
        return None
    centre = centres(mask[None])[0] + 0.5
    target = frame.astype(np.float32)
    mean_radius = ((MIN_RADIUS + MAX_RADIUS) / 2,)
    coarse = _fit(target, bare, list(KINDS), list(COLOURS), mean_radius, _grid(centre, reach=1, step=1.5))
    found = coarse.sprite
    for step in (0.75, 0.25):
        grid = _grid(np.array(found.start), reach=2, step=step)
        found = _fit(target, bare, [found.kind], [found.colour], RADII, grid).sprite
    return _fit(target, bare, [found.kind], [found.colour], (found.radius,), np.array([found.start], dtype=np.float32))


def _outside(value: float, low: float, high: float) -> float:
    return max(low - value, 0.0, value - high)


def _speed_error(sprites: list[SpriteSpec], spec: ClipSpec) -> float:
    """Return the pixels a frame by which the clip is slower or faster than the pace that the caption names.

    The speed is the median of the steps forward between frames that face the same way.
    """
    steps = [
        float(np.subtract(after.start, before.start) @ (np.cos(before.heading), np.sin(before.heading)))
        for before, after in pairwise(sprites)
        if before.heading == after.heading
    ]
    low, high = (PIXELS_PER_FRAME_AT_127 * bucket / 127 for bucket in pace_range(PACES[pace(spec.motion_bucket_id)]))
    return _outside(float(np.median(steps)), low, high) if steps else high


def compare_with_words(frames: Frames, spec: ClipSpec) -> dict[str, float]:
    """Compare a clip (FCHW) with the caption of `spec`, a clip of one sprite.

    Shares of the frames that show the right kind and colour; whether backdrop and first heading are right (0 or 1);
    pixels that the first place lies outside the ninth named, and pixels a frame that the speed lies outside the range
    named; the share of frames without a sprite; PSNR against the drawings that fit best.
    """
    (asked,) = spec.sprites
    backdrop = read_backdrop(frames)
    readings = [reading for frame in frames if (reading := read_frame(frame, backdrop)) is not None]
    result = {"backdrop": float(backdrop[0] == spec.backdrop), "lost": 1 - len(readings) / len(frames)}
    if not readings:
        return result | {"kind": 0.0, "colour": 0.0, "heading": 0.0, "place_px": float(IMAGE_SIZE), "speed_px": 2.0,
                         "psnr_db": 0.0}  # fmt: skip
    sprites = [reading.sprite for reading in readings]
    first = sprites[0]
    row, column = ninth(asked.start)
    ninth_size = IMAGE_SIZE / 3
    away = [
        _outside(place, n * ninth_size, (n + 1) * ninth_size)
        for place, n in zip(first.start, (column, row), strict=True)
    ]
    return result | {
        "kind": float(np.mean([sprite.kind == asked.kind for sprite in sprites])),
        "colour": float(np.mean([sprite.colour == asked.colour for sprite in sprites])),
        "heading": float(heading_name(first.heading) == heading_name(asked.heading)),
        "place_px": float(np.hypot(*away)),
        "speed_px": _speed_error(sprites, spec),
        "psnr_db": float(10 * np.log10(255**2 / max(np.mean([reading.error for reading in readings]), 1e-9))),
    }
