"""Denoising with an SVD-shaped U-Net: eager, our programs, and the DeepCache package, in one process and in turns.

    python -m benchmarks.denoise                 # about 8 minutes on two quiet cores
    python -m benchmarks.denoise --quick         # the same code at a small size, half a minute

Every ratio is taken between neighbours in time, and its median over the repeats is what is held against the goal.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks.common import (
    RESULTS,
    Goal,
    Spread,
    environment,
    in_turns,
    microseconds_of,
    pairwise_ratio,
    peak_process_bytes,
    print_rows,
    randomize,
    seconds_of,
    tensor_bytes,
    write_json,
)
from lightcache_fx.module import runtime_of
from lightcache_fx.module_state import ModuleState
from lightcache_fx.plan import Plan, format_bytes

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
        frames, size: of the latent video; the batch is 2, for guidance.
        steps, interval: of the denoising loops.
        cycles: how often steps are timed; a cycle is one eager step, one full one and `interval - 1` reuse steps.
        rounds: how often each kind of loop is timed.
    """

    channels: tuple[int, ...] = (64, 128, 256, 256)
    heads: tuple[int, ...] = (2, 4, 8, 8)
    layers: int = 2
    context: int = 256
    frames: int = 8
    size: int = 32
    steps: int = 25
    interval: int = 8
    cycles: int = 8
    rounds: int = 3

    def quick(self) -> Setting:
        """The same U-Net on a quarter of the frames and pixels, each figure taken twice."""
        return replace(self, frames=4, size=16, cycles=2, rounds=2)


class Video:
    """The inputs of one generation, as Stable Video Diffusion's pipeline makes them, and its denoising loop.

    B batch (2: unconditional and conditional), F frames, C channels, H height, W width.
    """

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        frame = (setting.frames, 4, setting.size, setting.size)  # F C H W
        self.noise = torch.randn(1, *frame, generator=draw)
        image = torch.randn(1, *frame, generator=draw)
        self.image = torch.cat([torch.zeros_like(image), image])
        context = torch.randn(1, 1, setting.context, generator=draw)
        self.context = torch.cat([torch.zeros_like(context), context])
        self.time_ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(2, 1)
        self.steps = setting.steps

    def predict(self, unet: nn.Module, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """One call of the U-Net, for both guidance branches."""
        sample_BFCHW = torch.cat([torch.cat([latent] * 2), self.image], dim=2)
        output: tuple[torch.Tensor] = unet(
            sample_BFCHW,
            timestep,
            encoder_hidden_states=self.context,
            added_time_ids=self.time_ids,
            return_dict=False,
        )
        return output[0]

    def scheduler(self) -> Any:
        """Euler with v-prediction, its timesteps set."""
        scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def denoise(self, unet: nn.Module, scheduler: Any) -> torch.Tensor:
        """The whole loop; returns the final latent."""
        latent = self.noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            uncond, cond = self.predict(unet, scheduler.scale_model_input(latent, timestep), timestep).chunk(2)
            latent = scheduler.step(uncond + GUIDANCE * (cond - uncond), timestep, latent).prev_sample
        return latent


def build_unet(setting: Setting) -> UNetSpatioTemporalConditionModel:
    """A U-Net with SVD's blocks and random weights, none of them zero."""
    inner = len(setting.channels) - 1
    unet = UNetSpatioTemporalConditionModel(
        sample_size=setting.size,
        num_frames=setting.frames,
        block_out_channels=setting.channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * inner + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * inner,
        layers_per_block=setting.layers,
        num_attention_heads=setting.heads,
        cross_attention_dim=setting.context,
    )
    randomize(unet)
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
    timestep = torch.tensor(1.5)
    times = StepTimes([], [], [], _same(unet, ours, video, timestep))
    before = dict(lc.inspect(ours).counts)

    def step(module: nn.Module) -> float:
        return seconds_of(lambda: video.predict(module, video.noise, timestep))

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
    """Seconds of whole loops, one of each kind a round; what is kept; and how far the two caches' results are apart."""

    plain: list[float]
    ours: list[float]
    package: list[float]
    kept_bytes: int
    package_tensors: int
    package_bytes: int
    difference: float

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


def time_loops(unet: nn.Module, ours: nn.Module, video: Video, setting: Setting) -> LoopTimes:
    """Rounds of the plain loop, ours, and the DeepCache package's at the same interval and branch."""
    from DeepCache import DeepCacheSDHelper

    patched = copy.deepcopy(unet)  # the package replaces methods
    results: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "package": []}
    kept = 0
    package_kept = (0, 0)

    def run(name: str, module: nn.Module) -> None:
        scheduler = video.scheduler()
        helper = DeepCacheSDHelper(SimpleNamespace(unet=patched, scheduler=scheduler))
        if name == "package":
            nonlocal package_kept
            helper.set_params(cache_interval=setting.interval, cache_branch_id=BRANCH)
            helper.enable()
        seconds[name].append(seconds_of(lambda: results.__setitem__(name, video.denoise(module, scheduler))))
        if name == "package":
            package_kept = tensor_bytes(list(helper.cached_output.values()))
            helper.disable()

    modules = {"plain": unet, "ours": ours, "package": patched}
    for _, name in in_turns(tuple(modules), setting.rounds):
        run(name, modules[name])
        if name == "ours":
            kept = lc.inspect(ours).kept_bytes
    difference = float((results["ours"] - results["package"]).abs().max())
    return LoopTimes(**seconds, kept_bytes=kept, package_tensors=package_kept[0], package_bytes=package_kept[1],
                     difference=difference)  # fmt: skip


