"""ModelScope text-to-video (1.7 B), accelerated: `python examples/modelscope.py "a box rolls down a hill"`.

25 frames of 256 x 256, 25 steps with guidance; every 2nd step is full. For the other options see
`stable_video_diffusion.py`.
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
from diffusers import TextToVideoSDPipeline

from examples import random_pipelines
from examples.systems import System, Video, command


def load(model: str, dtype: torch.dtype) -> Any:
    """The pipeline as it is published."""
    return TextToVideoSDPipeline.from_pretrained(model, dtype=dtype)


SYSTEM = System(
    "modelscope",
    model="ali-vilab/text-to-video-ms-1.7b",
    load=load,
    build=random_pipelines.modelscope,
    small=Video(height=64, width=64, frames=4, steps=8),
    source="A box rolls down a hill.",
    arguments={"guidance_scale": 9.0},
)

main = command(SYSTEM)

if __name__ == "__main__":
    typer.run(main)
