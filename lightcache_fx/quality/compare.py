"""`compare_videos`: all measures of two videos."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from lightcache_fx.errors import QualityError, nearest
from lightcache_fx.quality import fidelity, perceptual, temporal
from lightcache_fx.quality.results import MEASURES, NotAvailable, PerFrame, Quality
from lightcache_fx.quality.videos import Frames, Layout, Video, as_frames

_FUNCTIONS: Mapping[str, Callable[[Frames, Frames], PerFrame | NotAvailable]] = {
    "psnr": fidelity.psnr,
    "ssim": fidelity.ssim,
    "flip": perceptual.flip,
    "lpips": perceptual.lpips,
    "temporal": temporal.temporal,
    "warping": temporal.warping,
}


def compare_videos(
    plain: Video,
    accelerated: Video,
    *,
    measures: Collection[str] = tuple(MEASURES),
    layout: Layout | None = None,
    progress: Callable[[str], None] | None = None,
) -> Quality:
    """Measure how far an accelerated video is from the plain one.

        quality = compare_videos("plain.gif", "accelerated.gif")
        quality = compare_videos(plain, accelerated, measures=("psnr", "ssim"), layout="FCHW")

    Args:
        plain: what the model makes unaccelerated, the reference: a file or folder, an array, a torch tensor, or a list
            of pictures; see `as_frames`.
        accelerated: likewise, of the same size and number of frames.
        measures: which to take, by name; all by default. What cannot be taken is a `NotAvailable` with the reason.
        layout: of arrays and tensors; see `as_frames`.
        progress: told the name of each measure before it is taken.

    Raises:
        QualityError: a video cannot be read, the two do not match, or there is no such measure.
    """
    for measure in measures:
        if measure not in MEASURES:
            raise QualityError(f"no measure {measure!r}{nearest(measure, MEASURES)}; there are {', '.join(MEASURES)}")
    a = as_frames(plain, layout=layout, name=_name(plain, "the plain video"))
    b = as_frames(accelerated, layout=layout, name=_name(accelerated, "the accelerated video"))
    _check_alike(a, b)
    found: dict[str, Any] = {}
    for measure in (name for name in MEASURES if name in measures):
        if progress is not None:
            progress(measure)
        found[measure] = _FUNCTIONS[measure](a, b)
    num_frames, height, width, channels = a.shape
    return Quality(
        num_frames=num_frames,
        height=height,
        width=width,
        channels=channels,
        identical=bool((a == b).all()),
        max_difference=float(np.abs(a - b).max()),
        **found,
    )


def _name(video: Video, otherwise: str) -> str:
    return str(video) if isinstance(video, str) or hasattr(video, "__fspath__") else otherwise


def _check_alike(a: Frames, b: Frames) -> None:
    facts = {"frames": (a.shape[:1], b.shape[:1]), "pixels": (a.shape[2:0:-1], b.shape[2:0:-1]),
             "channels": (a.shape[3:], b.shape[3:])}  # fmt: skip
    differing = [
        f"{' x '.join(map(str, ours))} {what} and {' x '.join(map(str, theirs))}"
        for what, (ours, theirs) in facts.items()
        if ours != theirs
    ]
    if differing:
        raise QualityError(f"the videos do not match: {'; '.join(differing)}; compare videos of one size and length")
