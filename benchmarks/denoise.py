"""Denoising with an SVD-shaped U-Net: eager, our programs, and the DeepCache package, in one process and in turns.

    python -m benchmarks.denoise                 # about 8 minutes on two quiet cores
    python -m benchmarks.denoise --quick         # the same code at a small size, half a minute
    python -m benchmarks.denoise --device cuda --dtype float16 --full-size     # SVD-XT's own size, on a GPU

Every ratio is taken between neighbours in time, and its median over the repeats is what is held against the goal.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from rich.console import Console
from rich.text import Text
from torch import nn

import lightcache_fx as lc
from benchmarks.common import (
    RESULTS,
    Goal,
    Spread,
    device_peak,
    environment,
    in_turns,
    markdown_table,
    microseconds_of,
    pairwise_ratio,
    peak_process_bytes,
    print_rows,
    randomize,
    seconds_of,
    tensor_bytes,
    usable_device,
    write_json,
)
from lightcache_fx.module import runtime_of
from lightcache_fx.module_state import ModuleState
from lightcache_fx.program import BoundProgram
from lightcache_fx.stores import Stores
from lightcache_fx.units import format_bytes

DTYPES = ("float32", "float16", "bfloat16")
BRANCH = 0
GUIDANCE = 3.0
FULL_OVER_EAGER = 1.02
REUSE_OVER_FLOPS = 1.25
SHARE_OF_BOUND = 0.85


@dataclass(frozen=True)
class Setting:
    """One benchmark's size.

    Attributes:
        channels, heads: of the U-Net's levels; the default has 62 million parameters.
        layers: residual blocks of a level.
        context: width of the image embedding.
        frames, size: of the latent video, its size as height and width; the batch is 2, for guidance.
        steps, interval: of the denoising loops.
        cycles: how often steps are timed; a cycle is one eager step, one full one and `interval - 1` reuse steps.
        rounds: how often each kind of loop is timed.
        device, dtype: of the U-Net and of its inputs, by their names in torch.
    """

    channels: tuple[int, ...] = (64, 128, 256, 256)
    heads: tuple[int, ...] = (2, 4, 8, 8)
    layers: int = 2
    context: int = 256
    frames: int = 8
    size: tuple[int, int] = (32, 32)
    steps: int = 25
    interval: int = 8
    cycles: int = 8
    rounds: int = 3
    device: str = "cpu"
    dtype: str = "float32"

    def quick(self) -> Setting:
        """The same U-Net on a quarter of the frames and pixels, each figure taken twice."""
        return replace(self, frames=4, size=(16, 16), cycles=2, rounds=2)

    def full_size(self) -> Setting:
        """SVD-XT's own U-Net, of 1.5 billion parameters, and the latents of its 25 frames of 576 x 1024 pixels."""
        wide = replace(self, channels=(320, 640, 1280, 1280), heads=(5, 10, 20, 20), context=1024)
        return replace(wide, frames=25, size=(72, 128))

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype, as torch's objects."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.device(self.device), dtype


