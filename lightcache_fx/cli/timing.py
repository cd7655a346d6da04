"""Figures that can be compared: taken in turns, ratios pair by pair, and what they depend on."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightcache_fx.errors import ArgumentError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated figures."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The figures as they came."""
        return cls(tuple(map(float, values)))

    @property
    def median(self) -> float:
        """Of an even number of figures the mean of the middle two; NaN of none."""
        return statistics.median(self.values) if self.values else math.nan

    def as_dict(self) -> dict[str, float | int]:
        """`median`, `min`, `max`, `count`."""
        ends = (min(self.values), max(self.values)) if self.values else (math.nan, math.nan)
        return {"median": self.median, "min": ends[0], "max": ends[1], "count": len(self.values)}

    def format(self, pattern: str = "{:.3f}") -> str:
        """`3.142 (3.120 to 3.201)`."""
        facts = self.as_dict()
        middle, low, high = (pattern.format(facts[key]) for key in ("median", "min", "max"))
        return middle if len(self.values) == 1 else f"{middle} ({low} to {high})"


def pairwise_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratios of figures taken one after the other; a drift of the machine that spans a pair cancels."""
    return Spread.of(a / b for a, b in zip(numerators, denominators, strict=True))


def in_turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """`repeats` rounds of all names, every second round backwards (A B B A), so that none always comes first."""
    for index in range(repeats):
        for name in names if index % 2 == 0 else tuple(reversed(names)):
            yield index, name


def device_named(name: str) -> torch.device:
    """A device that is there.

    Raises:
        ArgumentError: the name is of none, or of one that torch does not see.
    """
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?", name):
        raise ArgumentError(f"expected cpu, cuda or cuda:N, got {name!r}")
    count = 0 if name == "cpu" else torch.cuda.device_count()
    if name != "cpu" and not count:
        raise ArgumentError(f"expected cpu, because torch {torch.__version__} sees no GPU, got {name!r}")
    if name != "cpu" and (torch.device(name).index or 0) >= count:
        raise ArgumentError(f"expected cpu, or cuda:0 to cuda:{count - 1}, got {name!r}")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """What a figure depends on: versions, threads, processor, and the GPU if it was one. No host name, no path."""
    facts = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "lightcache-fx")},
        "threads": torch.get_num_threads(),
        "cores": len(_processors()) or None,
        "processor": next(iter(_processors()), platform.machine()),
        "system": platform.system(),
    }
    if device.type != "cuda":
        return facts
    cudnn = torch.backends.cudnn.version()
    return facts | {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "cudnn": cudnn}


def _processors() -> list[str]:
    """The model name of each core, as Linux tells it; empty elsewhere."""
    source = Path("/proc/cpuinfo")
    if not source.exists():
        return []
    lines = source.read_text(encoding="utf-8").splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
