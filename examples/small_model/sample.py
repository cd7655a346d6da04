"""Sample the shipped image-to-video model and measure it: `python -m examples.small_model.sample --help`.

Held-out first frames go through the unmodified pipeline. The sheet shows the real clip above the generated one, the
curve the held-out losses of training, and the figures say how far the sprites are from where they should be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from rich.progress import track

from examples.small_model.data import HELDOUT_SEED_OFFSET
from examples.small_model.measures import Frames, centres, mean_colour, psnr_db, sprite_mask
from examples.small_model.sheets import plot_losses, sheet
from examples.small_model.sprites import FPS, IMAGE_SIZE, NUM_FRAMES, ClipSpec, render_clip, sample_clip

MODEL_FOLDER = Path(__file__).parent / "svd-sprites"
DOCS = Path(__file__).parents[2] / "docs" / "small_model"

app = typer.Typer(add_completion=False, help=__doc__)


def load_pipeline(folder: Path = MODEL_FOLDER) -> StableVideoDiffusionPipeline:
    """Load the shipped pipeline in float32, its progress bar off."""
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def heldout_clip(index: int, seed: int = 0) -> ClipSpec:
    """Return held-out clip `index` of the training seed `seed`."""
    return sample_clip(seed + HELDOUT_SEED_OFFSET, index)


def first_frame(spec: ClipSpec) -> Image.Image:
    """Return the clip's first frame as the pipeline takes it."""
    return Image.fromarray(render_clip(spec, num_frames=1)[0].transpose(1, 2, 0))


def generate(
    pipeline: StableVideoDiffusionPipeline, spec: ClipSpec, *, steps: int, max_guidance_scale: float, seed: int
) -> Frames:
    """Return the generated clip as uint8 (frames, 3, height, width)."""
    frames = pipeline(
        first_frame(spec),
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_frames=NUM_FRAMES,
        fps=FPS,
        motion_bucket_id=spec.motion_bucket_id,
        num_inference_steps=steps,
        max_guidance_scale=max_guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return np.rint(frames.transpose(0, 3, 1, 2) * 255).astype(np.uint8)


def compare(frames: Frames, spec: ClipSpec) -> dict[str, float]:
    """Compare a clip of one sprite with the real one: last-frame position (pixels), colour (of 255), area, PSNR.

    A sprite that vanished counts as lost, and as half the picture away.
    """
    real = render_clip(spec)
    real_mask, mask = sprite_mask(real, spec), sprite_mask(frames, spec)
    offset = centres(mask)[-1] - centres(real_mask)[-1]
    lost = not mask[-1].any()
    return {
        "position_error_px": IMAGE_SIZE / 2 if lost else float(np.hypot(*offset)),
        "colour_error": 255.0
        if lost
        else float(np.abs(mean_colour(frames, mask) - mean_colour(real, real_mask)).mean()),
        "area_ratio": float(mask[-1].sum() / real_mask[-1].sum()),
        "lost": float(lost),
        "psnr_db": psnr_db(frames[1:], real[1:]),
    }


def measure(
    pipeline: StableVideoDiffusionPipeline, num_clips: int, *, steps: int, max_guidance_scale: float
) -> dict[str, dict[str, float]]:
    """Return the mean figures over held-out clips of one sprite: generated, and the first frame held still."""
    specs = [spec for index in range(4 * num_clips) if len((spec := heldout_clip(index)).sprites) == 1][:num_clips]
    generated, still = [], []
    for number, spec in enumerate(track(specs, description="measuring")):
        frames = generate(pipeline, spec, steps=steps, max_guidance_scale=max_guidance_scale, seed=number)
        generated.append(compare(frames, spec))
        still.append(compare(render_clip(spec, num_frames=1).repeat(NUM_FRAMES, axis=0), spec))
    return {
        name: {key: round(float(np.mean([figures[key] for figures in rows])), 3) for key in rows[0]}
        for name, rows in (("generated", generated), ("first frame held still", still))
    }


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Pipeline folder.")] = MODEL_FOLDER,
    target: Annotated[Path, typer.Option(help="Where the pictures and figures go.")] = DOCS,
    logs: Annotated[Path, typer.Option(help="Training folder, for the loss curves.")] = Path("runs/small_model"),
    steps: int = 25,
    max_guidance_scale: float = 1.5,
    rows: int = 6,
    measured_clips: int = 12,
    threads: int = 1,
) -> None:
    """Write `samples.png`, `losses.png` and `figures.json`."""
    torch.set_num_threads(threads)
    target.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model)
    pairs = []
    for index in track(range(rows), description="sampling"):
        spec = heldout_clip(index)
        frames = generate(pipeline, spec, steps=steps, max_guidance_scale=max_guidance_scale, seed=index)
        pairs.append((render_clip(spec), frames))
    sheet(pairs).save(target / "samples.png", optimize=True)
    plot_losses({name: logs / name / "log.jsonl" for name in ("vae", "unet")}, target / "losses.png")
    if measured_clips:
        figures = measure(pipeline, measured_clips, steps=steps, max_guidance_scale=max_guidance_scale)
        (target / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        typer.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    app()
