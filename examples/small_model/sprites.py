"""Procedural clips: coloured sprites that face the way they travel, over a plain landscape.

One frame shows everything that decides the clip but its speed: each sprite moves along its heading, turns round at the
border, and covers `PIXELS_PER_FRAME_AT_127 * motion_bucket_id / 127` pixels from frame to frame. A clip is a pure
function of (seed, index), so a data set is two numbers and a range.

Layout `FCHW` is (frames, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Colour = tuple[int, int, int]
Distance = Callable[[FloatArray, FloatArray], FloatArray]
"""(x, y) in sprite units, nose at +1 on x, y pointing down -> signed distance, negative inside."""

IMAGE_SIZE = 32
NUM_FRAMES = 8
FPS = 7
PIXELS_PER_FRAME_AT_127 = 1.25
MOTION_BUCKETS = (48, 224)
TWO_SPRITES = 0.1
"""The share of clips with a second sprite."""

MIN_RADIUS, MAX_RADIUS = 6.0, 7.5
"""Half a sprite's length in pixels."""

COLOURS: dict[str, Colour] = {
    "red": (222, 44, 44),
    "orange": (245, 140, 20),
    "yellow": (250, 215, 40),
    "green": (40, 165, 70),
    "cyan": (30, 190, 205),
    "blue": (45, 80, 220),
    "violet": (140, 60, 200),
    "pink": (245, 105, 170),
}
BACKDROPS: dict[str, tuple[Colour, Colour, Colour]] = {
    "day": ((150, 205, 250), (225, 242, 255), (140, 200, 120)),
    "dusk": ((120, 95, 165), (250, 190, 150), (110, 85, 90)),
    "sea": ((175, 230, 235), (110, 190, 215), (235, 215, 165)),
    "night": ((22, 26, 60), (60, 65, 115), (40, 55, 60)),
    "desert": ((250, 235, 205), (250, 215, 160), (215, 165, 105)),
}
"""Name -> colours of the sky's top, the sky's bottom, the ground."""

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (25, 25, 30)
GLASS: Colour = (205, 235, 250)
FLAME: Colour = (255, 170, 40)

SIDE_HEADINGS = (0.0, np.pi)
UP_HEADINGS = (-np.pi / 2,)
ALL_HEADINGS = tuple(np.pi / 2 * k for k in range(4))


@dataclass(frozen=True)
class Kind:
    """How one kind of sprite looks and where it may head (radians, clockwise from +x, y pointing down)."""

    layers: tuple[tuple[Distance, str], ...]
    headings: tuple[float, ...]
    upright: bool
    """Drawn from the side: mirrored when it heads left, never rotated."""


@dataclass(frozen=True)
class SpriteSpec:
    """One sprite of a clip: `radius` and `start` (x, y) in pixels, `heading` at frame 0 in radians."""

    kind: str
    colour: str
    radius: float
    start: tuple[float, float]
    heading: float


@dataclass(frozen=True)
class ClipSpec:
    """Everything that a clip is drawn from; `horizon` is the ground's first row in pixels."""

    backdrop: str
    horizon: float
    sprites: tuple[SpriteSpec, ...]
    motion_bucket_id: int

    @property
    def speed(self) -> float:
        """Pixels travelled from one frame to the next."""
        return PIXELS_PER_FRAME_AT_127 * self.motion_bucket_id / 127


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> Distance:
    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)

    return distance


