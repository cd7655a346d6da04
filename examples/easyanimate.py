"""EasyAnimate V5.1 (7 B), a transformer, accelerated: `python examples/easyanimate.py "a box rolls down a hill"`.

25 frames of 512 x 512, 50 steps, guidance 6; every 2nd step is full, and the others add to the new latent what all
blocks but the first and the last made of the old one. `--random-weights` has no text encoder, and makes a prompt's
embeddings up; `--blocks` cuts it short. For the other options see `stable_video_diffusion.py`.
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
from diffusers import EasyAnimatePipeline

from examples import random_pipelines
from examples.systems import System, Video, command


def load(model: str, dtype: torch.dtype) -> Any:
    """The pipeline as it is published."""
    return EasyAnimatePipeline.from_pretrained(model, dtype=dtype)


SYSTEM = System(
    "easyanimate",
    model="alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers",
    load=load,
    build=random_pipelines.easyanimate,
    small=Video(height=64, width=64, frames=9, steps=8),
    source="A box rolls down a hill.",
    arguments={"guidance_scale": 6.0},
)

main = command(SYSTEM)

if __name__ == "__main__":
    typer.run(main)
