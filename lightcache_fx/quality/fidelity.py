"""Frame by frame, pixel for pixel: PSNR and SSIM, by scikit-image."""

from __future__ import annotations

import math

from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lightcache_fx.quality.results import NotAvailable, PerFrame
from lightcache_fx.quality.videos import Frames

WINDOW = 7
"""Pixels of a side of the windows that SSIM looks at: scikit-image's default."""


def psnr(plain: Frames, accelerated: Frames) -> PerFrame:
    """Peak signal-to-noise ratio in dB; the mean is that of the mean squared error over all pixels, as ffmpeg's."""
    frames = [_decibels(a, b) for a, b in zip(plain, accelerated, strict=True)]
    return PerFrame.of(frames, "higher", _decibels(plain, accelerated))


def _decibels(a: Frames, b: Frames) -> float:
    return float(peak_signal_noise_ratio(a, b, data_range=1.0)) if (a != b).any() else math.inf


def ssim(plain: Frames, accelerated: Frames) -> PerFrame | NotAvailable:
    """Structural similarity (Wang et al. 2004) with uniform windows, the mean of the channels."""
    height, width = plain.shape[1:3]
    if min(height, width) < WINDOW:
        return NotAvailable(not_available=f"frames of {width} x {height} are smaller than its windows of 7 x 7")
    frames = [
        float(structural_similarity(a, b, data_range=1.0, channel_axis=-1, win_size=WINDOW))
        for a, b in zip(plain, accelerated, strict=True)
    ]
    return PerFrame.of(frames, "higher")
