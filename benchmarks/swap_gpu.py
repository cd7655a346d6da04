"""Whole pipelines within memory budgets on a GPU: time and peak, beside all resident and diffusers' own offloading.

    python -m benchmarks.swap_gpu                          # CUDA, SVD-XT and AnimateDiff at full size, float16
    python -m benchmarks.swap_gpu --only svd-xt --way resident --way swapped --budget 6GiB --rounds 1
    python -m benchmarks.swap_gpu --device cpu --small     # the script itself, on small models; nothing to report

Pipelines are built from the published models' configurations with random weights; nothing is downloaded. Each way has
a pipeline of its own, which generates once before anything is measured (that captures and plans), and then takes turns
with its baseline: `resident` (cached, everything on the device) for what caches, `plain` (diffusers as it is,
everything on the device) for what does not. Peaks are `torch.cuda.max_memory_allocated` during a generation, weights
included; on a CPU, where the "device" is the process's own memory, what a generation allocates and the weights that are
not in a file.

A way that fails is reported with its message, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.hooks import apply_group_offloading
from PIL import Image
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks import plans
from benchmarks.common import (
    CPU,
    RESULTS,
    Goal,
    Spread,
    device_peak,
    environment,
    in_turns,
    markdown_table,
    pairwise_ratio,
    print_rows,
    randomize,
    seconds_of,
    usable_device,
    write_json,
)
from examples.random_pipelines import byte_vocabulary
from lightcache_fx.cli.stages import modules_of
from lightcache_fx.measure import measure_peak
from lightcache_fx.module import TransformedModule
from lightcache_fx.pipeline_plan import PlannedStage
from lightcache_fx.runtime import Runtime
from lightcache_fx.units import format_bytes

OVERHEAD = 0.05
PREDICTED = 0.03
"""The overhead is judged where the plan predicts at most so much."""
LONGEST = 400
"""Characters of a message in the results."""


@dataclass(frozen=True)
class Place:
    """Where and how large: `small` models are for trying the script."""

    device: str = "cuda"
    dtype: str = "float16"
    small: bool = False

    @property
    def kind(self) -> torch.device:
        """The device as torch's object."""
        return torch.device(self.device)

    def put(self, *modules: nn.Module) -> list[Any]:
        """Modules with random weights, in the dtype, to be run."""
        for index, module in enumerate(modules):
            randomize(module, seed=index)
            nn.Module.to(module, self.kind, getattr(torch, self.dtype))
            module.eval().requires_grad_(False)
        return list(modules)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline and one generation.

    Attributes:
        title: name and size, for tables.
        build: makes it, every time the same.
        arguments: of a generation, but for the random generator.
        interval: one step in so many is full; branch 0 is kept.
        budgets: in which it is swapped unless told otherwise.
    """

    title: str
    build: Callable[[Place], Any]
    arguments: Mapping[str, Any]
    interval: int
    budgets: tuple[str, ...]

    def policy(self, budget: str | None) -> lc.Policy:
        """Caching, within a budget if there is one."""
        return lc.Policy(cache=lc.Cache(cut=0, interval=self.interval), memory_budget=budget)

    def generate(self, pipe: Any) -> torch.Tensor:
        """The frames of one video, (1, frames, channels, height, width), on the device."""
        generator = torch.Generator().manual_seed(0)  # on the CPU: every way gets the same noise
        frames: torch.Tensor = pipe(**self.arguments, generator=generator, output_type="pt").frames
        return frames


# fmt: off


def _svd_unet(small: bool) -> nn.Module:
    if not small:
        return plans.svd_xt()[0]
    return diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 64), num_attention_heads=(2, 4), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
    )


def svd(place: Place) -> Any:
    """SVD img2vid-XT, but for `force_upcast`: the autoencoder keeps its dtype, which would change twice a run."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32, num_attention_heads=16,
        image_size=224, patch_size=14, hidden_act="gelu",
    ) if not place.small else transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=224, patch_size=32,
    )
    widths = (32, 32) if place.small else (128, 256, 512, 512)
    with place.kind:
        unet, vae, encoder = place.put(
            _svd_unet(place.small),
            diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths),
                layers_per_block=1 if place.small else 2, latent_channels=4, sample_size=768, force_upcast=False,
            ),
            transformers.CLIPVisionModelWithProjection(vision),
        )
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous", sigma_max=700.0,
        sigma_min=0.002, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    )
    processor = transformers.CLIPImageProcessor(crop_size=224, size=224)
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=encoder, unet=unet, scheduler=scheduler, feature_extractor=processor
    )


