"""What the scripts of the published systems share: their options, their sizes, and one measured generation.

A script says how its pipeline is loaded and made; `command` gives it a command line:

    SYSTEM = System("modelscope", load=..., build=..., ...)
    main = command(SYSTEM)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffusers.utils import load_image
from PIL import Image

import lightcache_fx as lc
from examples.random_pipelines import PUBLISHED, SMALL, Scale, arguments_without_text
from lightcache_fx.cli.pictures import to_pixels, write_mp4
from lightcache_fx.cli.presets import PRESETS
from lightcache_fx.cli.stages import STAGES, Stopwatch, denoiser_of, place
from lightcache_fx.quality import Frames
from lightcache_fx.units import format_bytes


@dataclass(frozen=True)
class Video:
    """The size of what is generated: pixels, frames, denoising steps."""

    height: int
    width: int
    frames: int
    steps: int

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}, {self.steps} steps"


@dataclass(frozen=True)
class System:
    """A published system.

    Attributes:
        name: by which `Policy.lightcache` and the command line know it.
        model: id of its weights, or of what they are loaded with.
        load: makes the pipeline of a model id or folder and a dtype.
        build: makes it with random weights.
        small: what is generated on a CPU.
        source: the prompt where none is given; None where a first frame is asked for instead.
        arguments: of a generation, beside size, source and seed.
        fps: of the video.
    """

    name: str
    model: str
    load: Callable[[str, torch.dtype], Any]
    build: Callable[[Scale], Any]
    small: Video
    source: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fps: int = 8

    @property
    def title(self) -> str:
        """For people."""
        return PRESETS[self.name].title

    @property
    def published(self) -> Video:
        """What the system is published with."""
        sizes = PRESETS[self.name].defaults
        assert sizes.height is not None
        assert sizes.width is not None
        assert sizes.frames is not None
        return Video(sizes.height, sizes.width, sizes.frames, sizes.steps)

    def policy(self, pipe: Any, **choice: Any) -> lc.Policy:
        """`Policy.lightcache` of this system; a range of blocks ends before the last that this transformer has."""
        policy = lc.Policy.lightcache(self.name, **choice)
        if policy.cache is None or not isinstance(cut := policy.cache.cut, lc.Residual):
            return policy
        last = f"transformer_blocks.{len(denoiser_of(pipe).transformer_blocks) - 2}"
        cut = lc.Residual(first=cut.first, last=last)
        return policy.model_copy(update={"cache": policy.cache.model_copy(update={"cut": cut})})

    def generate(self, pipe: Any, video: Video, source: str | Image.Image | None = None, seed: int = 0) -> Frames:
        """The frames of one generation: RGB in 0..1, (frames, height, width, 3)."""
        size = (video.width, video.height)
        given: dict[str, Any] = {}
        if self.source is None:
            image = load_image(source) if source is not None else random_image(*size)
            given["image"] = image.resize(size)
        elif pipe.text_encoder is None:
            given |= arguments_without_text(pipe, seed)
        else:
            given["prompt"] = self.source if source is None else source
        takes = inspect.signature(type(pipe).__call__).parameters
        if "negative_prompt" in takes and "prompt" in given:
            given["negative_prompt"] = ""
        frames = pipe(
            **given,
            **self.arguments,
            height=video.height,
            width=video.width,
            num_frames=video.frames,
            num_inference_steps=video.steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        return np.asarray(frames, dtype=np.float32)


def random_image(width: int, height: int) -> Image.Image:
    """Noise, for a model with random weights."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Options:
    """A script's command line, read."""

    source: str | None
    model: str
    out: Path
    video: Video
    scale: Scale | None
    device: torch.device
    seed: int
    policy: Mapping[str, Any] | None