class Video:
    """The inputs of one generation, as Stable Video Diffusion's pipeline makes them, and its denoising loop.

    B batch (2: unconditional and conditional), F frames, C channels, H height, W width.
    """

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.device, dtype = setting.place()

        def normal(*shape: int) -> torch.Tensor:  # drawn on the CPU, so that every device gets the same
            return torch.randn(shape, generator=draw).to(self.device, dtype)

        frame = (setting.frames, 4, *setting.size)  # F C H W
        self.noise = normal(1, *frame)
        image = normal(1, *frame)
        self.image = torch.cat([torch.zeros_like(image), image])
        context = normal(1, 1, setting.context)
        self.context = torch.cat([torch.zeros_like(context), context])
        self.time_ids = torch.tensor([[6.0, 127.0, 0.02]], dtype=dtype, device=self.device).repeat(2, 1)
        self.steps = setting.steps

    def sample(self) -> torch.Tensor:
        """What the U-Net is given first: noise and image, for both guidance branches."""
        return self._sample(self.noise)

    def timestep(self, value: float = 1.5) -> torch.Tensor:
        """A timestep as the scheduler gives it."""
        return torch.tensor(value, device=self.device)

    def _sample(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.cat([latent] * 2), self.image], dim=2)  # B F C H W

    def predict(self, unet: nn.Module, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """One call of the U-Net, for both guidance branches."""
        output: tuple[torch.Tensor] = unet(
            self._sample(latent),
            timestep,
            encoder_hidden_states=self.context,
            added_time_ids=self.time_ids,
            return_dict=False,
        )
        return output[0]

    def scheduler(self) -> Any:
        """Euler with v-prediction, its timesteps set."""
        scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
        scheduler.set_timesteps(self.steps, device=self.device)
        return scheduler

    def denoise(self, unet: nn.Module, scheduler: Any) -> torch.Tensor:
        """The whole loop; returns the final latent."""
        latent: torch.Tensor = self.noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            uncond, cond = self.predict(unet, scheduler.scale_model_input(latent, timestep), timestep).chunk(2)
            latent = scheduler.step(uncond + GUIDANCE * (cond - uncond), timestep, latent).prev_sample
        return latent


def build_unet(setting: Setting) -> UNetSpatioTemporalConditionModel:
    """A U-Net with SVD's blocks and random weights, none of them zero."""
    inner = len(setting.channels) - 1
    unet = UNetSpatioTemporalConditionModel(
        sample_size=setting.size[0],
        num_frames=setting.frames,
        block_out_channels=setting.channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * inner + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * inner,
        layers_per_block=setting.layers,
        num_attention_heads=setting.heads,
        cross_attention_dim=setting.context,
    )
    randomize(unet)
    nn.Module.to(unet, *setting.place())  # diffusers' own `to` warns of float32 modules even where there are none
    return unet.eval().requires_grad_(False)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the steps of each cycle, and whether a full step returned what the eager one did, bitwise."""

    eager: list[float]
    full: list[float]
    reuse: list[list[float]]
    bitwise: bool

    def figures(self) -> dict[str, Spread]:
        """Seconds by kind, and ratios cycle by cycle, a cycle's reuse steps by their median."""
        reuse = [Spread.of(cycle).median for cycle in self.reuse]
        return {
            "eager_seconds": Spread.of(self.eager),
            "full_seconds": Spread.of(self.full),
            "reuse_seconds": Spread.of(second for cycle in self.reuse for second in cycle),
            "full_over_eager": pairwise_ratio(self.full, self.eager),
            "reuse_over_full": pairwise_ratio(reuse, self.full),
        }


def time_steps(unet: nn.Module, ours: nn.Module, video: Video, setting: Setting) -> StepTimes:
    """Cycles of one eager, one full and `interval - 1` reuse steps through the drop-in; the first cycle warms up.

    The drop-in's calls are steps of one marked run, so all that a call costs is in, and the schedule picks the program.
    """
    timestep = video.timestep()
    times = StepTimes([], [], [], _same(unet, ours, video, timestep))
    before = dict(lc.inspect(ours).counts)

    def step(module: nn.Module) -> float:
        return seconds_of(lambda: video.predict(module, video.noise, timestep), video.device)

    with lc.marked_run():
        for cycle in range(-1, setting.cycles):
            order = (unet, ours) if cycle % 2 else (ours, unet)
            first, second = step(order[0]), step(order[1])
            eager, full = (first, second) if order[0] is unet else (second, first)
            lc.step_done()
            reuse = []
            for _ in range(setting.interval - 1):
                reuse.append(step(ours))
                lc.step_done()
            if cycle >= 0:
                times.eager.append(eager)
                times.full.append(full)
                times.reuse.append(reuse)
    ran = {name: count - before.get(name, 0) for name, count in lc.inspect(ours).counts.items()}
    expected = {"full": setting.cycles + 1, "reuse": (setting.cycles + 1) * (setting.interval - 1)}
    if any(ran.get(name, 0) != count for name, count in expected.items()):
        raise RuntimeError(f"the steps were not those that the schedule asks for: expected {expected}, ran {ran}")
    return times


def _same(unet: nn.Module, ours: nn.Module, video: Video, timestep: torch.Tensor) -> bool:
    """Whether a full step equals an eager one."""
    lc.reset(ours)
    same = torch.equal(video.predict(unet, video.noise, timestep), video.predict(ours, video.noise, timestep))
    lc.reset(ours)
    return same


@dataclass(frozen=True)
class LoopTimes:
    """Seconds of whole loops, one of each kind a round; what is kept; and how far the two caches' results are apart.

    On a GPU also the most memory that each loop took, weights and inputs included.
    """

    plain: list[float]
    ours: list[float]
    package: list[float]
    kept_bytes: int
    package_tensors: int
    package_bytes: int
    difference: float
    hoisted_bytes: int = 0
    peaks: Mapping[str, list[int]] = field(default_factory=dict)

    def figures(self) -> dict[str, Spread]:
        """Seconds by kind, and ratios round by round."""
        return {
            "plain_seconds": Spread.of(self.plain),
            "lightcache_fx_seconds": Spread.of(self.ours),
            "deepcache_seconds": Spread.of(self.package),
            "speedup": pairwise_ratio(self.plain, self.ours),
            "deepcache_speedup": pairwise_ratio(self.plain, self.package),
            "deepcache_over_lightcache_fx": pairwise_ratio(self.package, self.ours),
        }

    def device_peaks(self) -> dict[str, Spread]:
        """Bytes by kind; none of a kind that was not measured, as on a CPU."""
        names = {"plain": "plain_bytes", "ours": "lightcache_fx_bytes", "package": "deepcache_bytes"}
        return {names[kind]: Spread.of(peaks) for kind, peaks in self.peaks.items() if peaks}


def sharing_copy(unet: nn.Module) -> nn.Module:
    """A copy of the modules over the same weights."""
    weights = itertools.chain(unet.parameters(), unet.buffers())
    return copy.deepcopy(unet, {id(weight): weight for weight in weights})


def time_loops(unet: nn.Module, ours: nn.Module, video: Video, setting: Setting) -> LoopTimes:
    """Rounds of the plain loop, ours, and the DeepCache package's at the same interval and branch."""
    from DeepCache import DeepCacheSDHelper

    on_device = video.device.type != "cpu"
    patched = sharing_copy(unet) if on_device else copy.deepcopy(unet)  # the package replaces methods
    results: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "package": []}
    peaks: dict[str, list[int]] = {name: [] for name in seconds}
    kept = hoisted = 0
    package_kept = (0, 0)

    def run(name: str, module: nn.Module) -> None:
        scheduler = video.scheduler()
        helper = DeepCacheSDHelper(SimpleNamespace(unet=patched, scheduler=scheduler))
        if name == "package":
            nonlocal package_kept
            helper.set_params(cache_interval=setting.interval, cache_branch_id=BRANCH)
            helper.enable()
        if on_device:
            lc.reset(ours)  # or what it keeps would count as memory of the other kinds
        with device_peak(video.device, peaks[name]):
            took = seconds_of(lambda: results.__setitem__(name, video.denoise(module, scheduler)), video.device)
        seconds[name].append(took)
        if name == "package":
            package_kept = tensor_bytes(list(helper.cached_output.values()))
            helper.disable()

    modules = {"plain": unet, "ours": ours, "package": patched}
    for _, name in in_turns(tuple(modules), setting.rounds):
        run(name, modules[name])
        if name == "ours":
            report = lc.inspect(ours)
            kept, hoisted = report.kept_bytes, report.hoisted_bytes
    difference = float((results["ours"] - results["package"]).abs().max())
    return LoopTimes(**seconds, kept_bytes=kept, package_tensors=package_kept[0], package_bytes=package_kept[1],
                     difference=difference, hoisted_bytes=hoisted, peaks=peaks)  # fmt: skip