def _motion_unet(small: bool) -> nn.Module:
    if not small:
        return plans.animatediff()[0]
    return diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=32, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
    )


def animatediff(place: Place) -> Any:
    """Stable Diffusion 1.5 with the motion adapter v1.5, as Lightning runs it; the tokenizer has no merges."""
    vocabulary = byte_vocabulary("<|startoftext|>", "<|endoftext|>", end_of_word=True)
    end = vocabulary["<|endoftext|>"]
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768, **special,
    ) if not place.small else transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, **special,
    )
    widths = (16, 16) if place.small else (128, 256, 512, 512)
    with place.kind:
        unet, vae, encoder = place.put(
            _motion_unet(place.small),
            diffusers.AutoencoderKL(
                block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths), layers_per_block=1 if place.small else 2,
                latent_channels=4, norm_num_groups=4 if place.small else 32, sample_size=512,
            ),
            transformers.CLIPTextModel(text),
        )
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_spacing="trailing", beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    return diffusers.AnimateDiffPipeline(
        vae=vae, text_encoder=encoder, tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[],
        model_max_length=77), unet=unet, motion_adapter=None, scheduler=scheduler,
    )


def _image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


PROMPT = {"prompt": "A box rolls down a hill.", "guidance_scale": 1.0}
PIPELINES = {
    "svd-xt": Pipeline(
        "SVD-XT, 25 x 576 x 1024, 25 steps, interval 8", svd,
        {"image": _image(576, 1024), "height": 576, "width": 1024, "num_frames": 25, "num_inference_steps": 25,
         "decode_chunk_size": 8},
        8, ("8GiB", "6GiB", "4GiB"),
    ),
    "animatediff": Pipeline(
        "AnimateDiff, 25 x 512 x 512, 8 steps, interval 2", animatediff,
        {**PROMPT, "height": 512, "width": 512, "num_frames": 25, "num_inference_steps": 8, "decode_chunk_size": 8},
        2, ("3GiB", "2GiB"),
    ),
}
SMALL = {
    "svd-xt": Pipeline(
        "a small SVD, 3 x 32 x 32, 4 steps, interval 2", svd,
        {"image": _image(32, 32), "height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 4,
         "decode_chunk_size": 2},
        2, ("6MiB",),
    ),
    "animatediff": Pipeline(
        "a small AnimateDiff, 3 x 16 x 16, 4 steps, interval 2", animatediff,
        {**PROMPT, "height": 16, "width": 16, "num_frames": 3, "num_inference_steps": 4, "decode_chunk_size": 2},
        2, ("1MiB",),
    ),
}
# fmt: on


def offload_models(pipe: Any, device: torch.device) -> None:
    """Whole models are on the device in turns; diffusers moves them."""
    pipe.enable_model_cpu_offload(device=device)


def offload_groups(pipe: Any, device: torch.device) -> None:
    """Each layer goes to the device while the one before it runs; diffusers moves them."""
    for module in modules_of(pipe):
        apply_group_offloading(
            module, onload_device=device, offload_device=CPU, offload_type="leaf_level", use_stream=True
        )


def remove_hooks(pipe: Any) -> None:
    """Take off what the offloading put on."""
    pipe.remove_all_hooks()
    for module in modules_of(pipe):
        for part in module.modules():
            registry = getattr(part, "_diffusers_hook", None)
            for name in reversed(list(registry.hooks)) if registry is not None else ():
                registry.remove_hook(name, recurse=False)


@dataclass(frozen=True)
class Way:
    """How a pipeline is run.

    Attributes:
        kind: by which it is asked for.
        baseline: the way whose time and result it is held against; its own name for a baseline.
        budget: of its policy.
        hooks: put on the pipeline, transformed or not, before it runs.
    """

    kind: str
    baseline: str
    budget: str | None = None
    hooks: Callable[[Any, torch.device], None] | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.kind}, {self.budget}" if self.budget else self.kind

    @property
    def is_resident(self) -> bool:
        """Whether all weights are on the device while it runs."""
        return self.budget is None and self.hooks is None


KINDS = {
    "plain": Way("plain", "plain"),
    "resident": Way("resident", "resident"),
    "swapped": Way("swapped", "resident"),
    "model-offload": Way("model-offload", "plain", hooks=offload_models),
    "group-offload": Way("group-offload", "plain", hooks=offload_groups),
    "cached-model-offload": Way("cached-model-offload", "resident", hooks=offload_models),
    "cached-group-offload": Way("cached-group-offload", "resident", hooks=offload_groups),
}


