"""What the benchmarks share: interleaved timing, ratios pair by pair, goals, results that name no host or path."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from lightcache_fx.cli.systems import fake_models as fake_models

RESULTS = Path(__file__).parent / "results"
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


def usable_device(name: str) -> str:
    """The name of a device that can be measured on here, for argparse.

    Raises:
        argparse.ArgumentTypeError: it names none, or one that torch does not see.
    """
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d*))?", name):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {name!r}")
    count = 0 if name == "cpu" else torch.cuda.device_count()
    if name != "cpu" and not count:
        raise argparse.ArgumentTypeError(f"expected cpu, because torch {torch.__version__} sees no GPU, got {name!r}")
    if name != "cpu" and (torch.device(name).index or 0) >= count:
        raise argparse.ArgumentTypeError(f"expected cpu, or cuda:0 to cuda:{count - 1}, got {name!r}")
    return name


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device = CPU) -> float:
    """Wall time of one call, until `device` has done what the call gave it to do, and of nothing given before."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def microseconds_of(function: Callable[[], object], repeats: int = 30, device: torch.device = CPU) -> Spread:
    """Wall time of each of `repeats` calls, after one that does not count."""
    function()
    return Spread.of(1e6 * seconds_of(function, device) for _ in range(repeats))


@contextmanager
def device_peak(device: torch.device, peaks: list[int]) -> Iterator[None]:
    """Append the most bytes that tensors on a CUDA device held inside; on a CPU append nothing."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield
    peaks.append(torch.cuda.max_memory_allocated(device))


@dataclass(frozen=True)
class Goal:
    """A figure and the limit that it should keep.

    Attributes:
        name: what is measured.
        value: the figure, by its median where it was repeated.
        sense: on which side of the limit it should be.
        limit: the limit.
    """

    name: str
    value: float
    sense: Literal["at most", "at least", "above"]
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure keeps its limit; a NaN does not."""
        match self.sense:
            case "at most":
                return self.value <= self.limit
            case "at least":
                return self.value >= self.limit
            case _:
                return self.value > self.limit

    def as_dict(self) -> dict[str, Any]:
        """The figure, the limit and whether it was met, for JSON."""
        return {"value": self.value, "goal": f"{self.sense} {self.limit:.4g}", "met": self.met}

    def format(self) -> str:
        """`at most 1.02: met`."""
        return f"{self.sense} {self.limit:.3g}: {'met' if self.met else 'not met'}"


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


def peak_process_bytes() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value: what diffusers initialises to zero would hide its branch."""
    device = next((parameter.device for parameter in model.parameters()), CPU)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise + name.endswith("weight"))


def tensor_bytes(tree: object) -> tuple[int, int]:
    """Number and bytes of the distinct storages behind the tensors of a tree."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in tensors}
    return len(storages), sum(storages.values())


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result for people to diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=True) + "\n", encoding="utf-8")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """One table; the first column is text, the others stand right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