def time_overhead(ours: nn.Module, video: Video, repeats: int = 30) -> dict[str, Spread]:
    """Microseconds that a reuse step costs beside its program, by part, and as a whole with the programs taken out."""
    runtime = runtime_of(ours)
    compiled = runtime.repertoire.latest()
    sample = video.sample()
    kwargs = {"encoder_hidden_states": video.context, "added_time_ids": video.time_ids, "return_dict": False}
    times = iter([video.timestep(float(repeats + 10 - i)) for i in range(repeats + 10)])
    call = runtime.reader.read((sample, video.timestep()), kwargs)
    state = ModuleState.take(runtime.module)
    parts: dict[str, Callable[[], object]] = {
        "reading the arguments": lambda: runtime.reader.read((sample, call.tensors[1]), kwargs),
        "checking the module's structure": state.unchanged,
        "finding the programs, that check included": lambda: runtime.compile(call),
        "looking up a reuse step's weights": compiled.bound["reuse"].weights,
    }
    if "prologue" in compiled.bound:
        parts["looking up the prologue's weights"] = compiled.bound["prologue"].weights
    figures = {name: microseconds_of(part, repeats, video.device) for name, part in parts.items()}

    real = dict(compiled.bound)
    lc.reset(ours)
    try:
        for name, program in real.items():
            compiled.bound[name] = _NoWork(program, video.device)  # type: ignore[assignment]
        whole = microseconds_of(lambda: ours(sample, next(times), **kwargs), repeats, video.device)
    finally:
        compiled.bound.update(real)
        lc.reset(ours)
    return {**figures, "a whole call without its program": whole}