def ways_of(pipeline: Pipeline, kinds: Sequence[str], budgets: Sequence[str]) -> list[Way]:
    """What is asked for, with the baselines that it takes, these first."""
    wanted = {KINDS[kind].baseline for kind in kinds}
    ways = [way for kind, way in KINDS.items() if kind in wanted]
    for kind, way in KINDS.items():
        if kind not in kinds or kind in wanted:
            continue
        if kind == "swapped":
            ways += [Way(kind, way.baseline, budget) for budget in budgets or pipeline.budgets]
        else:
            ways.append(way)
    return ways


class Run:
    """A pipeline of its own, run in one way, that has generated once.

    Attributes:
        seconds: of each measured generation.
        peak: the most bytes on the device in any of them.
        digests: of their results.
        captures: how often a model was captured in them, which their time then includes.
    """

    def __init__(self, pipeline: Pipeline, way: Way, place: Place) -> None:
        self.pipeline, self.way, self.place = pipeline, way, place
        self.seconds: list[float] = []
        self.peak = 0
        self.digests: set[str] = set()
        self.captures = 0
        self.shown = 0.0
        self.calls: dict[int, int] = {}
        pipe = pipeline.build(place)
        pipe.set_progress_bar_config(disable=True)
        self.is_cached = way.baseline == "resident"
        self.pipe = lc.transform_pipeline(pipe, pipeline.policy(way.budget)) if self.is_cached else pipe
        if way.hooks is not None:
            way.hooks(self.pipe, place.kind)
        self._generate()

    def _generate(self) -> torch.Tensor:
        where = self.pipe._execution_device  # noqa: SLF001 - where a pipeline makes its inputs
        if where.type != self.place.kind.type:
            raise RuntimeError(f"the pipeline would compute on {where}, because the weights that it asks are there")
        return self.pipeline.generate(self.pipe)

    def measure(self) -> float:
        """Seconds of one more generation, its result and its peak noted."""
        found: list[torch.Tensor] = []
        peaks: list[int] = []
        runtimes = [runtime for _, _, runtime in self.runtimes()]
        before, captured = [calls_of(runtime) for runtime in runtimes], captures_of(runtimes)
        with device_peak(self.place.kind, peaks):
            self.seconds.append(seconds_of(lambda: found.append(self._generate()), self.place.kind))
        self.captures += len(captures_of(runtimes) - captured)
        self.calls = {id(r): calls_of(r) - earlier for r, earlier in zip(runtimes, before, strict=True)}
        if not peaks and not self.peak:  # a CPU, where measuring takes time and nothing differs from round to round
            peaks.append(measure_peak(self._generate).peak_bytes + self._weights_here())
        self.peak = max(self.peak, *peaks) if peaks else self.peak
        frames = found.pop().cpu().contiguous()
        self.digests.add(hashlib.sha256(frames.view(torch.uint8).numpy().tobytes()).hexdigest())
        self.shown = float(((frames > 0) & (frames < 1)).float().mean())
        return self.seconds[-1]

    def park(self) -> None:
        """Make room on the device for another."""
        for module in modules_of(self.pipe):
            if isinstance(module, TransformedModule):
                lc.reset(module)
        if self.way.is_resident:
            self.pipe.to("cpu", silence_dtype_warnings=True)
        self._tidy()

    def unpark(self) -> None:
        """Take up the place on the device again."""
        if self.way.is_resident:
            self.pipe.to(self.place.kind)

    def end(self) -> None:
        """Take everything off the pipeline again."""
        remove_hooks(self.pipe)
        if self.is_cached:
            lc.restore(self.pipe)

    def plan(self) -> lc.PipelinePlan | None:
        """What was planned for the calls of a generation; None where nothing was.

        All signatures of a method but its first are of what is left over when frames are decoded in groups: one call.
        """
        stages = []
        for name, method, runtime in self.runtimes():
            made = runtime.repertoire.compiled.values()
            plans_made = [compiled.plan for compiled in made if compiled.plan.swap is not None]
            for index, plan in enumerate(plans_made):
                calls = 1 if index else self.calls.get(id(runtime), 1) - len(plans_made) + 1
                stages.append(PlannedStage(lc.Stage(f"{name}.{method}", runtime.module, calls=calls), plan))
        return lc.PipelinePlan(tuple(stages)) if stages else None

    def runtimes(self) -> Iterator[tuple[str, str, Runtime]]:
        """What runs the components' methods, with the names of both."""
        for name, module in self.pipe.components.items():
            if isinstance(module, TransformedModule):
                for method, runtime in module._lightcache.runtimes.items():
                    yield name, method, runtime

    def _weights_here(self) -> int:
        homes = [runtime.homes for _, _, runtime in self.runtimes()]
        weights = [weight for module in modules_of(self.pipe) for weight in module.parameters()]
        return sum(weight.nbytes for weight in weights if not any(home.is_home(weight) for home in homes))

    def _tidy(self) -> None:
        gc.collect()
        if self.place.kind.type == "cuda":
            torch.cuda.empty_cache()


