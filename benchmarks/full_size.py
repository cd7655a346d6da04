"""Peaks of the published systems at full size, stage by stage, predicted for CUDA: fake tensors, no weights, no GPU.

    python -m benchmarks.full_size                    # all, in a quarter of an hour, with 1 GB of memory
    python -m benchmarks.full_size --only svd-xt      # the others are kept as they are in the results file

Four ways, in float16. `plain`, `deepcache` and `cache` have all weights on the device and cut nothing:

* `plain`: the graph of each model as it was captured.
* `deepcache`: the package DeepCache itself, run on fake tensors. Its hooks keep what each of their layers returns:
  counted are those tensors, and by how much its second full step takes more than a plain step.
* `cache`: our cut at the published setting, which keeps one value (on the transformer: one for each stream).
* `lightcache`: `Policy.lightcache(system)`: swapped, chunked and sliced, each stage with the device to itself.

What a pipeline holds beside its models (latents, embeddings, the video that it puts together) is in none of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

import lightcache_fx as lc
from benchmarks.common import RESULTS, environment, markdown_table, write_json
from benchmarks.figures.style import COLOURS, FOLDER, written
from lightcache_fx.capture import Capture
from lightcache_fx.cli.planning import Made, Wish, make
from lightcache_fx.cli.presets import PRESETS
from lightcache_fx.cli.stages import STAGES, Meter
from lightcache_fx.liveness import timeline
from lightcache_fx.module import capture_and_plan
from lightcache_fx.pipeline_plan import Stage, plan_pipeline
from lightcache_fx.program import whole_programs
from lightcache_fx.units import format_bytes

WAYS = ("plain", "deepcache", "cache", "lightcache")
_COLOURS = {
    "plain": COLOURS["plain"],
    "deepcache": COLOURS["DeepCache"],
    "cache": "#f4b896",
    "lightcache": COLOURS["ours"],
}
_TITLES = {"plain": "plain", "deepcache": "DeepCache", "cache": "our cache alone", "lightcache": "ours"}


def stage_of(stage: Stage) -> str:
    """`encode`, `denoise` or `decode`: what comes before denoising encodes."""
    return stage.name if stage.name in STAGES else "encode"


def _planned(stage: Stage, policy: lc.Policy) -> tuple[Capture, lc.Plan]:
    """What a stage's call is captured as, and the plan of it on a CUDA device."""
    return capture_and_plan(
        stage.module, stage.args, stage.kwargs, policy, method=stage.method, device="cuda", hardware=None
    )


def activations(stage: Stage) -> int:
    """Bytes that one call of a stage as it is allocates at most."""
    captured, _ = _planned(stage, lc.Policy(hoist=False))
    return timeline(captured.graph_module.graph, cuda=True).peak_bytes


@dataclass(frozen=True)
class Kept:
    """What a cache keeps between steps, and how much a step takes with it, beside the weights."""

    num_bytes: int
    num_tensors: int
    step_bytes: int


def cached_step(stage: Stage, cache: lc.Cache) -> Kept:
    """Our cut alone."""
    captured, plan = _planned(stage, lc.Policy(cache=cache))
    wholes = whole_programs(captured, plan)
    steps = [timeline(whole.graph, cuda=True).peak_bytes for name, whole in wholes.items() if name != "prologue"]
    assert plan.cut is not None
    return Kept(plan.kept_bytes, len(plan.cut.slots), max(steps) + plan.kept_bytes + plan.hoist.num_bytes)


def deepcache_step(stage: Stage, plain: int, interval: int) -> Kept:
    """The package's own code on fake tensors: the second full step, when it holds what the first has kept."""
    from DeepCache import DeepCacheSDHelper

    unet: Any = stage.module
    mode = next(unet.parameters()).fake_mode
    named = dict(stage.kwargs)
    sample, timestep = named.pop("sample"), named.pop("timestep")
    times = [SimpleNamespace(item=lambda step=step: step) for step in range(interval + 1)]
    schedule = SimpleNamespace(timesteps=range(interval + 1))
    with mode, torch.no_grad():
        with Meter() as meter:
            meter.stage("denoise")
            unet(sample, timestep, **named)
            meter.stage("done")
        alone = meter.peak_bytes["denoise"]
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=schedule))
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            forward = helper.function_dict["unet_forward"]
            # The wrapper asks a timestep for its value, which a fake one has not, so it is given its place instead.
            helper.function_dict["unet_forward"] = lambda _sample, _time, **given: forward(sample, timestep, **given)
            with Meter() as meter:
                unet(sample, times[0], **named)
                meter.stage("denoise")
                unet(sample, times[interval], **named)
                meter.stage("done")
            kept = _storages(helper.cached_output)
        finally:
            helper.disable()
    return Kept(sum(kept), len(kept), plain + meter.peak_bytes["denoise"] - alone)


