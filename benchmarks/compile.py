"""What compiling adds to caching, and what it costs to compile, in one run on one machine.

    python -m benchmarks.compile                 # a quarter of an hour on two quiet cores
    python -m benchmarks.compile --quick         # the same code at a small size
    python -m benchmarks.compile --parts loops   # or: loops, seconds, sizes
    python -m benchmarks.compile --device cuda --dtype float16 --full-size --mode reduce-overhead

Loops: a denoising loop of an SVD-shaped U-Net, eager, compiled, cached, cached and compiled, with chunks and without,
in turns. The goal is a share of what FLOPs allow: compiled over cached-and-compiled, over the loops' FLOPs without and
with a cache. Seconds: how long the first call of a DiT takes, by `torch.compile` as a whole, by regional compilation
(diffusers' `compile_repeated_blocks`) and by ours; each in a process of its own, first with an empty compiler cache and
then with the one it left. Sizes: how long the first call at each batch size takes, each captured by itself and one
capture for all, compiled by Inductor (an empty cache) and not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks.common import (
    RESULTS,
    Goal,
    Spread,
    environment,
    in_turns,
    markdown_table,
    pairwise_ratio,
    randomize,
    seconds_of,
    usable_device,
    write_json,
)
from benchmarks.denoise import DTYPES, Setting, Video, build_unet
from lightcache_fx.liveness import timeline

SHARE_OF_BOUND = 0.85
TOLERANCE = 1e-4
"""Largest difference of a compiled step's result from the uncompiled one's, over its largest element, in float32."""

SHARE = 0.6
"""Of a full step's activations, for what runs in chunks."""
PARTS = ("loops", "seconds", "sizes")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def variants(unet: nn.Module, setting: Setting, mode: str) -> dict[str, nn.Module]:
    """The modules to compare, by name; all share the U-Net's weights."""
    compile_ = lc.Compile(mode=mode)  # type: ignore[arg-type]
    cached = lc.Policy.deepcache(setting.interval, 0)
    once = lc.transform(unet, cached)
    video = Video(setting)
    video.predict(once, video.noise, video.timestep())
    full = timeline(lc.inspect(once).programs["full"].graph_module.graph).peak_bytes
    chunk = lc.Chunk(budget=int(SHARE * full))
    policies = {
        "cached": cached,
        "cached and compiled": cached.model_copy(update={"compile": compile_}),
        "chunked and compiled": lc.Policy(chunk=chunk, compile=compile_),
        "cached and chunked": cached.model_copy(update={"chunk": chunk}),
        "cached, chunked and compiled": cached.model_copy(update={"chunk": chunk, "compile": compile_}),
    }
    compiled: Any = torch.compile(unet, fullgraph=True, mode=mode)
    return {"eager": unet, "compiled": compiled} | {name: lc.transform(unet, p) for name, p in policies.items()}


def loop_flops(report: lc.Report, setting: Setting) -> tuple[int, int]:
    """FLOPs of a whole loop, without and with a cache."""
    full, reuse = (report.programs[name].flops for name in ("full", "reuse"))
    prologue = report.programs["prologue"].flops if "prologue" in report.programs else 0
    num_full = len(range(0, setting.steps, setting.interval))
    whole = setting.steps * (full + prologue)
    return whole, prologue + num_full * full + (setting.steps - num_full) * reuse