def calls_of(runtime: Runtime) -> int:
    """How often its module was called."""
    return runtime.counts.total() - runtime.counts["prologue"]


def captures_of(runtimes: Sequence[Runtime]) -> set[int]:
    """The captures there are, by identity."""
    return {id(compiled.signature) for runtime in runtimes for compiled in runtime.repertoire.compiled.values()}


@dataclass
class Session:
    """All ways of one pipeline, each in turns with its baseline."""

    pipeline: Pipeline
    place: Place
    rounds: int
    console: Console
    baselines: dict[str, Run] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, ways: Sequence[Way]) -> dict[str, dict[str, Any]]:
        """What was measured of each way, or why it was not."""
        for way in ways:
            try:
                self._run(way)
            except Exception as error:  # noqa: BLE001 - whatever stops a way is reported, and the others go on
                self.results[way.name] = {"kind": way.kind, "baseline": way.baseline, "error": explained(error)}
            gc.collect()  # a failed run's tensors go with its traceback
            if self.place.kind.type == "cuda":
                torch.cuda.empty_cache()
            self.console.print(f"{way.name}: {self.results[way.name].get('error', 'measured')}", markup=False)
        for name, run in self.baselines.items():  # last, with the times of all turns
            self.results[name] |= {"seconds": Spread.of(run.seconds).as_dict()}
            run.end()
        return self.results

    def _run(self, way: Way) -> None:
        run = Run(self.pipeline, way, self.place)
        baseline = self.baselines.get(way.baseline)
        first = len(baseline.seconds) if baseline is not None else 0
        runs = {"baseline": baseline, "way": run} if baseline is not None else {"way": run}
        for _, name in in_turns(tuple(runs), self.rounds) if way.name != way.baseline else [(0, "way")]:
            turn = runs[name]
            assert turn is not None
            turn.unpark()
            turn.measure()
            turn.park()
        self.results[way.name] = result_of(run, baseline, first)
        if way.name == way.baseline:
            self.baselines[way.name] = run
        else:
            run.end()


def result_of(run: Run, baseline: Run | None, first: int) -> dict[str, Any]:
    """Figures of a way, held against its baseline's since a certain one of its own."""
    way = run.way
    result: dict[str, Any] = {
        "kind": way.kind,
        "baseline": way.baseline,
        "seconds": Spread.of(run.seconds).as_dict(),
        "peak_bytes": run.peak,
        "between_black_and_white": run.shown,
        "repeats": len(run.digests) == 1,
        "captures": run.captures,
    }
    overhead = None
    if baseline is not None:
        ratio = pairwise_ratio(run.seconds, baseline.seconds[first:])
        overhead = ratio.median - 1
        result |= {"over_baseline": ratio.as_dict(), "equal": run.digests == baseline.digests}
    plan = run.plan()
    if plan is not None:
        budget = run.pipeline.policy(way.budget).memory_budget
        predicted = {"slowdown": plan.slowdown, "peak_bytes": plan.peak_bytes}
        stages = {planned.stage.name: planned.seconds for planned in plan.stages}
        result |= {"budget": budget, "predicted": predicted, "predicted_seconds": stages}
        goals = goals_of(plan.slowdown, overhead, run.peak, budget)
        result["goals"] = {goal.name: goal.as_dict() for goal in goals}
        result["met"] = all(goal.met for goal in goals) and result.get("equal") is not False
    return result


def goals_of(predicted: float, overhead: float | None, peak: int, budget: int | None) -> list[Goal]:
    """What a swapped way should keep: its budget and, where the plan says that it is nearly free, its time."""
    goals = [] if budget is None else [Goal("peak", peak, "at most", budget)]
    if overhead is not None and predicted <= PREDICTED:
        goals.append(Goal("overhead", overhead, "at most", OVERHEAD))
    return goals