def _storages(tree: object) -> list[int]:
    """Bytes of the distinct storages behind the tensors of a tree."""
    storages = [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [storage.nbytes() for storage in {StorageWeakRef(storage): storage for storage in storages}.values()]


def predict(name: str) -> dict[str, Any]:
    """All ways of one system."""
    begin = time.perf_counter()
    system = PRESETS[name]
    assert system.cache is not None
    made = make(system, Wish(), whole=True)
    weights, plain = _weight_bytes(made), dict[str, int]()
    for stage in made.stages:
        most = activations(stage)
        plain[stage_of(stage)] = max(plain.get(stage_of(stage), 0), most)
    (denoise,) = (stage for stage in made.stages if stage.name == "denoise")
    resident = {stage: weights + size for stage, size in plain.items()}
    ways: dict[str, Any] = {"plain": {"peak_bytes": resident, "kept_bytes": 0, "kept_tensors": 0}}
    interval = system.cache.interval or 1
    if system.component().name == "unet":
        kept = deepcache_step(denoise, plain["denoise"], interval)
        ways["deepcache"] = _resident(weights, plain, kept, leaves=False)
    else:
        ways["deepcache"] = {"skipped": "it caches U-Nets"}
    ways["cache"] = _resident(weights, plain, cached_step(denoise, system.cache), leaves=True)
    planned = plan_pipeline(made.stages, lc.Policy.lightcache(name), device="cuda")
    peaks: dict[str, int] = {}
    for part in planned.stages:
        peaks[stage_of(part.stage)] = max(peaks.get(stage_of(part.stage), 0), part.peak_bytes)
    ours = {
        "peak_bytes": peaks,
        "kept_bytes": ways["cache"]["kept_bytes"],
        "kept_tensors": ways["cache"]["kept_tensors"],
    }
    notes = [note for part in planned.stages if part.plan is not None for note in part.plan.notes]
    ways["lightcache"] = ours | {"slowdown": planned.slowdown, "fits": planned.fits, "notes": notes}
    request = made.request
    return {
        "title": system.title,
        "size": f"{request.frames} x {request.height} x {request.width}",
        "decode_frames": request.decode_frames,
        "weight_bytes": weights,
        "left_out": dict(made.left_out),
        "ways": ways,
        "seconds": time.perf_counter() - begin,
    }


def _weight_bytes(made: Made) -> int:
    modules: dict[int, nn.Module] = {id(stage.module): stage.module for stage in made.stages}
    return sum(weight.nbytes for module in modules.values() for weight in module.parameters())


def _resident(weights: int, plain: Mapping[str, int], kept: Kept, *, leaves: bool) -> dict[str, Any]:
    """A cache with everything on the device; what it keeps is still there while decoding, unless it leaves."""
    peaks = {stage: weights + size for stage, size in plain.items()} | {"denoise": weights + kept.step_bytes}
    if not leaves:
        peaks["decode"] += kept.num_bytes
    return {"peak_bytes": peaks, "kept_bytes": kept.num_bytes, "kept_tensors": kept.num_tensors}


COLUMNS = ("system", "way", "encode", "denoise", "decode", "at most", "of plain", "kept between steps")


def rows_of(systems: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a system and way; peaks in GiB."""
    rows = []
    for name, system in systems.items():
        most = max(system["ways"]["plain"]["peak_bytes"].values())
        for way, cell in system["ways"].items():
            title = f"{name}, {system['size']}" if way == "plain" else ""
            if "skipped" in cell:
                rows.append((title, way, *[""] * 5, cell["skipped"]))
                continue
            peaks = cell["peak_bytes"]
            kept = f"{format_bytes(cell['kept_bytes'])}, tensors: {cell['kept_tensors']}" if cell["kept_bytes"] else ""
            sizes = [f"{peaks[stage] / 2**30:.2f}" if stage in peaks else "" for stage in STAGES]
            highest = max(peaks.values())
            rows.append((title, way, *sizes, f"{highest / 2**30:.2f}", f"{highest / most:.0%}", kept))
    return rows


def as_markdown(systems: Mapping[str, Any]) -> str:
    """The table and what it is of."""
    weights = ", ".join(f"{name} {system['weight_bytes'] / 2**30:.2f}" for name, system in systems.items())
    lines = [
        "# Peaks at full size, predicted",
        "",
        "By `python -m benchmarks.full_size`: float16, for CUDA, from fake tensors; nothing here has been measured.",
        "GiB on the device in each stage, weights included; all ways but `lightcache` have all weights there.",
        "",
        *markdown_table(COLUMNS, rows_of(systems)),
        "",
        f"Weights of all models, GiB: {weights} (without a text encoder: its preset has none).",
    ]
    return "\n".join([*lines, ""])


def draw(systems: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """One panel a system: the peak of each stage in each way."""
    with written("full_size", folder, figsize=(3.2 * len(systems), 3.4)) as figure:
        panels = figure.subplots(1, len(systems), squeeze=False).ravel()
        for axes, (name, system) in zip(panels, systems.items(), strict=True):
            stages = [stage for stage in STAGES if stage in system["ways"]["plain"]["peak_bytes"]]
            cells = {way: cell for way, cell in system["ways"].items() if "peak_bytes" in cell}
            width = 0.8 / len(cells)
            for number, (way, cell) in enumerate(cells.items()):
                places = [place + (number - (len(cells) - 1) / 2) * width for place in range(len(stages))]
                heights = [cell["peak_bytes"][stage] / 2**30 for stage in stages]
                axes.bar(places, heights, width, color=_COLOURS[way], label=_TITLES[way])
            axes.set_xticks(range(len(stages)), stages)
            axes.set_title(f"{name}\n{system['size']}")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("GiB on the device, predicted")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PRESETS), action="append")
    parser.add_argument("--draw", action="store_true", help="draw anew, predict nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "full_size.json", help="a .md is written beside it")
    parser.add_argument("--figures", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    console = Console(width=140)
    names = [] if options.draw else options.only or list(PRESETS)
    before = json.loads(options.out.read_text(encoding="utf-8"))["systems"] if options.out.exists() else {}
    found = {name: before[name] for name in PRESETS if name in before and (options.only or options.draw)}
    for name in names:
        found[name] = predict(name)
        console.print(rows_of({name: found[name]}), f"{found[name]['seconds']:.0f} s", markup=False)
        gc.collect()
        ordered = {name: found[name] for name in PRESETS if name in found}
        write_json(options.out, {"environment": environment(), "systems": ordered})
    systems = {name: found[name] for name in PRESETS if name in found}
    options.out.with_suffix(".md").write_text(as_markdown(systems), encoding="utf-8")
    draw(systems, options.figures)


if __name__ == "__main__":
    main()