def measure_loops(setting: Setting, mode: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of each variant's loop in turns, of its first loop, and how far its results are from the uncompiled."""
    unet, video = build_unet(setting), Video(setting)
    modules = variants(unet, setting, mode)
    latents: dict[str, torch.Tensor] = {}
    first: dict[str, float] = {}

    def loop(name: str) -> torch.Tensor:
        return video.denoise(modules[name], video.scheduler())

    for name in modules:
        begin = time.perf_counter()
        latents[name] = loop(name)
        first[name] = time.perf_counter() - begin
        log(f"{name}: first loop {first[name]:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for number, name in in_turns(list(modules), setting.rounds):
        seconds[name].append(seconds_of(lambda name=name: loop(name), video.device))  # type: ignore[misc]
        log(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s")
    whole, cached = loop_flops(lc.inspect(modules["cached"]), setting)
    gained = pairwise_ratio(seconds["compiled"], seconds["cached and compiled"])
    share = Goal("share of the FLOP bound", gained.median * cached / whole, "at least", SHARE_OF_BOUND)
    ratios = {name: pairwise_ratio(seconds["eager"], seconds[name]) for name in modules}
    pairs = {"compiled": "eager", "cached and compiled": "cached", "chunked and compiled": "eager",
             "cached, chunked and compiled": "cached"}  # fmt: skip
    differences = {name: _distance(latents[name], latents[other]) for name, other in pairs.items()}
    states = {
        name: {program: str(bound) for program, bound in _compile_states(module).items()}
        for name, module in modules.items()
        if name not in ("eager", "compiled")
    }
    return {
        "seconds": {name: Spread.of(values).as_dict() for name, values in seconds.items()},
        "first_loop_seconds": first,
        "over_eager": {name: ratio.as_dict() for name, ratio in ratios.items()},
        "flop_bound": whole / cached,
        "compiled_over_cached_and_compiled": gained.as_dict(),
        "share_of_bound": share.as_dict(),
        "largest_difference": differences,
        "compile_state": states,
    }  # fmt: skip


def _compile_states(module: nn.Module) -> dict[str, str]:
    report = lc.inspect(module)
    return {one.name: one.compiled for signature in report.signatures for one in signature.programs.values()}


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# Seconds to compile ------------------------------------------------------------------------------------------------

WAYS = ("eager", "whole", "regional", "ours, in blocks", "ours, as one graph", "ours, cached")


def build_dit(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    """A video DiT of Wan's architecture, small but for its number of layers, and inputs of a step."""
    torch.manual_seed(0)
    dit = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=512, num_layers=layers, cross_attn_norm=True,
    )  # fmt: skip
    randomize(dit)
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 16, 16),
        "timestep": torch.tensor([981]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }
    return dit.eval().requires_grad_(False), inputs


def compile_seconds(way: str, layers: int) -> dict[str, float]:
    """In a fresh process: seconds of the first call, and of it what comes before compiling (capture, planning)."""
    dit, inputs = build_dit(layers)
    step: Callable[..., Any] = dit
    match way:
        case "whole":
            step = torch.compile(dit, fullgraph=True)
        case "regional":
            dit.compile_repeated_blocks(fullgraph=True)
        case "ours, in blocks":
            step = lc.transform(dit, lc.Policy(compile=lc.Compile(blocks=True)))
        case "ours, cached":
            step = lc.transform(dit, lc.Policy(cache=lc.Cache(cut="auto", interval=3), compile=lc.Compile()))
        case "ours, as one graph":
            step = lc.transform(dit, lc.Policy(compile=lc.Compile(blocks=False)))
    begin = time.perf_counter()
    with torch.no_grad():
        for number in range(2 if way == "ours, cached" else 1):
            step(**inputs | {"timestep": torch.tensor([981 - 40 * number])})
    total = time.perf_counter() - begin
    found = {"first_call": total}
    if way.startswith("ours"):
        bounds = lc.inspect(step).signatures  # type: ignore[arg-type]
        found["parts"] = sum(_parts(one.compiled) for signature in bounds for one in signature.programs.values())
    with torch.no_grad():
        step(**inputs)
        found["step"] = seconds_of(lambda: step(**inputs))
    return found


def _parts(state: str) -> int:
    """`inductor: 3 of 4 parts` -> 3."""
    return int(state.split(": ")[1].split()[0]) if ": " in state else 0


def in_a_process(way: str, layers: int, folder: str) -> dict[str, float]:
    """Measure one way in a process of its own, with a folder as the compiler's cache."""
    command = [sys.executable, "-m", "benchmarks.compile", "--one", way, "--layers", str(layers)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_seconds(layers: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Each way with an empty compiler cache and then with the one it left."""
    found: dict[str, Any] = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("cold", "warm"):
                found.setdefault(way, {})[kind] = in_a_process(way, layers, folder)
                log(f"{way}, {kind}: {found[way][kind]}")
    return {"layers": layers, "ways": found}


# Sizes that vary ---------------------------------------------------------------------------------------------------

BATCHES = (2, 3, 4, 5)
SIZE_WAYS: dict[str, lc.Policy] = {
    "captured, each by itself": lc.Policy(dynamic=False),
    "captured, one for all": lc.Policy(),
    "compiled, each by itself": lc.Policy(dynamic=False, compile=lc.Compile()),
    "compiled, one for all": lc.Policy(compile=lc.Compile()),
}


def size_seconds(way: str, layers: int) -> dict[str, float]:
    """Seconds of the first call at each batch size, in this order, and how many sizes were captured by themselves."""
    dit, inputs = build_dit(layers)
    transformed = lc.transform(dit, SIZE_WAYS[way])
    found = {}
    for batch in BATCHES:
        given = inputs | {
            "hidden_states": torch.randn(batch, *inputs["hidden_states"].shape[1:]),
            "timestep": inputs["timestep"].repeat(batch),
            "encoder_hidden_states": torch.randn(batch, *inputs["encoder_hidden_states"].shape[1:]),
        }
        begin = time.perf_counter()
        with torch.no_grad():
            transformed(**given)
        found[str(batch)] = time.perf_counter() - begin
    routes = [signature.route for signature in lc.inspect(transformed).signatures]
    return found | {"captured by themselves": routes.count("export")}


def measure_sizes(layers: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Each way with an empty compiler cache."""
    found: dict[str, Any] = {}
    for way in SIZE_WAYS:
        with tempfile.TemporaryDirectory() as folder:
            found[way] = in_a_process(way, layers, folder)
            log(f"{way}: {found[way]}")
    return {"layers": layers, "ways": found}


# Report ------------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown."""
    lines = ["# Compiling", ""]
    if "loops" in result:
        loops = result["loops"]
        rows = [
            (
                name,
                f"{facts['median']:.2f}",
                f"{loops['over_eager'][name]['median']:.2f}x",
                f"{loops['first_loop_seconds'][name]:.0f}",
                f"{loops['largest_difference'][name]:.1e}" if name in loops["largest_difference"] else "",
            )
            for name, facts in loops["seconds"].items()
        ]
        lines += markdown_table(("loop", "seconds", "over eager", "first loop, s", "off the uncompiled"), rows)
        lines += [
            "",
            _verdict(loops),
            "",
        ]
    if "seconds" in result:
        seconds = result["seconds"]
        rows = [
            (
                way,
                *(f"{facts[kind]['first_call']:.1f}" for kind in ("cold", "warm")),
                str(int(facts["cold"].get("parts", 0)) or ""),
                f"{1000 * facts['warm']['step']:.0f}",
            )
            for way, facts in seconds["ways"].items()
        ]
        lines += [f"First call of a DiT of {seconds['layers']} layers, in seconds:", ""]
        lines += [*markdown_table(("way", "cold", "warm", "graphs compiled", "a step, ms"), rows), ""]
    if "sizes" in result:
        sizes = result["sizes"]
        rows = [(way, *(f"{facts[str(batch)]:.1f}" for batch in BATCHES)) for way, facts in sizes["ways"].items()]
        lines += [f"First call of a DiT of {sizes['layers']} layers at each batch size, in seconds:", ""]
        lines += markdown_table(("way", *(f"batch {batch}" for batch in BATCHES)), rows)
    return lines


def _verdict(loops: dict[str, Any]) -> str:
    share, gained = loops["share_of_bound"], loops["compiled_over_cached_and_compiled"]["median"]
    return (
        f"FLOPs allow {loops['flop_bound']:.2f}x; cached and compiled is {gained:.2f}x faster than compiled:"
        f" {share['value']:.2f} of it (goal {share['goal']}: {'met' if share['met'] else 'not met'})."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the loops")
    parser.add_argument("--layers", type=int, default=24, help="of the DiT")
    parser.add_argument("--mode", choices=MODES, default="default", help="of Inductor, for all that is compiled")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--full-size", action="store_true", help="SVD-XT's own size, for a GPU")
    parser.add_argument("--one", choices=(*WAYS, *SIZE_WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "compile.json")
    given = parser.parse_args(arguments)
    if given.one:
        measure = size_seconds if given.one in SIZE_WAYS else compile_seconds
        print(json.dumps(measure(given.one, given.layers)))
        return
    console = Console()
    setting = Setting(device=given.device, dtype=given.dtype, rounds=given.rounds)
    setting = setting.full_size() if given.full_size else setting
    if given.quick:
        setting = replace(setting.quick(), channels=(32, 64, 64, 64), steps=6, interval=3, rounds=1)
    layers = 4 if given.quick else given.layers
    result: dict[str, Any] = {
        "environment": environment(torch.device(given.device)),
        "setting": asdict(setting),
        "mode": given.mode,
    }
    if "loops" in given.parts:
        result["loops"] = measure_loops(setting, given.mode, console.log)
    if "seconds" in given.parts:
        result["seconds"] = measure_seconds(layers, console.log)
    if "sizes" in given.parts:
        result["sizes"] = measure_sizes(layers, console.log)
    lines = report(result)
    console.print("\n".join(lines), markup=False)
    write_json(given.out, result)
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