def _polygon(*corners: tuple[float, float]) -> Distance:
    """A convex polygon, corners clockwise on the screen."""

    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        edges = []
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            length = np.hypot(x1 - x0, y1 - y0)
            edges.append(((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length)
        return np.maximum.reduce(edges)

    return distance


KINDS: dict[str, Kind] = {
    "fish": Kind(
        layers=(
            (_polygon((-1.0, -0.6), (-0.35, 0.0), (-1.0, 0.6)), "accent"),
            (_polygon((-0.3, -0.4), (0.0, -0.85), (0.35, -0.4)), "accent"),
            (_ellipse(0.2, 0.0, 0.78, 0.52), "body"),
            (_ellipse(0.58, -0.12, 0.2, 0.2), "white"),
            (_ellipse(0.64, -0.12, 0.1, 0.1), "black"),
        ),
        headings=SIDE_HEADINGS,
        upright=True,
    ),
    "car": Kind(
        layers=(
            (_polygon((-0.7, -0.05), (-0.5, -0.6), (0.2, -0.6), (0.5, -0.05)), "accent"),
            (_polygon((-0.1, -0.1), (-0.1, -0.48), (0.13, -0.48), (0.33, -0.1)), "glass"),
            (_polygon((-1.0, -0.1), (0.6, -0.1), (1.0, 0.08), (1.0, 0.42), (-1.0, 0.42)), "body"),
            (_ellipse(-0.52, 0.42, 0.27, 0.27), "black"),
            (_ellipse(0.52, 0.42, 0.27, 0.27), "black"),
            (_ellipse(0.9, 0.12, 0.13, 0.13), "white"),
        ),
        headings=SIDE_HEADINGS,
        upright=True,
    ),
    "rocket": Kind(
        layers=(
            (_polygon((-1.05, 0.0), (-0.55, -0.22), (-0.55, 0.22)), "flame"),
            (_polygon((-0.7, -0.62), (-0.1, -0.3), (-0.1, 0.3), (-0.7, 0.62)), "accent"),
            (_polygon((-0.6, -0.3), (0.4, -0.3), (0.4, 0.3), (-0.6, 0.3)), "body"),
            (_polygon((0.38, -0.3), (1.0, 0.0), (0.38, 0.3)), "accent"),
            (_ellipse(0.1, 0.0, 0.19, 0.19), "white"),
        ),
        headings=UP_HEADINGS,
        upright=False,
    ),
    "beetle": Kind(
        layers=(
            (_ellipse(0.62, 0.0, 0.36, 0.36), "black"),
            (_ellipse(-0.15, 0.0, 0.8, 0.68), "body"),
            (_polygon((-0.95, -0.06), (0.65, -0.06), (0.65, 0.06), (-0.95, 0.06)), "black"),
            (_ellipse(-0.15, -0.36, 0.17, 0.17), "black"),
            (_ellipse(-0.15, 0.36, 0.17, 0.17), "black"),
            (_ellipse(0.82, -0.2, 0.11, 0.11), "white"),
            (_ellipse(0.82, 0.2, 0.11, 0.11), "white"),
        ),
        headings=ALL_HEADINGS,
        upright=False,
    ),
}


def _layer_colour(role: str, colour: str) -> Colour:
    fixed = {"white": WHITE, "black": BLACK, "glass": GLASS, "flame": FLAME}
    if role in fixed:
        return fixed[role]
    names = list(COLOURS)
    return COLOURS[names[(names.index(colour) + 3) % len(names)] if role == "accent" else colour]


def _sample_sprite(rng: np.random.Generator) -> SpriteSpec:
    kind = str(rng.choice(list(KINDS)))
    radius = float(rng.uniform(MIN_RADIUS, MAX_RADIUS))
    heading = float(rng.choice(KINDS[kind].headings))
    offset = rng.uniform(-1, 1, size=2) * (IMAGE_SIZE / 2 - radius)
    if rng.random() < 0.75 and offset @ np.array([np.cos(heading), np.sin(heading)]) > 0:
        offset = -offset
    start = offset + IMAGE_SIZE / 2
    return SpriteSpec(kind, str(rng.choice(list(COLOURS))), radius, (float(start[0]), float(start[1])), heading)


def sample_clip(seed: int, index: int) -> ClipSpec:
    """Draw clip `index` of the data set `seed`: one or two sprites, apart at frame 0, most heading inwards."""
    rng = np.random.default_rng([seed, index])
    sprites: list[SpriteSpec] = []
    num_sprites = 1 + int(rng.random() < TWO_SPRITES)
    while len(sprites) < num_sprites:
        sprite = _sample_sprite(rng)
        if all(np.hypot(*np.subtract(sprite.start, other.start)) > 0.8 * 2 * MAX_RADIUS for other in sprites):
            sprites.append(sprite)
    return ClipSpec(
        backdrop=str(rng.choice(list(BACKDROPS))),
        horizon=float(rng.uniform(0.6, 0.9) * IMAGE_SIZE),
        sprites=tuple(sprites),
        motion_bucket_id=int(rng.integers(MOTION_BUCKETS[0], MOTION_BUCKETS[1] + 1)),
    )


def trajectory(sprite: SpriteSpec, speed: float, num_frames: int = NUM_FRAMES) -> tuple[FloatArray, FloatArray]:
    """Return centres (frames, 2) in pixels and unit directions (frames, 2) of a sprite that bounces at the border."""
    direction = np.array([np.cos(sprite.heading), np.sin(sprite.heading)])
    travelled = np.arange(num_frames)[:, None] * speed * direction
    span = IMAGE_SIZE - 2 * sprite.radius
    unfolded = np.asarray(sprite.start) - sprite.radius + travelled
    phase = np.mod(unfolded, 2 * span)
    returning = phase > span
    centres = np.where(returning, 2 * span - phase, phase) + sprite.radius
    directions = np.where(returning, -direction, direction)
    return centres.astype(np.float32), directions.astype(np.float32)


def paint(frames: FloatArray, looks: tuple[str, str, float], centres: FloatArray, directions: FloatArray) -> None:
    """Paint a sprite that looks like (kind, colour, radius) over `frames` (FCHW, 0..255) in place.

    It is anti-aliased over one pixel; `centres` and `directions` are (frames, 2), as of `trajectory`.
    """
    name, colour_name, radius = looks
    kind = KINDS[name]
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + np.float32(0.5)
    dx = (columns - centres[:, 0, None, None]) / radius
    dy = (rows - centres[:, 1, None, None]) / radius
    cos, sin = directions[:, 0, None, None], directions[:, 1, None, None]
    if kind.upright:
        x, y = dx * np.sign(cos), dy
    else:
        x, y = dx * cos + dy * sin, dy * cos - dx * sin
    for distance, role in kind.layers:
        coverage = np.clip(0.5 - distance(x, y) * radius, 0, 1)[:, None]
        colour = np.asarray(_layer_colour(role, colour_name), dtype=np.float32)[:, None, None]
        frames += coverage * (colour - frames)


def backdrop_column(backdrop: str, horizon: float) -> FloatArray:
    """Return one column of a bare backdrop, (3, height) in 0..255; all its columns are alike."""
    top, bottom, ground = (np.asarray(colour, dtype=np.float32) for colour in BACKDROPS[backdrop])
    rows = np.arange(IMAGE_SIZE, dtype=np.float32)
    mix = np.clip(rows / horizon, 0, 1)[:, None]
    sky = top + mix * (bottom - top)
    column: FloatArray = sky + np.clip(rows + 1 - horizon, 0, 1)[:, None] * (ground - sky)
    return column.T


def render_clip(spec: ClipSpec, num_frames: int = NUM_FRAMES) -> NDArray[np.uint8]:
    """Render a clip as uint8 FCHW (RGB)."""
    column = backdrop_column(spec.backdrop, spec.horizon)
    frames = np.broadcast_to(column[None, :, :, None], (num_frames, 3, IMAGE_SIZE, IMAGE_SIZE)).copy()
    for sprite in spec.sprites:
        centres, directions = trajectory(sprite, spec.speed, num_frames)
        paint(frames, (sprite.kind, sprite.colour, sprite.radius), centres, directions)
    return np.rint(frames).astype(np.uint8)


def render_clips(seed: int, indices: range) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render many clips: uint8 (clips, frames, 3, height, width) and their motion bucket ids (clips,)."""
    specs = [sample_clip(seed, index) for index in indices]
    frames = np.stack([render_clip(spec) for spec in specs])
    return frames, np.array([spec.motion_bucket_id for spec in specs])
