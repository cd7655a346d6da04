"""AnimateDiff with the motion adapter v1.5, accelerated: `python examples/animatediff.py "a box rolls down a hill"`.

16 frames of 512 x 512, 25 steps of DDIM with guidance; every 2nd step is full. `--model` is the picture model whose
layers it moves. For the other options see `stable_video_diffusion.py`.
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
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from examples import random_pipelines
from examples.systems import System, Video, command

MOTION = "guoyww/animatediff-motion-adapter-v1-5-2"


def load(model: str, dtype: torch.dtype) -> Any:
    """A picture model with the motion adapter, and the scheduler that this was trained with."""
    adapter = MotionAdapter.from_pretrained(MOTION, dtype=dtype)
    pipe = AnimateDiffPipeline.from_pretrained(model, motion_adapter=adapter, dtype=dtype)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", timestep_spacing="linspace", clip_sample=False, steps_offset=1
    )
    return pipe


SYSTEM = System(
    "animatediff",
    model="SG161222/Realistic_Vision_V5.1_noVAE",
    load=load,
    build=random_pipelines.animatediff,
    small=Video(height=64, width=64, frames=4, steps=8),
    source="A box rolls down a hill.",
    arguments={"guidance_scale": 7.5, "decode_chunk_size": 16},
)

main = command(SYSTEM)

if __name__ == "__main__":
    typer.run(main)
