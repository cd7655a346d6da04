"""Measure and draw: `python -m benchmarks.figures --help`; `--draw` draws anew from the results that are kept.

    python -m benchmarks.figures                     # all, about half an hour on two cores
    python -m benchmarks.figures similarity --clips 4

`systems` draws what `python -m benchmarks.systems` has measured. Pictures go to docs/figures/ as PNG and SVG, and what
they show to benchmarks/results/figures-*.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import RESULTS, write_json
from benchmarks.figures import memory, quality, similarity, systems
from benchmarks.figures.style import FOLDER

FIGURES = {"systems": systems, "similarity": similarity, "memory": memory, "quality": quality}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--draw", action="store_true", help="draw anew, measure nothing")
    parser.add_argument("--clips", type=int, default=0, help="generations; by default 4 for similarity, 32 for quality")
    parser.add_argument("--steps", type=int, default=memory.VIDEO.steps, help="of the generation whose memory is shown")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--work", type=Path, default=Path("runs/figures"), help="what a run that is cut off leaves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    for figure in options.figures or FIGURES:
        path = options.results / ("systems.json" if figure == "systems" else f"figures-{figure}.json")
        if not options.draw and figure != "systems":
            match figure:
                case "similarity":
                    result = similarity.measure(options.clips or 4)
                case "memory":
                    result = memory.measure(replace(memory.VIDEO, steps=options.steps), console.print)
                case _:
                    result = quality.measure(options.clips or 32, options.work, console.print)
            write_json(path, result)
        result = json.loads(path.read_text(encoding="utf-8"))
        FIGURES[figure].draw(result, options.out)
        console.print(f"{figure}: {path.name}, {figure}.png, {figure}.svg")


if __name__ == "__main__":
    main()
