"""AnimateDiff-Lightning, accelerated: `python examples/animatediff_lightning.py "a box rolls down a hill"`.

As published: the 8-step motion modules, Euler with trailing spacing and linear betas, no guidance, 25 frames of
512 x 512; every 2nd step is full. `--model` is the picture model whose layers it moves. For the other options see
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
from diffusers import AnimateDiffPipeline, EulerDiscreteScheduler, MotionAdapter
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from examples import random_pipelines
from examples.systems import System, Video, command

MOTION = ("ByteDance/AnimateDiff-Lightning", "animatediff_lightning_8step_diffusers.safetensors")


def load(model: str, dtype: torch.dtype) -> Any:
    """A picture model with the motion modules that were distilled to 8 steps."""
    adapter = MotionAdapter().to(dtype=dtype)
    adapter.load_state_dict(load_file(hf_hub_download(*MOTION)))
    pipe = AnimateDiffPipeline.from_pretrained(model, motion_adapter=adapter, dtype=dtype)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", beta_schedule="linear"
    )
    return pipe


SYSTEM = System(
    "animatediff-lightning",
    model="emilianJR/epiCRealism",
    load=load,
    build=random_pipelines.animatediff_lightning,
    small=Video(height=64, width=64, frames=4, steps=8),
    source="A box rolls down a hill.",
    arguments={"guidance_scale": 1.0, "decode_chunk_size": 16},
)

main = command(SYSTEM)

if __name__ == "__main__":
    typer.run(main)
