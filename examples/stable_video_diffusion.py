"""Stable Video Diffusion, accelerated: `python examples/stable_video_diffusion.py IMAGE --out video.mp4`.

The defaults are those of the published img2vid-XT runs: 25 frames of 576 x 1024, 25 steps of which every 8th is full,
branch 0. `--random-weights` loads nothing; `--small` runs on a CPU in seconds; `--plain`, `--no-swap`, `--no-chunk` and
`--no-slice` leave parts out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples` is a package of the repository
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns as it is imported, if torchvision is not there

import torch
import typer
from diffusers import StableVideoDiffusionPipeline

from examples import random_pipelines
from examples.systems import System, Video, command


def load(model: str, dtype: torch.dtype) -> Any:
    """The pipeline as it is published."""
    return StableVideoDiffusionPipeline.from_pretrained(model, dtype=dtype)


SYSTEM = System(
    "svd-xt",
    model="stabilityai/stable-video-diffusion-img2vid-xt",
    load=load,
    build=random_pipelines.stable_video_diffusion,
    small=Video(height=64, width=64, frames=4, steps=8),
    source=None,
    arguments={"decode_chunk_size": 8, "fps": 7},
    fps=7,
)

main = command(SYSTEM)

if __name__ == "__main__":
    typer.run(main)
