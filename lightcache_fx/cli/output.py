"""Printing: results on standard output, as wide as there is room; everything else on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

_WIDTH = 120
"""Columns where nothing says how many there are."""


def console() -> Console:
    """On standard output, as wide as the terminal; where there is none, as `COLUMNS` says."""
    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDTH
    return Console(width=wide, highlight=False)


def show(*parts: RenderableType) -> None:
    """Print lines and tables; a table that there is no room for is printed row by row."""
    here = console()
    endless = here.options.update(max_width=10**6)
    for part in parts:
        if isinstance(part, Table) and here.measure(part, options=endless).minimum > here.width:
            for line in _row_by_row(part):
                here.print(line, markup=False)
        else:
            here.print(part, markup=False)


def _row_by_row(table: Table) -> Iterator[str]:
    if table.title is not None:
        yield str(table.title)
    heads = [str(column.header) for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *others = map(str, cells)
        yield f"  {first}"
        yield from (f"    {head}: {cell}" for head, cell in zip(heads[1:], others, strict=True) if cell)


def print_json(facts: dict[str, Any], out: Path | None = None) -> None:
    """Print JSON, in which null stands for what is not finite, or write it to a file."""
    text = json.dumps(_finite(facts), indent=2, allow_nan=False)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """One line on standard error."""
    print(f"lightcache-fx: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error while something runs, if that is a terminal; yields what changes its text."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield lambda _text: None
        return
    with errors.status(what) as status:
        yield status.update
