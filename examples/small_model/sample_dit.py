"""Sample the shipped text-to-video model and measure it: `python -m examples.small_model.sample_dit --help`.

Captions of held-out clips go through the unmodified pipeline. The sheet shows a clip a caption, the figures say whether
the clips show what the words ask for, and what the same figures are of real clips and of the autoencoder alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import LattePipeline
from rich.progress import track

from examples.small_model.captions import caption, single_clips
from examples.small_model.data import HELDOUT_SEED_OFFSET, to_model_range
from examples.small_model.measures import Frames
from examples.small_model.reading import compare_with_words
from examples.small_model.sheets import captioned_sheet, plot_losses
from examples.small_model.sprites import IMAGE_SIZE, NUM_FRAMES, ClipSpec, render_clip

DIT_FOLDER = Path(__file__).parent / "latte-sprites"
DOCS = Path(__file__).parents[2] / "docs" / "small_model"

app = typer.Typer(add_completion=False, help=__doc__)


def load_pipeline(folder: Path = DIT_FOLDER) -> LattePipeline:
    """Load the exported pipeline in float32, its progress bar off.

    Raises:
        FileNotFoundError: it has not been trained and exported.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no pipeline in {folder.name}: train it with `python -m examples.small_model.train dit`, then"
            f" export it with `python -m examples.small_model.train export-dit`"
        )
    pipeline = LattePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def heldout_clips(num_clips: int, seed: int = 0) -> list[ClipSpec]:
    """Return held-out clips of one sprite of the training seed `seed`."""
    return single_clips(seed + HELDOUT_SEED_OFFSET, num_clips)


def to_frames(video: torch.Tensor) -> Frames:
    """Map a clip (frames, 3, height, width) in 0..1 to uint8."""
    frames: Frames = np.rint(video.numpy() * 255).astype(np.uint8)
    return frames


def generate(pipeline: LattePipeline, prompt: str, *, steps: int, guidance_scale: float, seed: int) -> Frames:
    """Return the generated clip as uint8 (frames, 3, height, width)."""
    video = pipeline(
        prompt,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        video_length=NUM_FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        clean_caption=False,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames[0]
    return to_frames(video)


@torch.no_grad()
def through_autoencoder(pipeline: LattePipeline, frames: Frames) -> Frames:
    """Return the clip encoded and decoded: the best that any denoiser could do."""
    latents = pipeline.vae.encode(to_model_range(torch.from_numpy(frames))).latent_dist.mode()
    decoded = pipeline.vae.decode(latents, num_frames=len(frames)).sample
    return to_frames((decoded / 2 + 0.5).clamp(0, 1))


def measure(
    pipeline: LattePipeline, num_clips: int, *, steps: int, guidance_scale: float
) -> dict[str, dict[str, float]]:
    """Return the mean figures over the captions of held-out clips.

    They are those of the generated clips, of the real ones, of those encoded and decoded, and of the generated ones
    against the captions of others, which is what chance scores.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    specs = heldout_clips(num_clips)
    generated = [
        generate(pipeline, caption(spec), steps=steps, guidance_scale=guidance_scale, seed=number)
        for number, spec in enumerate(track(specs, description="sampling"))
    ]
    for number, spec in enumerate(track(specs, description="measuring")):
        real = render_clip(spec)
        for name, frames in (
            ("generated", generated[number]),
            ("another caption's", generated[number - 1]),
            ("real", real),
            ("real, encoded and decoded", through_autoencoder(pipeline, real)),
        ):
            rows.setdefault(name, []).append(compare_with_words(frames, spec))
    return {
        name: {key: round(float(np.mean([figures[key] for figures in clips])), 3) for key in clips[0]}
        for name, clips in rows.items()
    }


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Pipeline folder.")] = DIT_FOLDER,
    target: Annotated[Path, typer.Option(help="Where the pictures and figures go.")] = DOCS,
    logs: Annotated[Path, typer.Option(help="Training folder, for the loss curve.")] = Path("runs/small_model"),
    steps: int = 25,
    guidance_scale: float = 2.0,
    rows: int = 8,
    measured_clips: int = 16,
    threads: int = 1,
) -> None:
    """Write `dit_samples.png`, `dit_losses.png` and `dit_figures.json`."""
    torch.set_num_threads(threads)
    try:
        pipeline = load_pipeline(model)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    target.mkdir(parents=True, exist_ok=True)
    clips = []
    for number, spec in enumerate(track(heldout_clips(rows), description="sampling")):
        prompt = caption(spec)
        frames = generate(pipeline, prompt, steps=steps, guidance_scale=guidance_scale, seed=number)
        clips.append((prompt, frames))
    captioned_sheet(clips).save(target / "dit_samples.png", optimize=True)
    log = logs / "dit" / "log.jsonl"
    if log.exists():
        plot_losses({"dit": log}, target / "dit_losses.png")
    if measured_clips:
        figures = measure(pipeline, measured_clips, steps=steps, guidance_scale=guidance_scale)
        (target / "dit_figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        typer.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    app()