def time_overhead(ours: nn.Module, video: Video, repeats: int = 30) -> dict[str, Spread]:
    """Microseconds that a reuse step costs beside its program, by part, and as a whole with the programs taken out."""
    runtime = runtime_of(ours)
    compiled = runtime.latest()
    sample = torch.cat([torch.cat([video.noise] * 2), video.image], dim=2)
    kwargs = {"encoder_hidden_states": video.context, "added_time_ids": video.time_ids, "return_dict": False}
    times = iter([torch.tensor(float(repeats + 10 - i)) for i in range(repeats + 10)])
    call = runtime.reader.read((sample, torch.tensor(1.5)), kwargs)
    state = ModuleState.take(runtime.module)
    parts: dict[str, Callable[[], object]] = {
        "reading the arguments": lambda: runtime.reader.read((sample, call.tensors[1]), kwargs),
        "checking the module's structure": state.unchanged,
        "finding the programs, that check included": lambda: runtime.compile(call),
        "looking up a reuse step's weights": compiled.bound["reuse"].weights,
    }
    if "prologue" in compiled.bound:
        parts["looking up the prologue's weights"] = compiled.bound["prologue"].weights
    figures = {name: microseconds_of(part, repeats) for name, part in parts.items()}

    real = dict(compiled.bound)
    lc.reset(ours)
    try:
        for name, program in real.items():
            compiled.bound[name] = _NoWork(program, compiled.plan)  # type: ignore[assignment]
        whole = microseconds_of(lambda: ours(sample, next(times), **kwargs), repeats)
    finally:
        compiled.bound.update(real)
        lc.reset(ours)
    return {**figures, "a whole call without its program": whole}


