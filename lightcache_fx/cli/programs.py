"""Programs by name, and the printed difference between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from lightcache_fx.errors import ArgumentError, nearest
from lightcache_fx.loading import load
from lightcache_fx.printer import diff
from lightcache_fx.reports import inspect


@dataclass(frozen=True)
class PrintedPrograms:
    """Graphs by the names of their programs; `model` is the graph as it was captured."""

    graphs: Mapping[str, fx.GraphModule]

    def diff(self, before: str | None, after: str | None, context: int) -> list[str]:
        """The lines of the unified difference; by default from `full` to `reuse`, else from `model` to `full`.

        Raises:
            ArgumentError: there is no such program, or nothing to compare.
        """
        caches = "reuse" in self.graphs
        before = before or ("full" if caches and after != "full" else "model")
        after = after or ("reuse" if caches else "full")
        for name in (before, after):
            if name not in self.graphs:
                raise ArgumentError(
                    f"there is no program {name!r}{nearest(name, self.graphs)}; there are {', '.join(self.graphs)}"
                )
        return diff(self.graphs[before], self.graphs[after], names=(before, after), context=context).splitlines()


def saved_programs(folder: Path, weights: Path | None) -> PrintedPrograms:
    """The programs of the signature that was saved last.

    Raises:
        LoadError: as `lightcache_fx.load`.
    """
    report = inspect(load(folder, weights=weights, check_weights=False, any_torch=True))
    return PrintedPrograms({name: program.graph_module for name, program in report.programs.items()})
