"""Stable Video Diffusion, accelerated: `python examples/stable_video_diffusion.py IMAGE --out video.mp4`.

The two lines that matter are `from_pretrained`, unchanged, and `transform_pipeline`. The defaults are those of the
published img2vid-XT runs with DeepCache: 25 frames of 576 x 1024, 25 steps of which every 8th is full, branch 0.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import export_to_video, load_image

import lightcache_fx as lc


def main(
    image: Annotated[str, typer.Argument(help="First frame: a file or a URL.")],
    model: Annotated[str, typer.Option(help="Model id, or a pipeline folder.")] = (
        "stabilityai/stable-video-diffusion-img2vid-xt"
    ),
    out: Annotated[Path, typer.Option(help="MP4 to write.")] = Path("out/stable_video_diffusion.mp4"),
    interval: Annotated[int, typer.Option(help="One step in so many is full; 1 changes nothing.")] = 8,
    branch: Annotated[int, typer.Option(help="DeepCache's branch: the skip connection to cut at.")] = 0,
    height: int = 576,
    width: int = 1024,
    num_frames: int = 25,
    steps: int = 25,
    seed: int = 0,
    fps: int = 7,
) -> None:
    """Continue one image as a video."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableVideoDiffusionPipeline.from_pretrained(model).to(device, dtype)
    fast = lc.transform_pipeline(pipe, lc.Policy.deepcache(interval=interval, branch=branch))
    began = time.perf_counter()
    frames = fast(
        load_image(image).resize((width, height)),
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        fps=fps,
        decode_chunk_size=8,
        generator=torch.Generator().manual_seed(seed),
    ).frames[0]
    seconds = time.perf_counter() - began
    out.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(frames, str(out), fps=fps)
    print(lc.inspect(fast.unet).plan)
    print(f"wrote {out}: {len(frames)} frames in {seconds:.1f} s, of which the first call's capture is a part")


if __name__ == "__main__":
    typer.run(main)