class _NoWork:
    """Stands in for a bound program that copies nothing: looks up the weights, computes nothing."""

    def __init__(self, program: BoundProgram, device: torch.device) -> None:
        self.weights = program.weights
        self.user_inputs = program.user_inputs
        self.slots_read = program.slots_read
        self.slot_buffers = None
        self.runs = 0
        self._program = program.program
        self._nothing = torch.empty(0, device=device)

    def __call__(self, _: object, stores: Stores, _moment: object = None) -> list[torch.Tensor]:
        self.weights()
        for kind, name in self._program.state:
            (stores.slots if kind == "slot" else stores.hoisted)[name] = self._nothing
        return [self._nothing] * self._program.num_outputs


def goals_of(steps: StepTimes, loops: LoopTimes, *, flop_ratio: float, bound: float) -> dict[str, Goal]:
    """The four figures that the benchmark is for, by medians of neighbours' ratios."""
    step, loop = steps.figures(), loops.figures()
    return {
        "full_over_eager": Goal("full over eager", step["full_over_eager"].median, "at most", FULL_OVER_EAGER),
        "reuse_over_flop_ratio": Goal(
            "reuse over full, over the FLOP ratio",
            step["reuse_over_full"].median / flop_ratio,
            "at most",
            REUSE_OVER_FLOPS,
        ),
        "share_of_flop_bound": Goal(
            "share of the FLOP-bound speed-up", loop["speedup"].median / bound, "at least", SHARE_OF_BOUND
        ),
        "deepcache_over_lightcache_fx": Goal(
            "DeepCache's time over ours", loop["deepcache_over_lightcache_fx"].median, "above", 1.0
        ),
    }


def run(setting: Setting, console: Console) -> dict[str, Any]:
    """All figures, for JSON; progress goes to the console."""
    unet, video = build_unet(setting), Video(setting)
    parameters = sum(p.numel() for p in unet.parameters())
    console.print(f"U-Net of {parameters / 1e6:.1f} M parameters, latents {_shape(asdict(setting))}, {setting.dtype}")
    ours = lc.transform(unet, lc.Policy.deepcache(setting.interval, BRANCH))
    with torch.no_grad():
        first_call = seconds_of(lambda: video.predict(ours, video.noise, video.timestep()), video.device)
        console.print(f"first call, capture included: {first_call:.1f} s; now {setting.cycles} cycles of steps")
        steps = time_steps(unet, ours, video, setting)
        overhead = time_overhead(ours, video)
        console.print(f"{setting.rounds} rounds of {setting.steps} steps: plain, ours, DeepCache")
        loops = time_loops(unet, ours, video, setting)
    report = lc.inspect(ours)
    full, reuse = report.programs["full"].flops, report.programs["reuse"].flops
    bound = report.plan.flop_bound_speedup(setting.steps)
    step, peaks = steps.figures(), loops.device_peaks()
    goals = goals_of(steps, loops, flop_ratio=reuse / full, bound=bound)
    return {
        "environment": environment(video.device),
        "setting": {**asdict(setting), "branch": BRANCH, "parameters": parameters},
        "goals": {key: goal.as_dict() for key, goal in goals.items()},
        "flops": {"full": full, "reuse": reuse, "ratio": reuse / full, "hoisted": report.plan.hoist.flops},
        "steps": {name: spread.as_dict() for name, spread in step.items()} | {"bitwise_as_eager": steps.bitwise},
        "loops": {name: spread.as_dict() for name, spread in loops.figures().items()}
        | {"flop_bound_speedup": bound, "difference_from_deepcache": loops.difference},
        "capture_seconds": first_call - step["full_seconds"].median,
        "kept": {
            "lightcache_fx_bytes": loops.kept_bytes,
            "hoisted_bytes": loops.hoisted_bytes,
            "deepcache_bytes": loops.package_bytes,
            "deepcache_tensors": loops.package_tensors,
        },
        "overhead_microseconds": {name: spread.as_dict() for name, spread in overhead.items()},
        "peak_process_bytes": peak_process_bytes(),
        **({"device_peak": {name: peak.as_dict() for name, peak in peaks.items()}} if peaks else {}),
    }


