"""How long `lightcache-fx plan` takes for the published systems: one process each, no weights, no GPU.

    python -m benchmarks.command_line                       # five minutes on two quiet cores
    python -m benchmarks.command_line --systems svd-xt

Each system is planned twice: its denoiser, and all of its models within a budget. The goal is for the denoiser.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import RESULTS, Goal, environment, markdown_table, write_json

MOST_SECONDS = 90.0
BUDGETS = {
    "svd-xt": "6GiB",
    "animatediff-lightning": "3GiB",
    "animatediff": "3GiB",
    "modelscope": "3GiB",
    "easyanimate": "8GiB",
}
"""What each system's whole pipeline is planned within; EasyAnimate's without its text encoder, as its preset is."""


def measure(arguments: Sequence[str]) -> dict[str, float]:
    """Seconds of the command by the clock and of processor time.

    Raises:
        RuntimeError: the command failed, with what it said.
    """
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "lightcache_fx", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"lightcache-fx {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return {"seconds": seconds, "processor_seconds": sum(after[:2]) - sum(before[:2])}


def report(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    rows = [
        (
            name,
            f"{facts['denoiser']['seconds']:.0f}",
            f"{facts['denoiser']['processor_seconds']:.0f}",
            "met" if facts["goal"]["met"] else "not met",
            f"{facts['pipeline']['seconds']:.0f}",
            f"{facts['pipeline']['processor_seconds']:.0f}",
            facts["budget"],
        )
        for name, facts in result["systems"].items()
    ]
    header = ("system", "the denoiser, s", "processor, s", f"at most {MOST_SECONDS:.0f} s")
    return markdown_table((*header, "all models, s", "processor, s", "within"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=BUDGETS, default=tuple(BUDGETS))
    parser.add_argument("--out", type=Path, default=RESULTS / "command_line.json")
    given = parser.parse_args(arguments)
    console = Console()
    systems: dict[str, Any] = {}
    for name in given.systems:
        denoiser, pipeline = measure(["plan", name]), measure(["plan", name, "--memory-budget", BUDGETS[name]])
        goal = Goal(f"plan {name}", denoiser["seconds"], "at most", MOST_SECONDS)
        systems[name] = {"denoiser": denoiser, "pipeline": pipeline, "budget": BUDGETS[name], "goal": goal.as_dict()}
        console.log(f"{name}: {systems[name]}")
    result = {"environment": environment(), "systems": systems}
    lines = report(result)
    console.print("\n".join(lines), markup=False)
    write_json(given.out, result)
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
