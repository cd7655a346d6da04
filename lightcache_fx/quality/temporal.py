"""Between frames: how differently two videos change, and how well one follows the other's motion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.registration import optical_flow_ilk
from skimage.transform import warp

from lightcache_fx.quality.results import NotAvailable, PerPair
from lightcache_fx.quality.videos import Frames

MIN_SIZE = 16
"""Pixels of a side; the optical flow's windows are 15 x 15."""
_ONE_FRAME = NotAvailable(not_available="there is only one frame")

Flow = NDArray[np.float32]
"""(2, height, width): by how many rows and columns each pixel moves."""


def temporal(plain: Frames, accelerated: Frames) -> PerPair | NotAvailable:
    """The difference between the videos' frame differences, its root mean square over pixels and channels.

    It is 0 where the accelerated video differs from the plain one alike in every frame, and grows with flicker;
    `reference` is the root mean square of the plain video's own frame differences. Source: dtSSD of Erofeev et al.,
    "Perceptually Motivated Benchmark for Video Matting", BMVC 2015, here divided by the number of pixels.
    """
    if len(plain) < 2:
        return _ONE_FRAME
    changes = np.diff(plain.astype(np.float64), axis=0)
    differences = np.diff(accelerated.astype(np.float64), axis=0) - changes
    return PerPair.of_pairs(_root_mean_squares(differences), _root_mean_squares(changes))


def _root_mean_squares(frames: NDArray[np.float64]) -> list[float]:
    means: list[float] = np.sqrt(np.square(frames).mean(axis=(1, 2, 3))).tolist()
    return means


def warping(plain: Frames, accelerated: Frames) -> PerPair | NotAvailable:
    """The mean squared difference between a frame and the next one, taken back along the motion of the plain video.

    Only pixels count that are visible in both frames of the plain video: whose motion there and back again ends where
    it began. `reference` is the plain video's own warping error, along the same motion. Sources: Lai et al., "Learning
    Blind Video Temporal Consistency", ECCV 2018; visibility after Sundaram et al., "Dense Point Trajectories by
    GPU-accelerated Large Displacement Optical Flow", ECCV 2010; motion by iterative Lucas-Kanade (Le Besnerais and
    Champagnat 2005), of scikit-image.
    """
    num_frames, height, width, channels = plain.shape
    if num_frames < 2:
        return _ONE_FRAME
    if min(height, width) < MIN_SIZE:
        return NotAvailable(
            not_available=f"frames of {width} x {height} are too small for optical flow, which takes {MIN_SIZE} pixels"
        )
    grey = rgb2gray(plain) if channels == 3 else plain[..., 0]
    errors: list[float] = []
    reference: list[float] = []
    for first in range(num_frames - 1):
        there, back = (optical_flow_ilk(grey[a], grey[b]) for a, b in ((first, first + 1), (first + 1, first)))
        visible = _visible(there, back)
        if not visible.any():
            return NotAvailable(not_available=f"no pixel can be followed from frame {first} to frame {first + 1}")
        for video, found in ((accelerated, errors), (plain, reference)):
            difference = video[first] - _taken_back(video[first + 1], there)
            found.append(float(np.square(difference[visible], dtype=np.float64).mean()))
    return PerPair.of_pairs(errors, reference)


def _targets(flow: Flow) -> NDArray[np.float32]:
    rows, columns = np.meshgrid(*map(np.arange, flow.shape[1:]), indexing="ij")
    return np.stack([rows + flow[0], columns + flow[1]]).astype(np.float32)


def _taken_back(picture: NDArray[np.float32], flow: Flow) -> NDArray[np.float32]:
    """What `flow` says that each pixel becomes, at the place of that pixel: (height, width, channels)."""
    targets = _targets(flow)
    layers = [warp(layer, targets, mode="edge") for layer in np.moveaxis(picture, -1, 0)]
    return np.stack(layers, axis=-1)


def _visible(there: Flow, back: Flow) -> NDArray[np.bool_]:
    """Pixels that stay within the frame, and whose motion back ends near where they began."""
    rows, columns = _targets(there)
    height, width = rows.shape
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    returning = np.moveaxis(_taken_back(np.moveaxis(back, 0, -1), there), -1, 0)
    gap = np.square(there + returning).sum(axis=0)
    allowed = 0.01 * (np.square(there).sum(axis=0) + np.square(returning).sum(axis=0)) + 0.5
    visible: NDArray[np.bool_] = inside & (gap < allowed)
    return visible