def _shape(setting: Mapping[str, Any]) -> str:
    return " x ".join(map(str, (2, setting["frames"], *setting["size"])))


COLUMNS = ("figure", "median", "range", "goal")
CALL_COLUMNS = ("part", "µs, median", "range", "of a reuse step")


def _spread(facts: Mapping[str, float], pattern: str = "{:.3f}") -> tuple[str, str]:
    middle, low, high = (pattern.format(facts[key]) for key in ("median", "min", "max"))
    return middle, f"{low} to {high}"


def rows_of(result: Mapping[str, Any]) -> list[Sequence[str]]:
    """The figures with their goals beside them, these in rich's markup."""
    goals, steps, loops, kept = (result[key] for key in ("goals", "steps", "loops", "kept"))
    setting, flops = result["setting"], result["flops"]

    def goal(key: str) -> str:
        return f"{goals[key]['goal']}: [{'green]met' if goals[key]['met'] else 'red]not met'}[/]"

    def share(key: str) -> str:
        return f"{goals[key]['value']:.3f}"

    return [
        ("eager step, s", *_spread(steps["eager_seconds"]), ""),
        ("full program step, s", *_spread(steps["full_seconds"]), ""),
        ("reuse program step, s", *_spread(steps["reuse_seconds"], "{:.4f}"), ""),
        ("full / eager", *_spread(steps["full_over_eager"]), goal("full_over_eager")),
        ("reuse / full", *_spread(steps["reuse_over_full"], "{:.4f}"), ""),
        ("FLOPs, full and reuse", f"{flops['full'] / 1e9:.1f} G", f"{flops['reuse'] / 1e9:.2f} G", ""),
        ("FLOP ratio", f"{flops['ratio']:.4f}", "", ""),
        ("reuse / full / FLOP ratio", share("reuse_over_flop_ratio"), "", goal("reuse_over_flop_ratio")),
        (f"{setting['steps']} steps plain, s", *_spread(loops["plain_seconds"], "{:.2f}"), ""),
        (f"interval {setting['interval']}: lightcache_fx, s", *_spread(loops["lightcache_fx_seconds"], "{:.2f}"), ""),
        (f"interval {setting['interval']}: DeepCache, s", *_spread(loops["deepcache_seconds"], "{:.2f}"), ""),
        ("speed-up, lightcache_fx", *_spread(loops["speedup"]), ""),
        ("speed-up, DeepCache", *_spread(loops["deepcache_speedup"]), ""),
        ("speed-up, FLOP bound", f"{loops['flop_bound_speedup']:.3f}", "", ""),
        ("share of the FLOP bound", share("share_of_flop_bound"), "", goal("share_of_flop_bound")),
        (
            "DeepCache / lightcache_fx",
            *_spread(loops["deepcache_over_lightcache_fx"]),
            goal("deepcache_over_lightcache_fx"),
        ),
        ("capture, once, s", f"{result['capture_seconds']:.1f}", "", ""),
        ("kept: lightcache_fx", format_bytes(kept["lightcache_fx_bytes"]), "", ""),
        ("hoisted: lightcache_fx", format_bytes(kept["hoisted_bytes"]), "", ""),
        ("kept: DeepCache", format_bytes(kept["deepcache_bytes"]), f"{kept['deepcache_tensors']} tensors", ""),
        *_peak_rows(result.get("device_peak", {})),
    ]


