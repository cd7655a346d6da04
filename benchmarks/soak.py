"""Many generations in one process: does memory stay flat, and does what is made stay the same?

    OMP_NUM_THREADS=1 python -m benchmarks.soak            # 300 generations, about half an hour on two cores

Random sizes, numbers of steps and ways to cache, of two small systems with random weights; one generation in eight is
broken off in its midst. Every tenth is made again by a fresh process, which must make the same bits. Memory is the
process's own, read behind each generation. A way that has not met a size before makes programs for it, and keeps them;
all other generations should leave memory as they found it: what they add in the last two thirds is nothing but noise.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import lightcache_fx as lc
from benchmarks.common import RESULTS, Goal, environment, write_json
from examples import modelscope, stable_video_diffusion
from examples.random_pipelines import SMALL
from examples.systems import Video

SYSTEMS = {"modelscope": modelscope.SYSTEM, "svd-xt": stable_video_diffusion.SYSTEM}
WAYS: Mapping[str, lc.Policy] = {
    "interval": lc.Policy.deepcache(interval=2),
    "taylor": lc.Policy(cache=lc.Cache(cut=0, interval=3, order=1)),
    "adaptive": lc.Policy(cache=lc.Cache(cut=0, adaptive=lc.Adaptive(threshold=0.5, max_reuse=2))),
    "magnitudes": lc.Policy(cache=lc.Cache(cut=0, magnitude=lc.Magnitude(ratios=[1.0, 1.01, 0.99, 0.98]))),
    "guarded": lc.Policy(cache=lc.Cache(cut=0, interval=2, guard=lc.Guard(bound=1e9, every=3))),
    "several": lc.Policy(cache=[lc.Cache(cut="**.attn1", interval=2), lc.Cache(cut="**.attn2", interval=3)]),
    "chunked": lc.Policy(cache=lc.Cache(cut=0, interval=2), chunk=lc.Chunk(budget="80%")),
    "swapped": lc.Policy(cache=lc.Cache(cut=0, interval=2), swap=lc.Swap()),
}
SIZES = (32, 64)
STEPS = (3, 4, 5)
BROKEN_OFF = 1 / 8
CHECKED = 10
"""Every so many-th generation is made again by a fresh process."""


class BrokenOffError(Exception):
    """A generation that ends in its midst."""


@contextmanager
def broken_off(pipe: Any, after: int | None) -> Any:
    """While active, the scheduler's step number `after` raises; None lets all pass."""
    scheduler = pipe.scheduler
    original, count = type(scheduler).step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == after:
            raise BrokenOffError
        return original(scheduler, *args, **kwargs)

    if after is not None:
        scheduler.step = step
    try:
        yield
    except BrokenOffError:
        pass
    finally:
        vars(scheduler).pop("step", None)


def drawn(source: random.Random) -> dict[str, Any]:
    """One generation: what, how, how large, from which seed, and where it is broken off."""
    steps = source.choice(STEPS)
    return {
        "system": source.choice(list(SYSTEMS)),
        "way": source.choice(list(WAYS)),
        "height": source.choice(SIZES),
        "width": source.choice(SIZES),
        "steps": steps,
        "seed": source.randrange(100),
        "broken_off": source.randrange(1, steps + 1) if source.random() < BROKEN_OFF else None,
    }


class Machine:
    """Pipelines that are made when they are asked for, and stay."""

    def __init__(self) -> None:
        self._plain: dict[str, Any] = {}
        self._fast: dict[tuple[str, str], Any] = {}

    def generate(self, one: Mapping[str, Any]) -> str | None:
        """A hash of the frames; None where the generation was broken off."""
        system, key = SYSTEMS[one["system"]], (one["system"], one["way"])
        if one["system"] not in self._plain:
            pipe = system.build(SMALL)
            pipe.set_progress_bar_config(disable=True)
            self._plain[one["system"]] = pipe
        if key not in self._fast:
            self._fast[key] = lc.transform_pipeline(self._plain[one["system"]], WAYS[one["way"]])
        pipe, video = self._fast[key], Video(one["height"], one["width"], 3, one["steps"])
        frames = None
        with broken_off(pipe, one["broken_off"]):
            frames = system.generate(pipe, video, seed=one["seed"])
        if one["way"] == "swapped":
            lc.restore(pipe)  # other pipelines share these weights, and take them to be here
        return None if frames is None else hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def resident_bytes() -> int:
    """What the process holds in memory now."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * 4096


def by_a_fresh_process(one: Mapping[str, Any]) -> str:
    """The same generation, alone."""
    command = [sys.executable, "-m", "benchmarks.soak", "--one", json.dumps(dict(one))]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    return done.stdout.split()[-1]


def soak(count: int, seed: int) -> dict[str, Any]:
    """All generations, with memory behind each; where a fresh process makes something else, that one."""
    source, machine = random.Random(seed), Machine()
    held, differing, checked, broken = [], [], 0, 0
    known: dict[tuple[Any, ...], int] = {}
    for number in track(range(count), description="generating", console=Console(stderr=True)):
        one = drawn(source)
        if number % CHECKED == CHECKED - 1:
            one["broken_off"] = None
        found = machine.generate(one)
        broken += found is None
        known.setdefault(tuple(one[key] for key in ("system", "way", "height", "width")), number)
        held.append(resident_bytes())
        if number % CHECKED == CHECKED - 1:
            checked += 1
            if found != by_a_fresh_process(one):
                differing.append(one)
    makers = sorted(known.values())
    goals = [
        Goal("memory that generations without new programs add, over all", added(held, makers), "at most", 0.01),
        Goal("generations that a fresh process makes otherwise", len(differing), "at most", 0),
    ]
    return {
        "environment": environment(),
        "generations": count,
        "broken_off": broken,
        "checked": checked,
        "differing": differing,
        "made_programs": makers,
        "held_bytes": held,
        "goals": {goal.name: goal.as_dict() for goal in goals},
    }


def added(held: Sequence[int], makers: Collection[int]) -> float:
    """What generations add in the last two thirds that make no programs, over what is held at the end.

    Args:
        held: bytes behind each generation.
        makers: the numbers of those that make programs.
    """
    others = (number for number in range(max(1, len(held) // 3), len(held)) if number not in makers)
    return sum(held[number] - held[number - 1] for number in others) / held[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help="make one generation, given as JSON, and print its hash")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(Machine().generate(json.loads(options.one)))
        return
    result = soak(options.generations, options.seed)
    write_json(options.out, result)
    for name, goal in result["goals"].items():
        print(f"{name}: {goal['value']:.4f}, {goal['goal']}: {'met' if goal['met'] else 'not met'}")


if __name__ == "__main__":
    main()
