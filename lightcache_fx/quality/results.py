"""What a comparison found, as typed records with JSON. In JSON an infinite PSNR is null: there is no difference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic

from lightcache_fx.errors import QualityError, nearest

Measure = Literal["psnr", "ssim", "flip", "lpips", "temporal", "warping"]
MEASURES: Mapping[str, Literal["higher", "lower"]] = {
    "psnr": "higher",
    "ssim": "higher",
    "flip": "lower",
    "lpips": "lower",
    "temporal": "lower",
    "warping": "lower",
}
"""All measures, and which way they are better."""


def _infinite(value: object) -> object:
    return math.inf if value is None else value


Number = Annotated[float, pydantic.BeforeValidator(_infinite, json_schema_input_type=float | None)]
"""Finite, or an infinite PSNR, which JSON has as null."""


class _Result(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class PerFrame(_Result):
    """One measure.

    Attributes:
        mean: over the frames; of PSNR that of the mean squared error over all pixels of the video.
        worst: of the frame that is furthest from the plain one.
        worst_frame: which that is, counted from 0.
        frames: of each frame.
    """

    mean: Number
    worst: Number
    worst_frame: int
    frames: tuple[Number, ...]

    @classmethod
    def of(cls, frames: Sequence[float], better: Literal["higher", "lower"], mean: float | None = None) -> Self:
        """Sum up the figures of all frames; the mean is theirs unless it is given."""
        return cls(**_summed_up(frames, better, mean))


class PerPair(PerFrame):
    """One measure of two frames in a row; `frames` has one figure for each pair, numbered by its first frame.

    Attributes:
        reference: the mean of what the same measure finds in the plain video by itself: `mean` is to be read beside it.
    """

    reference: float

    @classmethod
    def of_pairs(cls, pairs: Sequence[float], reference: Sequence[float]) -> Self:
        """Sum up the figures of all pairs; lower is better."""
        return cls(reference=sum(reference) / len(reference), **_summed_up(pairs, "lower", None))


def _summed_up(frames: Sequence[float], better: Literal["higher", "lower"], mean: float | None) -> dict[str, Any]:
    worst = min(frames) if better == "higher" else max(frames)
    average = sum(frames) / len(frames) if mean is None else mean
    return {"mean": average, "worst": worst, "worst_frame": list(frames).index(worst), "frames": tuple(frames)}


class NotAvailable(_Result):
    """A measure that was asked for and could not be taken; nothing stands in for it.

    Attributes:
        not_available: why.
    """

    not_available: str


class Quality(_Result):
    """An accelerated video beside the plain one; a measure that was not asked for is None.

    Attributes:
        num_frames, height, width, channels: of both.
        identical: whether every pixel is the same.
        max_difference: the largest between two pixels' channels, of values in 0..1.
        psnr: in dB, of values in 0..1; infinite where there is no difference.
        ssim: structural similarity (Wang et al. 2004) by windows of 7 x 7 pixels.
        flip: mean LDR-FLIP (Andersson et al. 2020), seen at 67 pixels a degree.
        lpips: LPIPS 0.1 by AlexNet (Zhang et al. 2018).
        temporal: how differently the two change from frame to frame; the root mean square over pixels of the
            difference between their frame differences (dtSSD of Erofeev et al. 2015, by pixel).
        warping: the accelerated video's warping error (Lai et al. 2018) along the plain one's motion.
    """

    num_frames: int
    height: int
    width: int
    channels: int
    identical: bool
    max_difference: float
    psnr: PerFrame | None = None
    ssim: PerFrame | NotAvailable | None = None
    flip: PerFrame | NotAvailable | None = None
    lpips: PerFrame | NotAvailable | None = None
    temporal: PerPair | NotAvailable | None = None
    warping: PerPair | NotAvailable | None = None

    def measured(self) -> dict[str, PerFrame | NotAvailable]:
        """By name, what was asked for."""
        found = {name: getattr(self, name) for name in MEASURES}
        return {name: value for name, value in found.items() if value is not None}

    def figure(self, name: str) -> float:
        """One figure: `psnr` is the mean, `psnr.worst` the worst frame's; `max_difference` too.

        Raises:
            QualityError: no such figure, or it is not available.
        """
        if name == "max_difference":
            return self.max_difference
        measure, _, which = name.partition(".")
        if measure not in MEASURES or which not in ("", "mean", "worst"):
            known = [*MEASURES, "max_difference"]
            raise QualityError(
                f"no figure {name!r}{nearest(measure, known)}; there are {', '.join(known)}, and of each measure .worst"
            )
        found = getattr(self, measure)
        if not isinstance(found, PerFrame):
            reason = "it was not asked for" if found is None else f"not available: {found.not_available}"
            raise QualityError(f"cannot judge by {measure}, {reason}")
        return found.worst if which == "worst" else found.mean

    def to_json(self, indent: int | None = None) -> str:
        """As JSON; `Quality.model_validate_json` reads it again."""
        return self.model_dump_json(indent=indent)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as in JSON."""
        facts: dict[str, Any] = json.loads(self.to_json())
        return facts