def _peak_rows(peaks: Mapping[str, Mapping[str, int]]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name, facts in peaks.items():
        middle, low, high = (format_bytes(int(facts[key])) for key in ("median", "min", "max"))
        rows.append((f"peak on the device: {name.removesuffix('_bytes')}", middle, f"{low} to {high}", ""))
    return rows


def call_rows_of(result: Mapping[str, Any]) -> list[Sequence[str]]:
    """What a call costs beside its program."""
    reuse_microseconds = 1e6 * result["steps"]["reuse_seconds"]["median"]
    return [
        (name, *_spread(facts, "{:.0f}"), f"{facts['median'] / reuse_microseconds:.2%}")
        for name, facts in result["overhead_microseconds"].items()
    ]


def _equalities(result: Mapping[str, Any]) -> str:
    difference = result["loops"]["difference_from_deepcache"]
    return (
        f"full step bitwise as eager: {'yes' if result['steps']['bitwise_as_eager'] else 'NO'};"
        f" final latent against DeepCache's: {'bitwise equal' if difference == 0 else f'{difference:.3g} off'}"
    )


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """All tables."""
    print_rows("Denoising", COLUMNS, rows_of(result), console)
    print_rows("What a call costs beside its program", CALL_COLUMNS, call_rows_of(result), console)
    console.print(_equalities(result))


def as_markdown(result: Mapping[str, Any]) -> str:
    """The same tables, for a file beside the JSON."""
    environment, setting = result["environment"], result["setting"]
    size = f"{setting['parameters'] / 1e6:.1f} M parameters, latents {_shape(setting)}, {setting['dtype']}"
    plain = [[Text.from_markup(cell).plain for cell in row] for row in rows_of(result)]
    lines = [
        f"# Denoising on {environment.get('gpu', environment['processor'])}",
        "",
        f"By `python -m benchmarks.denoise`: {size}, torch {environment['torch']}.",
        "",
        *markdown_table(COLUMNS, plain),
        "",
        "What a call costs beside its program:",
        "",
        *markdown_table(CALL_COLUMNS, call_rows_of(result)),
        "",
        f"{_equalities(result)}.",
    ]
    return "\n".join([*lines, ""])


def result_path(setting: Setting) -> Path:
    """Where a result goes by default: to a file of the device's kind; on a CPU another dtype has a file of its own."""
    kind = setting.place()[0].type
    if kind == "cpu":
        return RESULTS / ("denoise.json" if setting.dtype == Setting.dtype else f"denoise-cpu-{setting.dtype}.json")
    return RESULTS / f"denoise-{kind}.json"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """The JSON, and its tables beside it if a device was measured."""
    write_json(path, result)
    if result["setting"]["device"] != "cpu":
        path.with_suffix(".md").write_text(as_markdown(result), encoding="utf-8")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with the `Setting` that it asks for as `setting`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small size, two repeats; nothing to report")
    size.add_argument("--full-size", action="store_true", help="SVD-XT's own U-Net and latents; on a GPU only")
    parser.add_argument(
        "--device", type=usable_device, default=Setting.device, help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=Setting.dtype, help="of weights and inputs (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=Setting.steps, help="denoising steps of a loop")
    parser.add_argument("--interval", type=int, default=Setting.interval, help="one step in so many is full")
    parser.add_argument("--rounds", type=int, default=Setting.rounds, help="how often each kind of loop is timed")
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads")
    parser.add_argument(
        "--out", type=Path, help="JSON file; benchmarks/results/denoise.json, on a GPU denoise-cuda; none if --quick"
    )
    options = parser.parse_args(arguments)
    if options.interval < 2 or options.steps < 2 or options.threads < 1 or options.rounds < 1:
        parser.error("--interval and --steps are at least 2, --threads and --rounds at least 1")
    if options.full_size and options.device == "cpu":
        parser.error("argument --full-size: expected --device cuda or cuda:N with it, got cpu, where it takes days")
    setting = Setting(device=options.device, dtype=options.dtype)
    setting = replace(setting, steps=options.steps, interval=options.interval, rounds=options.rounds)
    if options.quick or options.full_size:
        setting = setting.quick() if options.quick else setting.full_size()
    options.setting = setting
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    result = run(options.setting, console)
    print_result(result, console)
    out = options.out or (None if options.quick else result_path(options.setting))
    if out is not None:
        write_result(out, result)
        console.print(f"written: {out.name}")
    if not math.isfinite(result["loops"]["difference_from_deepcache"]):
        raise SystemExit("the final latents are not finite: the figures stand, the comparison does not")


if __name__ == "__main__":
    main()
