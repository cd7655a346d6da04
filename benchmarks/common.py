"""What the benchmarks share: interleaved timing, ratios pair by pair, goals, results that name no host or path."""

from __future__ import annotations

import argparse
import json
import math
import platform
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
from lightcache_fx.cli.timing import CPU as CPU
from lightcache_fx.cli.timing import Spread as Spread
from lightcache_fx.cli.timing import device_named
from lightcache_fx.cli.timing import environment as environment
from lightcache_fx.cli.timing import in_turns as in_turns
from lightcache_fx.cli.timing import pairwise_ratio as pairwise_ratio
from lightcache_fx.cli.timing import synchronize as synchronize
from lightcache_fx.errors import ArgumentError

RESULTS = Path(__file__).parent / "results"


def usable_device(name: str) -> str:
    """The name of a device that can be measured on here, for argparse.

    Raises:
        argparse.ArgumentTypeError: it names none, or one that torch does not see.
    """
    try:
        device_named(name)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


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