def explained(error: BaseException) -> str:
    """The kind and the first line of a message, folders left out."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return re.sub(r"(?<!\S)/\S*/", "", f"{type(error).__name__}: {line}"[:LONGEST])


COLUMNS = (
    "pipeline", "way", "seconds", "over its baseline", "peak", "budget", "predicted slower by", "predicted peak",
    "same bits", "",
)  # fmt: skip


def rows_of(pipelines: Mapping[str, Any]) -> list[list[str]]:
    """One row a way."""
    rows = []
    for pipeline in pipelines.values():
        for name, way in pipeline["ways"].items():
            if "error" in way:
                rows.append([pipeline["title"], name, "failed", *[""] * (len(COLUMNS) - 3)])
                continue
            ratio, predicted, seconds = way.get("over_baseline"), way.get("predicted"), way["seconds"]
            over = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})" if ratio else ""
            missed = [goal for goal, facts in way.get("goals", {}).items() if not facts["met"]]
            missed += ["bits"] if way.get("equal") is False and predicted else []
            verdict = ("not met: " + ", ".join(missed) if missed else "met") if predicted else ""
            verdict = f"captured {way['captures']} times meanwhile" if way["captures"] else verdict
            rows.append(
                [
                    pipeline["title"],
                    name,
                    f"{seconds['median']:.2f}",
                    f"{over} of {way['baseline']}" if over else "",
                    format_bytes(way["peak_bytes"]),
                    format_bytes(way["budget"]) if predicted else "",
                    f"{predicted['slowdown']:.2%}" if predicted else "",
                    format_bytes(predicted["peak_bytes"]) if predicted else "",
                    {True: "yes", False: "NO", None: ""}[way.get("equal")],
                    verdict,
                ]
            )
    return rows


def failures_of(pipelines: Mapping[str, Any]) -> list[str]:
    """Why ways failed, one line each."""
    return [
        f"{pipeline['title']}: {name}: {way['error']}"
        for pipeline in pipelines.values()
        for name, way in pipeline["ways"].items()
        if "error" in way
    ]


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All pipelines."""
    place: Place = options.place
    pipelines = SMALL if place.small else PIPELINES
    results = {}
    for name in options.only or pipelines:
        pipeline = pipelines[name]
        console.print(pipeline.title, markup=False)
        ways = ways_of(pipeline, options.way or list(KINDS), options.budget or ())
        found = Session(pipeline, place, options.rounds, console).run(ways)
        results[name] = {"title": pipeline.title, "ways": found}
    return {
        "environment": environment(place.kind),
        "place": {"device": place.kind.type, "dtype": place.dtype, "small": place.small},
        "rounds": options.rounds,
        "pipelines": results,
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with the `Place` that it asks for as `place`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=usable_device, default="cuda", help="cuda, cuda:N, or cpu with --small")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float16, on a CPU float32")
    parser.add_argument("--small", action="store_true", help="small models; nothing to report")
    parser.add_argument("--only", choices=list(PIPELINES), action="append")
    parser.add_argument(
        "--way", choices=list(KINDS), action="append", help="all by default; baselines come by themselves"
    )
    parser.add_argument("--budget", action="append", help="6GiB, say, of all pipelines; each has some of its own")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed")
    parser.add_argument(
        "--out", type=Path, help="JSON file, a .md beside it; benchmarks/results/swap_gpu.json at full size, else none"
    )
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    if on_cpu and not options.small:
        parser.error("argument --device: expected --small with cpu, where the full size takes days")
    if options.rounds < 1:
        parser.error("argument --rounds: expected at least 1")
    try:
        for budget in options.budget or ():
            lc.Policy(memory_budget=budget)
    except lc.errors.PolicyError as error:
        parser.error(f"argument --budget: {error}")
    options.place = Place(options.device, options.dtype or ("float32" if on_cpu else "float16"), options.small)
    if options.out is None and not options.small:
        options.out = RESULTS / "swap_gpu.json"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    options = read_options(arguments)
    console = Console(width=200)
    diffusers.utils.logging.set_verbosity_error()
    result = measure(options, console)
    rows = rows_of(result["pipelines"])
    failures = failures_of(result["pipelines"])
    print_rows("Swapping whole pipelines", COLUMNS, rows, console)
    for line in failures:
        console.print(line, markup=False)
    if options.out is not None:
        write_json(options.out, result)
        page = "\n".join(
            [*markdown_table(COLUMNS, rows), *(["", *(f"* {line}" for line in failures)] if failures else [])]
        )
        options.out.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        console.print(f"written: {options.out.name}")


if __name__ == "__main__":
    main()
