"""A model larger than its budget, swapped to disk: time and memory, against all resident and against fetching late.

    python -m benchmarks.swap                # some minutes on two quiet cores, 1 GB of disk
    python -m benchmarks.swap --threads 2    # computing on every core, so that copying takes time from it

A video transformer (Wan's architecture, random weights) runs on the CPU with its weights in a memory-mapped file. The
"device" is the process's own memory. Three ways in turns: everything resident; within `--share` of that with copies
begun ahead of time; the same, each copy begun when it is needed. Computing has one thread by default, so that a core is
left for the copying, as a GPU's copy engines are beside its compute engine.

Hidden is the share of the time of copying that computing does not wait for, by the clocks of the copies themselves.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks.common import (
    RESULTS,
    environment,
    in_turns,
    markdown_table,
    pairwise_ratio,
    print_rows,
    randomize,
    seconds_of,
    write_json,
)
from lightcache_fx.measure import measure_peak
from lightcache_fx.transfers import CopyLog, recorded_copies
from lightcache_fx.units import format_bytes

HIDDEN = 0.7
WAYS = ("resident", "swapped", "when needed")


def build(blocks: int, width: int) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer and one call of it; 256 tokens."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=width // 64, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=512, freq_dim=256, ffn_dim=4 * width, num_layers=blocks, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    randomize(model)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 16, 16, generator=generator),  # B C F H W
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 64, 512, generator=generator),  # B L C
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), inputs


def policies(share: str, interval: int, last: int, folder: str) -> dict[str, lc.Policy]:
    """The three ways; with an interval above 1 the blocks in the middle are cached as a residual."""
    cache = None
    if interval > 1:
        cache = lc.Cache(cut=lc.Residual(first="blocks.1", last=f"blocks.{last}"), interval=interval)
    swaps = {
        "resident": None,
        "swapped": lc.Swap(budget=share, folder=folder),
        "when needed": lc.Swap(budget=share, folder=folder, prefetch=False),
    }
    return {way: lc.Policy(cache=cache, swap=swap) for way, swap in swaps.items()}


class Ways:
    """One model, transformed in each way in turn: only one of them can have the weights."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.model, self.inputs = build(options.blocks, options.width)
        self.steps = options.steps
        self.policies = policies(options.share, options.interval, options.blocks - 2, folder)
        self.plans: dict[str, lc.Plan] = {}
        self.logs: dict[str, list[CopyLog]] = {way: [] for way in WAYS}
        self.peaks: dict[str, int] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def run(self, module: nn.Module) -> torch.Tensor:
        """One generation of noise prediction; returns the last step's."""
        found: torch.Tensor | None = None
        with torch.no_grad(), lc.marked_run(self.steps):
            for step in range(self.steps):
                found = None  # or the last step's would count as memory of this one
                timestep = torch.tensor([999.0 - 20 * step])
                found = module(**self.inputs | {"timestep": timestep})[0]
                lc.step_done()
        assert found is not None
        return found

    def measure(self, way: str) -> float:
        """Seconds of one generation, after one that captures; the first time its peak memory too."""
        module = lc.transform(self.model, self.policies[way])
        self.outputs[way] = self.run(module)
        with recorded_copies() as log:
            seconds = seconds_of(lambda: self.run(module))
        self.logs[way].append(log)
        if way not in self.peaks:
            self.plans[way] = lc.inspect(module).plan
            self.peaks[way] = measure_peak(lambda: self.run(module)).peak_bytes
        lc.restore(module)
        return seconds


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All rounds."""
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(options, folder)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn, way in in_turns(WAYS, options.rounds):
            seconds[way].append(ways.measure(way))
            console.print(f"round {turn}: {way} {seconds[way][-1]:.2f} s", markup=False)
        left = [path.name for path in Path(folder).iterdir()]
    schedule = ways.plans["swapped"].swap
    assert schedule is not None
    small = sum(w.nbytes for name, w in ways.model.named_parameters() if name not in schedule.weights)
    logs = ways.logs["swapped"]
    log = logs[-1]
    hidden = 1 - sum(each.waited for each in logs) / sum(each.copying for each in logs)
    on_device = ways.peaks["swapped"] + small
    return {
        "weights": sum(w.nbytes for w in ways.model.parameters()),
        "budget": schedule.plan.budget,
        "on_device": on_device,
        "planned_on_device": schedule.plan.peak_bytes,
        "within_budget": on_device <= schedule.plan.budget,
        "seconds": seconds,
        "swapped_over_resident": pairwise_ratio(seconds["swapped"], seconds["resident"]).as_dict(),
        "needed_over_resident": pairwise_ratio(seconds["when needed"], seconds["resident"]).as_dict(),
        "copied_bytes": sum(copy.num_bytes for copy in log.copies),
        "copying_seconds": log.copying,
        "waited_seconds": log.waited,
        "hidden": {"value": hidden, "goal": f"at least {HIDDEN}", "met": hidden >= HIDDEN},
        "predicted": schedule.plan.as_dict(),
        "equal": all(torch.equal(ways.outputs["resident"], output) for output in ways.outputs.values()),
        "files_left": left,
    }


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table."""
    swapped, needed = result["swapped_over_resident"], result["needed_over_resident"]
    on_device = f"{format_bytes(result['on_device'])} of {format_bytes(result['budget'])}"
    return [
        ["weights", format_bytes(result["weights"]), ""],
        ["on the device, of the budget", on_device, "met" if result["within_budget"] else "not met"],
        ["swapped / resident", f"{swapped['median']:.3f} ({swapped['min']:.3f} to {swapped['max']:.3f})", ""],
        ["fetched when needed / resident", f"{needed['median']:.3f} ({needed['min']:.3f} to {needed['max']:.3f})", ""],
        [
            "copying hidden, at least 70%",
            f"{result['hidden']['value']:.0%} of {result['copying_seconds']:.2f} s",
            "met" if result["hidden"]["met"] else "not met",
        ],
        ["same bits as resident", str(result["equal"]), ""],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="35%", help="of what everything resident takes")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--interval", type=int, default=1, help="above 1, reuse steps leave out the blocks between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of computing")
    parser.add_argument("--out", type=Path, default=RESULTS / "swap.json")
    options = parser.parse_args(arguments)
    console = Console(width=140)
    torch.set_num_threads(options.threads)
    result = measure(options, console)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    print_rows("Swapping on a CPU", ("", "", ""), rows_of(result), console)
    write_json(options.out, {"environment": environment(), "settings": settings, **result})
    table = markdown_table(("", "measured", ""), rows_of(result))
    options.out.with_suffix(".md").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
