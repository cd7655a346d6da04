"""What a clip shows, in words: the prompt that a text-to-video model is trained and asked with.

    a red fish swims slowly right from the upper left at sea

Every caption of one sprite has the same number of words, so that one captured graph serves them all. What the words
leave open (the place within a ninth of the picture, the speed within a third of its range, the size, the horizon) is
for the noise to decide.
"""

from __future__ import annotations

import math
from itertools import count, islice

from examples.small_model.sprites import (
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    MOTION_BUCKETS,
    ClipSpec,
    SpriteSpec,
    sample_clip,
)

VERBS = {"fish": "swims", "car": "drives", "rocket": "flies", "beetle": "crawls"}
HEADINGS = ("right", "down", "left", "up")
"""Quarter turns clockwise from +x, y pointing down."""
PACES = ("slowly", "steadily", "quickly")
ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "centre", "right")
SETTINGS = {
    "day": ("by", "day"),
    "dusk": ("at", "dusk"),
    "sea": ("at", "sea"),
    "night": ("at", "night"),
    "desert": ("on", "sand"),
}

WORDS: tuple[str, ...] = tuple(
    sorted(
        {"a", "and", "from", "the", *COLOURS, *KINDS, *VERBS.values(), *PACES, *HEADINGS, *ROWS, *COLUMNS}
        | {word for words in SETTINGS.values() for word in words}
    )
)
"""All words that a caption can have."""

NUM_WORDS = 12
"""Of a caption of one sprite."""


def pace(motion_bucket_id: int) -> int:
    """Return the third of the range of speeds that a clip's is in: 0 to 2."""
    low, high = MOTION_BUCKETS
    return min(2, 3 * (motion_bucket_id - low) // (high + 1 - low))


def pace_range(name: str) -> tuple[float, float]:
    """Return the lowest and the highest `motion_bucket_id` that a pace stands for."""
    low, high = MOTION_BUCKETS
    third = (high + 1 - low) / 3
    index = PACES.index(name)
    return low + index * third, min(high, low + (index + 1) * third)


def ninth(point: tuple[float, float]) -> tuple[int, int]:
    """Return the row and the column, 0 to 2, of the ninth of the picture that (x, y) in pixels is in."""
    column, row = (min(2, max(0, int(3 * coordinate / IMAGE_SIZE))) for coordinate in point)
    return row, column


def heading_name(heading: float) -> str:
    """Return the word for a heading in radians."""
    return HEADINGS[round(heading / (math.pi / 2)) % 4]


def _sprite_caption(sprite: SpriteSpec, pace_name: str) -> str:
    row, column = ninth(sprite.start)
    return (
        f"a {sprite.colour} {sprite.kind} {VERBS[sprite.kind]} {pace_name} {heading_name(sprite.heading)}"
        f" from the {ROWS[row]} {COLUMNS[column]}"
    )


def caption(spec: ClipSpec) -> str:
    """Return the caption of a clip."""
    pace_name = PACES[pace(spec.motion_bucket_id)]
    sprites = " and ".join(_sprite_caption(sprite, pace_name) for sprite in spec.sprites)
    return f"{sprites} {' '.join(SETTINGS[spec.backdrop])}"


def single_clips(seed: int, num_clips: int) -> list[ClipSpec]:
    """Return the first `num_clips` clips of one sprite of the data set `seed`."""
    specs = (sample_clip(seed, index) for index in count())
    return list(islice((spec for spec in specs if len(spec.sprites) == 1), num_clips))