class _NoWork:
    """Stands in for a bound program: looks up the weights, computes nothing."""

    def __init__(self, program: Any, plan: Plan) -> None:
        self.weights = program.weights
        self.user_inputs = program.user_inputs
        state = {"full": len(plan.cut.slots) if plan.cut else 0, "prologue": len(plan.hoist.values)}
        nothing = torch.empty(0)
        self._results = [nothing] * program.program.num_outputs, [nothing] * state.get(program.program.name, 0)

    def __call__(self, *_: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        self.weights()
        return self._results


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
    console.print(f"U-Net of {parameters / 1e6:.1f} M parameters, latents 2 x {setting.frames} x {setting.size}²")
    ours = lc.transform(unet, lc.Policy.deepcache(setting.interval, BRANCH))
    with torch.no_grad():
        first_call = seconds_of(lambda: video.predict(ours, video.noise, torch.tensor(1.5)))
        console.print(f"first call, capture included: {first_call:.1f} s; now {setting.cycles} cycles of steps")
        steps = time_steps(unet, ours, video, setting)
        overhead = time_overhead(ours, video)
        console.print(f"{setting.rounds} rounds of {setting.steps} steps: plain, ours, DeepCache")
        loops = time_loops(unet, ours, video, setting)
    report = lc.inspect(ours)
    full, reuse = report.programs["full"].flops, report.programs["reuse"].flops
    bound = report.plan.flop_bound_speedup(setting.steps)
    step = steps.figures()
    goals = goals_of(steps, loops, flop_ratio=reuse / full, bound=bound)
    return {
        "environment": environment(),
        "setting": {**asdict(setting), "branch": BRANCH, "parameters": parameters},
        "goals": {key: goal.as_dict() for key, goal in goals.items()},
        "flops": {"full": full, "reuse": reuse, "ratio": reuse / full, "hoisted": report.plan.hoist.flops},
        "steps": {name: spread.as_dict() for name, spread in step.items()} | {"bitwise_as_eager": steps.bitwise},
        "loops": {name: spread.as_dict() for name, spread in loops.figures().items()}
        | {"flop_bound_speedup": bound, "difference_from_deepcache": loops.difference},
        "capture_seconds": first_call - step["full_seconds"].median,
        "kept": {
            "lightcache_fx_bytes": loops.kept_bytes,
            "hoisted_bytes": report.hoisted_bytes,
            "deepcache_bytes": loops.package_bytes,
            "deepcache_tensors": loops.package_tensors,
        },
        "overhead_microseconds": {name: spread.as_dict() for name, spread in overhead.items()},
        "peak_process_bytes": peak_process_bytes(),
    }


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """The figures with their goals beside them."""
    goals, steps, loops, kept = (result[key] for key in ("goals", "steps", "loops", "kept"))
    setting, flops = result["setting"], result["flops"]

    def spread(facts: Mapping[str, float], pattern: str = "{:.3f}") -> tuple[str, str]:
        middle, low, high = (pattern.format(facts[key]) for key in ("median", "min", "max"))
        return middle, f"{low} to {high}"

    def goal(key: str) -> str:
        return f"{goals[key]['goal']}: [{'green]met' if goals[key]['met'] else 'red]not met'}[/]"

    def share(key: str) -> str:
        return f"{goals[key]['value']:.3f}"

    rows: list[Sequence[str]] = [
        ("eager step, s", *spread(steps["eager_seconds"]), ""),
        ("full program step, s", *spread(steps["full_seconds"]), ""),
        ("reuse program step, s", *spread(steps["reuse_seconds"], "{:.4f}"), ""),
        ("full / eager", *spread(steps["full_over_eager"]), goal("full_over_eager")),
        ("reuse / full", *spread(steps["reuse_over_full"], "{:.4f}"), ""),
        ("FLOPs, full and reuse", f"{flops['full'] / 1e9:.1f} G", f"{flops['reuse'] / 1e9:.2f} G", ""),
        ("FLOP ratio", f"{flops['ratio']:.4f}", "", ""),
        ("reuse / full / FLOP ratio", share("reuse_over_flop_ratio"), "", goal("reuse_over_flop_ratio")),
        (f"{setting['steps']} steps plain, s", *spread(loops["plain_seconds"], "{:.2f}"), ""),
        (f"interval {setting['interval']}: lightcache_fx, s", *spread(loops["lightcache_fx_seconds"], "{:.2f}"), ""),
        (f"interval {setting['interval']}: DeepCache, s", *spread(loops["deepcache_seconds"], "{:.2f}"), ""),
        ("speed-up, lightcache_fx", *spread(loops["speedup"]), ""),
        ("speed-up, DeepCache", *spread(loops["deepcache_speedup"]), ""),
        ("speed-up, FLOP bound", f"{loops['flop_bound_speedup']:.3f}", "", ""),
        ("share of the FLOP bound", share("share_of_flop_bound"), "", goal("share_of_flop_bound")),
        (
            "DeepCache / lightcache_fx",
            *spread(loops["deepcache_over_lightcache_fx"]),
            goal("deepcache_over_lightcache_fx"),
        ),
        ("capture, once, s", f"{result['capture_seconds']:.1f}", "", ""),
        ("kept: lightcache_fx", format_bytes(kept["lightcache_fx_bytes"]), "", ""),
        ("hoisted: lightcache_fx", format_bytes(kept["hoisted_bytes"]), "", ""),
        ("kept: DeepCache", format_bytes(kept["deepcache_bytes"]), f"{kept['deepcache_tensors']} tensors", ""),
    ]
    print_rows("Denoising", ("figure", "median", "range", "goal"), rows, console)
    reuse_microseconds = 1e6 * steps["reuse_seconds"]["median"]
    print_rows(
        "What a call costs beside its program",
        ("part", "µs, median", "range", "of a reuse step"),
        [
            (name, *spread(facts, "{:.0f}"), f"{facts['median'] / reuse_microseconds:.2%}")
            for name, facts in result["overhead_microseconds"].items()
        ],
        console,
    )
    console.print(f"full step bitwise as eager: {'yes' if steps['bitwise_as_eager'] else 'NO'};", end=" ")
    difference = loops["difference_from_deepcache"]
    console.print(
        f"final latent against DeepCache's: {'bitwise equal' if difference == 0 else f'{difference:.3g} off'}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size, two repeats; nothing to report")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="denoising steps of a loop")
    parser.add_argument("--interval", type=int, default=Setting.interval, help="one step in so many is full")
    parser.add_argument("--rounds", type=int, default=Setting.rounds, help="how often each kind of loop is timed")
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/denoise.json unless --quick")
    options = parser.parse_args(arguments)
    if options.interval < 2 or options.steps < 2 or options.threads < 1 or options.rounds < 1:
        parser.error("--interval and --steps are at least 2, --threads and --rounds at least 1")
    torch.set_num_threads(options.threads)
    setting = replace(Setting(), steps=options.steps, interval=options.interval, rounds=options.rounds)
    setting = setting.quick() if options.quick else setting
    console = Console()
    result = run(setting, console)
    print_result(result, console)
    out = options.out or (None if options.quick else RESULTS / "denoise.json")
    if out is not None:
        write_json(out, result)
        console.print(f"written: {out.name}")
    if not math.isfinite(result["loops"]["difference_from_deepcache"]):
        raise SystemExit("the final latents are not finite: the figures stand, the comparison does not")


if __name__ == "__main__":
    main()
