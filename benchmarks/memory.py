"""Measured peak and time of chunked programs against whole ones, in one process and in turns.

    python -m benchmarks.memory                  # some minutes on two quiet cores
    python -m benchmarks.memory --rounds 1
    python -m benchmarks.memory --device cuda --dtype float16 --full-size     # the published models' own sizes

Each model is cut to half (`--share`) of its own activation peak. Peaks are measured by allocation events,
times pair by pair. The difference is between the two results; in float32 on a CPU each one's own error is given
beside it, against what a float64 copy of the eager model returns.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
    randomize,
    seconds_of,
    usable_device,
    write_json,
)
from benchmarks.denoise import Setting, Video, build_unet
from lightcache_fx.liveness import timeline
from lightcache_fx.measure import measure_peak
from lightcache_fx.units import format_bytes

OVERHEAD = 1.08
TOLERANCE = 1e-5
Call = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where and how large: `full_size` is that of the published models."""

    device: str = "cpu"
    dtype: str = "float32"
    full_size: bool = False

    @property
    def kind(self) -> torch.device:
        """The device as torch's object."""
        return torch.device(self.device)

    def put(self, *things: Any) -> list[Any]:
        """Modules and tensors, moved there."""
        return [thing.to(self.kind, getattr(torch, self.dtype)) for thing in things]


def _unet(place: Place) -> tuple[nn.Module, Call]:
    setting = Setting(device=place.device, dtype=place.dtype)
    setting = setting.full_size() if place.full_size else setting
    video = Video(setting)
    timestep = torch.tensor(1.5, device=place.kind)
    return build_unet(setting), lambda unet: video.predict(unet, video.noise, timestep)


def _widths(place: Place) -> tuple[int, ...]:
    return (128, 256, 512, 512) if place.full_size else (32, 64, 128, 128)


def _image_vae(place: Place) -> tuple[nn.Module, Call]:
    vae = diffusers.AutoencoderKL(
        block_out_channels=_widths(place), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=256,
    )  # fmt: skip
    shape = (25, 4, 64, 64) if place.full_size else (8, 4, 24, 24)
    return _decoder(vae, shape, place)


def _video_vae(place: Place) -> tuple[nn.Module, Call]:
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=_widths(place), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        latent_channels=4, sample_size=256,
    )  # fmt: skip
    shape = (8, 4, 72, 128) if place.full_size else (8, 4, 20, 24)
    return _decoder(vae, shape, place, num_frames=8)


def _decoder(vae: nn.Module, shape: tuple[int, ...], place: Place, **options: int) -> tuple[nn.Module, Call]:
    randomize(vae)
    vae, latents = place.put(vae, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return vae, lambda vae: vae.decode(latents, return_dict=False, **options)[0]


MODELS = {"svd-unet": _unet, "sd-vae": _image_vae, "svd-vae": _video_vae}


def exact_result(name: str, model: nn.Module, place: Place) -> torch.Tensor | None:
    """What a float64 copy of a float32 model on the CPU returns; None for others."""
    if (place.kind.type, place.dtype) != ("cpu", "float32"):
        return None
    _, call = MODELS[name](replace(place, dtype="float64"))
    return call(copy.deepcopy(model).double())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest element of what is expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def measure(name: str, rounds: int, place: Place, share: float) -> dict[str, Any]:
    """One model: peaks, predicted and measured, times in turns, and the largest difference of the results."""
    model, call = MODELS[name](place)
    model.eval().requires_grad_(False)
    exact = exact_result(name, model, place)
    whole = lc.transform(model)
    expected = call(whole)
    peak = timeline(lc.inspect(whole).programs["full"].graph_module.graph).peak_bytes
    asked = budget = int(share * peak)
    try:
        chunked = lc.transform(model, lc.Policy(chunk=lc.Chunk(budget=budget)))
        found = call(chunked)
    except lc.errors.BudgetError as error:  # reported: what was reached stands beside what was asked
        budget = int(1.01 * (error.reached or peak))
        chunked = lc.transform(model, lc.Policy(chunk=lc.Chunk(budget=budget)))
        found = call(chunked)
    difference = distance(found, expected)
    results = {"whole": expected, "chunked": found}
    plan = lc.inspect(chunked).plan.chunks["full"]
    measured = {kind: measure_peak(lambda m=module: call(m), device_type=place.kind.type).peak_bytes for kind, module in
                (("whole", whole), ("chunked", chunked))}  # fmt: skip
    seconds: dict[str, list[float]] = {"whole": [], "chunked": []}
    modules = {"whole": whole, "chunked": chunked}
    for _, kind in in_turns(tuple(modules), rounds):
        seconds[kind].append(seconds_of(lambda m=modules[kind]: call(m), place.kind))
    ratio = pairwise_ratio(seconds["chunked"], seconds["whole"])
    return {
        "predicted": {"whole": peak, "chunked": plan.peak_after},
        "measured": measured,
        "share_of_peak": {"value": budget / peak, "goal": f"at most {share}", "met": budget <= asked},
        "prediction_off": {k: p / measured[k] - 1 for k, p in (("whole", peak), ("chunked", plan.peak_after))},
        "time_ratio": ratio.as_dict(),
        "time_goal": {"value": ratio.median, "goal": f"at most {OVERHEAD}", "met": ratio.median <= OVERHEAD},
        "difference": difference,
        "equal": difference <= TOLERANCE,
        "error": {kind: None if exact is None else distance(result, exact) for kind, result in results.items()},
        "regions": len(plan.regions),
    }


def row_of(name: str, result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    predicted, measured, ratio = result["predicted"], result["measured"], result["time_ratio"]
    return [
        name,
        format_bytes(measured["whole"]),
        format_bytes(measured["chunked"]),
        format_bytes(predicted["chunked"]),
        f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
        "met" if result["time_goal"]["met"] else "not met",
        f"{result['difference']:.2e}" + ("" if result["equal"] else f", above {TOLERANCE:.0e}"),
        *("" if error is None else f"{error:.2e}" for error in result["error"].values()),
    ]


COLUMNS = (
    "model", "whole, measured", "chunked, measured", "predicted", "time chunked / whole", "", "difference",
    "whole from float64", "chunked from float64",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(MODELS), action="append")
    parser.add_argument("--share", type=float, default=0.5, help="of its own peak that each model is cut to")
    parser.add_argument("--device", type=usable_device, default=Place.device)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default=Place.dtype)
    parser.add_argument("--full-size", action="store_true", help="the published models' own sizes; on a GPU only")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/memory.json, on a GPU memory-cuda.json")
    options = parser.parse_args(arguments)
    if options.full_size and options.device == "cpu":
        parser.error("argument --full-size: expected --device cuda or cuda:N with it, got cpu, where it takes days")
    place = Place(options.device, options.dtype, options.full_size)
    out = options.out or RESULTS / ("memory.json" if place.kind.type == "cpu" else f"memory-{place.kind.type}.json")
    console = Console()
    results = {}
    with torch.no_grad():
        for name in options.only or MODELS:
            results[name] = measure(name, options.rounds, place, options.share)
            console.print(row_of(name, results[name]), markup=False)
    write_json(out, {"environment": environment(), "place": asdict(place), "models": results})
    table = markdown_table(COLUMNS, [row_of(*item) for item in results.items()])
    out.with_suffix(".md").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
