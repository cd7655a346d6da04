"""What a calibration has measured, and the policy that it gives for a quality or a speed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from rich.table import Table
from torch import nn

from lightcache_fx.caching import Cache, Cut, cut_to_plain
from lightcache_fx.errors import CalibrationError
from lightcache_fx.policy import Policy
from lightcache_fx.settings import Settings, read_as, read_quality

VERSION = 1


class Point(Settings):
    """One way to cache, with what it gained and cost where it was tried.

    Attributes:
        cut: what is kept.
        order: of the expansion that reuse steps read it by.
        full_steps: the indices of the steps that are full.
        speedup: FLOPs of a run of full steps over those of this one: what caching can gain at most.
        psnr: of the results against those of full steps, dB: the mean of the middle half of the inputs, as one that
            goes astray should not decide between schedules. An identical one counts as 120 dB, and
            None is all of these being so.
        ssim: likewise; 1 where identical.
    """

    cut: Annotated[Cut, pydantic.Field(union_mode="left_to_right")]
    order: int
    full_steps: list[int]
    speedup: float
    psnr: float | None
    ssim: float

    @pydantic.field_validator("cut", mode="before")
    @classmethod
    def _read_cut(cls, value: Any) -> object:
        return Cache(cut=value, interval=1).cut  # as a policy reads it

    def value_of(self, measure: str) -> float:
        """Of a measure; infinite where the results are identical."""
        if measure == "ssim":
            return self.ssim
        return math.inf if self.psnr is None else self.psnr

    def cache(self, num_steps: int) -> Cache:
        """As a policy has it."""
        return Cache(cut=self.cut, steps=list(self.full_steps), order=self.order, num_steps=num_steps)


class Calibration(Settings):
    """Ways to cache one model in one number of steps, each tried; kept as YAML.

    Attributes:
        version: of the file's form.
        model: class name of the denoiser.
        weights: names and shapes of its weights, as a hash.
        num_steps: denoiser evaluations of a run.
        num_inputs: that each way was tried with.
        points: all that was tried.
    """

    version: int = VERSION
    model: str
    weights: str
    num_steps: int
    num_inputs: int
    points: Annotated[list[Point], pydantic.Field(min_length=1)]

    @pydantic.field_validator("points", mode="before")
    @classmethod
    def _read_points(cls, value: object) -> object:
        return [read_as(Point, item) for item in value] if isinstance(value, list) else value

    def best(self, *, quality: str | None = None, speedup: float | None = None) -> Point:
        """The fastest point of a quality, or the best one of a speed.

        Args:
            quality: `psnr>=30` (dB) or `ssim>=0.95`, of the result against that of full steps, where it was tried.
            speedup: at least this by FLOPs.

        Raises:
            CalibrationError: not exactly one of them, one that cannot be read, or one that no point reaches.
        """
        if (quality is None) == (speedup is None):
            raise CalibrationError("expected one of quality='psnr>=30' and speedup=2.0, to calibrate by")
        if quality is not None:
            measure, least = read_quality(quality)
            good = [point for point in self.points if point.value_of(measure) >= least]
            if not good:
                best = max(self.points, key=lambda point: point.value_of(measure))
                raise CalibrationError(
                    f"quality: no way that was tried has {measure} of {least:g}; the best has"
                    f" {best.value_of(measure):.4g} at {best.speedup:.2f}x. Calibrate with more points, or ask for less"
                )
            return max(good, key=lambda point: (point.speedup, point.value_of(measure)))
        assert speedup is not None
        fast = [point for point in self.points if point.speedup >= speedup]
        if not fast:
            most = max(point.speedup for point in self.points)
            raise CalibrationError(
                f"speedup: no way that was tried gains {speedup:g}x; the most is {most:.2f}x, by FLOPs. Calibrate with"
                f" a larger max_reuse or other cuts, or ask for less"
            )
        return max(fast, key=lambda point: (point.value_of("psnr"), point.speedup))

    def policy(self, *, quality: str | None = None, speedup: float | None = None, **settings: Any) -> Policy:
        """A policy that caches by `best`; `settings` are any others of `Policy`.

        Raises:
            CalibrationError: as `best`.
            PolicyError: as `Policy`.
        """
        return Policy(cache=self.best(quality=quality, speedup=speedup).cache(self.num_steps), **settings)

    def check(self, module: nn.Module, where: str = "calibration") -> None:
        """Raise a `CalibrationError` where it is not of this model, with what differs."""
        if self.model != type(module).__name__:
            raise CalibrationError(
                f"{where}: it is of a {self.model}, not of a {type(module).__name__}; calibrate this"
            )
        if self.weights != weights_of(module):
            raise CalibrationError(
                f"{where}: it is of a {self.model} whose weights have other names or shapes than this one's (hash"
                f" {self.weights}, here {weights_of(module)}); calibrate this one"
            )

    def frontier(self, measure: str = "psnr") -> list[Point]:
        """The points that no other beats in both speed and quality, by speed."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (-p.speedup, -p.value_of(measure))):
            if not found or point.value_of(measure) > found[-1].value_of(measure):
                found.append(point)
        return found[::-1]

    def save(self, path: str | Path) -> None:
        """Write it as YAML."""
        data = self.model_dump(mode="python")
        for point, plain in zip(self.points, data["points"], strict=True):
            plain["cut"] = cut_to_plain(point.cut)
        Path(path).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CalibrationError: there is no such file, it cannot be read, or it is of another version.
        """
        name = Path(path).name
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CalibrationError(
                f"calibration: cannot read {name}: {error}; make it with calibrate(...).save"
            ) from None
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else data
            raise CalibrationError(f"calibration: {name} is no calibration of version {VERSION}, but {found!r}")
        try:
            return cls(**{str(key): value for key, value in data.items()})
        except ValueError as error:
            raise CalibrationError(f"calibration: {name}: {error}") from None

    def tables(self) -> list[Table]:
        """The points that no other beats."""
        title = f"{self.model}, {self.num_steps} steps, {self.num_inputs} inputs: the best of {len(self.points)} ways"
        table = Table(title=title, title_justify="left")
        for column in ("FLOPs", "PSNR, dB", "SSIM", "cut", "order", "full steps"):
            table.add_column(column, justify="left" if column in ("cut", "full steps") else "right", overflow="fold")
        for point in self.frontier():
            psnr = "same" if point.psnr is None else f"{point.psnr:.1f}"
            steps = " ".join(map(str, point.full_steps))
            cells = (f"{point.speedup:.2f}x", psnr, f"{point.ssim:.4f}", str(cut_to_plain(point.cut)), str(point.order))
            table.add_row(*cells, steps)
        return [table]


def weights_of(module: nn.Module) -> str:
    """A hash of the names and shapes of a model's weights, whatever their dtype and device."""
    facts: Iterable[str] = (f"{name} {list(weight.shape)}" for name, weight in module.named_parameters())
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]
