"""Where the sprite of a clip is, what colour it has, and how far two clips are apart. Clips are uint8 FCHW."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from examples.small_model.sprites import ClipSpec, render_clip

Frames = NDArray[np.uint8]

SPRITE_CONTRAST = 40
"""A pixel belongs to a sprite where it differs by more than this (of 255, in one channel) from the bare backdrop."""


def sprite_mask(frames: Frames, spec: ClipSpec) -> NDArray[np.bool_]:
    """Return where `frames` differ from the clip's bare backdrop: (frames, height, width)."""
    backdrop = render_clip(replace(spec, sprites=()), num_frames=1).astype(np.int16)
    return np.abs(frames.astype(np.int16) - backdrop).max(axis=1) > SPRITE_CONTRAST


def centres(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean (x, y) in pixels of each frame's mask, nan where it is empty: (frames, 2)."""
    rows, columns = np.mgrid[0 : mask.shape[1], 0 : mask.shape[2]]
    area = mask.sum(axis=(1, 2))
    moments = np.stack([(mask * columns).sum(axis=(1, 2)), (mask * rows).sum(axis=(1, 2))], axis=1)
    return np.where(area[:, None] > 0, moments / np.maximum(area, 1)[:, None], np.nan)


def mean_colour(frames: Frames, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean colour of the masked pixels of all frames, 0..255: (3,)."""
    return frames.transpose(0, 2, 3, 1)[mask].mean(axis=0)


def psnr_db(frames: Frames, real: Frames) -> float:
    """Return the peak signal-to-noise ratio of `frames` against `real` in dB."""
    error = np.square(frames.astype(np.float64) - real).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