def run(system: System, options: Options) -> None:
    """Generate twice, write the video, and say what the second generation took.

    The first one captures, plans and, where there is CUDA, warms up.
    """
    dtype = torch.float16 if options.device.type == "cuda" else torch.float32
    if options.scale is None:
        pipe = system.load(options.model, dtype)
    else:
        pipe = system.build(replace(options.scale, dtype=str(dtype).removeprefix("torch.")))
    pipe.set_progress_bar_config(disable=True)
    policy = None if options.policy is None else system.policy(pipe, **options.policy)
    pipe, policy = place(pipe, policy, options.device)
    watch = Stopwatch(pipe, options.device)
    if policy is not None:
        pipe = lc.transform_pipeline(pipe, policy)
        watch.pipe = pipe

    def generate() -> Frames:
        return system.generate(pipe, options.video, options.source, options.seed)

    frames = watch.run(generate)
    first = sum(watch.seconds.values())
    peaks = watch.peaks(generate)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(to_pixels(frames), options.out, system.fps)
    weights = "the published weights" if options.scale is None else "random weights, so there is nothing to see"
    print(f"{system.title}: {options.video}, {weights}")
    if policy is not None:
        print(lc.inspect(denoiser_of(pipe)).plan)
    for stage in STAGES:
        print(f"{stage:8} {watch.seconds[stage]:8.2f} s {format_bytes(peaks[stage]):>12} at most")
    total, peak = sum(watch.seconds.values()), format_bytes(max(peaks.values()))
    print(f"{'total':8} {total:8.2f} s {peak:>12} at most, weights included; the first generation took {first:.1f} s")
    print(f"wrote {options.out}: {len(frames)} frames")


def command(system: System) -> Callable[..., None]:
    """The command line of a system's script."""
    published = system.published

    def main(
        source: Annotated[str | None, typer.Argument(help="Prompt; to continue a picture, its file or URL.")] = None,
        model: Annotated[str, typer.Option(help="Model id, or a pipeline folder.")] = system.model,
        out: Annotated[Path, typer.Option(help="MP4 to write.")] = Path(f"out/{system.name}.mp4"),
        random_weights: Annotated[bool, typer.Option("--random-weights", help="Load nothing.")] = False,
        small: Annotated[bool, typer.Option("--small", help="A small model with random weights, for a CPU.")] = False,
        plain: Annotated[bool, typer.Option("--plain", help="The pipeline as it is.")] = False,
        swap: Annotated[bool, typer.Option(help="Weights and features are there only when needed.")] = True,
        chunk: Annotated[bool, typer.Option(help="Steps run within a share of their activations.")] = True,
        slice: Annotated[bool, typer.Option(help="Decode in slices.")] = True,  # noqa: A002 - as the policy has it
        interval: Annotated[int | None, typer.Option(help="One step in so many is full.")] = None,
        branch: Annotated[int | None, typer.Option(help="DeepCache's branch: the skip connection to cut at.")] = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        steps: int | None = None,
        blocks: Annotated[int | None, typer.Option(help="Of a transformer with random weights, so many.")] = None,
        seed: int = 0,
        device: Annotated[
            str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")
        ] = None,
    ) -> None:
        """Generate one video."""
        base = system.small if small else published
        given = {"height": height, "width": width, "frames": num_frames, "steps": steps}
        video = replace(base, **{name: size for name, size in given.items() if size is not None})
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        scale = (SMALL if small else PUBLISHED) if small or random_weights else None
        if scale is not None:
            scale = replace(scale, blocks=blocks or scale.blocks)
        if system.source is None and source is None and scale is None:
            raise typer.BadParameter("expected a first frame, a file or a URL; or --random-weights, or --small")
        choice = {"swap": swap, "chunk": chunk, "slice": slice, "interval": interval, "branch": branch}
        diffusers.utils.logging.set_verbosity_error()
        try:
            run(system, Options(source, model, out, video, scale, where, seed, None if plain else choice))
        except (lc.errors.LightcacheError, OSError) as error:
            print(f"{system.name}: {error}")
            raise typer.Exit(2) from None

    main.__doc__ = f"{system.title}: one video, of {published} unless told otherwise."
    return main
