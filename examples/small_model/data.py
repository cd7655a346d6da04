"""Pools of rendered clips and of their latents, cached on disk so that training does not wait for them.

Pixels are uint8 in a pool and -1..1 in a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder
from rich.progress import track
from safetensors.torch import load_file, save_file

from examples.small_model import captions, dit
from examples.small_model.sprites import ClipSpec, render_clip, render_clips

HELDOUT_SEED_OFFSET = 1_000_000
"""Added to the training seed, so that no held-out clip is ever trained on."""

NOISE_AUG_RANGE = (0.005, 0.1)
"""Log-uniform range of the noise added to the first frame, in units of -1..1 pixels; the pipeline's default is 0.02."""


@dataclass(frozen=True)
class FramePool:
    """Rendered clips: `pixels` uint8 (clips, frames, 3, height, width), `motion_bucket_ids` (clips,)."""

    pixels: torch.Tensor
    motion_bucket_ids: torch.Tensor


@dataclass(frozen=True)
class LatentPool:
    """What the U-Net trains on.

    `latents` (clips, frames, channels, height, width), scaled to unit standard deviation; `image_latents` (clips,
    channels, height, width) of the noise-augmented first frame, not scaled, as the pipeline passes them; `noise_aug`
    (clips,); `first_frames` uint8 (clips, 3, height, width); `motion_bucket_ids` (clips,).
    """

    latents: torch.Tensor
    image_latents: torch.Tensor
    noise_aug: torch.Tensor
    first_frames: torch.Tensor
    motion_bucket_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class CaptionPool:
    """What the transformer trains on.

    `latents` (clips, channels, frames, height, width), scaled to unit standard deviation; `token_ids` (clips, tokens)
    of their captions; `empty_prompt` (tokens,) of the prompt that stands for none.
    """

    latents: torch.Tensor
    token_ids: torch.Tensor
    empty_prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in -1..1."""
    return pixels.float() / 127.5 - 1


def load_frame_pool(seed: int, num_clips: int, cache: Path | None = None, processes: int = 1) -> FramePool:
    """Render `num_clips` clips of the data set `seed`, or read them from `cache` if it holds them."""
    path = cache / f"frames-{seed}-{num_clips}.safetensors" if cache else None
    if path and path.exists():
        tensors = load_file(path)
        return FramePool(tensors["frames"], tensors["motion_bucket_ids"])
    chunk = 64
    jobs = [(seed, range(start, min(start + chunk, num_clips))) for start in range(0, num_clips, chunk)]
    if processes == 1:
        parts = [render_clips(*job) for job in jobs]
    else:
        with get_context("spawn").Pool(processes) as workers:
            parts = workers.starmap(render_clips, jobs)
    frames, buckets = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"frames": frames, "motion_bucket_ids": buckets}, path)
    return FramePool(frames, buckets)


@torch.no_grad()
def latent_scale(vae: AutoencoderKLTemporalDecoder, frames: FramePool, num_clips: int = 128) -> float:
    """Return the factor that brings the latents of the first `num_clips` clips to unit standard deviation."""
    pixels = to_model_range(frames.pixels[:num_clips]).flatten(0, 1)
    return 1 / float(vae.encode(pixels).latent_dist.mode().std())


@torch.no_grad()
def encode_pool(vae: AutoencoderKLTemporalDecoder, frames: FramePool, seed: int) -> LatentPool:
    """Encode every clip and its noise-augmented first frame; the noise is a function of `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    num_clips = len(frames.pixels)
    low, high = (float(np.log(bound)) for bound in NOISE_AUG_RANGE)
    noise_aug = torch.empty(num_clips).uniform_(low, high, generator=generator).exp()
    latents, image_latents = [], []
    for start in track(range(0, num_clips, 8), description="encoding"):
        pixels = to_model_range(frames.pixels[start : start + 8])
        first = pixels[:, 0]
        strength = noise_aug[start : start + 8, None, None, None]
        first = first + strength * torch.randn(first.shape, generator=generator)
        encoded = vae.encode(torch.cat([pixels.flatten(0, 1), first])).latent_dist.mode()
        clip_latents, first_latents = encoded.split([len(encoded) - len(first), len(first)])
        latents.append(clip_latents.unflatten(0, pixels.shape[:2]) * vae.config.scaling_factor)
        image_latents.append(first_latents)
    return LatentPool(
        latents=torch.cat(latents),
        image_latents=torch.cat(image_latents),
        noise_aug=noise_aug,
        first_frames=frames.pixels[:, 0],
        motion_bucket_ids=frames.motion_bucket_ids,
    )


def load_latent_pool(vae: AutoencoderKLTemporalDecoder, frames: FramePool, seed: int, path: Path) -> LatentPool:
    """Encode a pool, or read it from `path` if it is there."""
    if not path.exists():
        save_file({name: tensor.contiguous() for name, tensor in vars(encode_pool(vae, frames, seed)).items()}, path)
    return LatentPool(**load_file(path))


@torch.no_grad()
def encode_captioned(vae: AutoencoderKLTemporalDecoder, specs: list[ClipSpec]) -> CaptionPool:
    """Encode clips and their captions; nothing in it is random."""
    tokenizer = dit.make_tokenizer()
    latents = []
    for start in range(0, len(specs), 8):
        pixels = np.stack([render_clip(spec) for spec in specs[start : start + 8]])
        clips = to_model_range(torch.from_numpy(pixels))
        encoded = vae.encode(clips.flatten(0, 1)).latent_dist.mode().unflatten(0, clips.shape[:2])
        latents.append(encoded.transpose(1, 2).contiguous() * vae.config.scaling_factor)
    return CaptionPool(
        latents=torch.cat(latents),
        token_ids=dit.tokenize(tokenizer, [captions.caption(spec) for spec in specs]),
        empty_prompt=dit.empty_prompt(tokenizer),
    )


def load_caption_pool(
    vae: AutoencoderKLTemporalDecoder, seed: int, num_clips: int, cache: Path, part_clips: int = 512
) -> CaptionPool:
    """Encode the first clips of one sprite of the data set `seed`, or read from `cache` the parts that it holds."""
    cache.mkdir(parents=True, exist_ok=True)
    specs = captions.single_clips(seed, num_clips)
    parts = []
    for start in track(range(0, num_clips, part_clips), description="encoding"):
        part = specs[start : start + part_clips]
        path = cache / f"captioned-{seed}-{start}-{len(part)}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(dict(vars(encode_captioned(vae, part))), partial)
            partial.replace(path)
        parts.append(load_file(path))
    return CaptionPool(
        latents=torch.cat([part["latents"] for part in parts]),
        token_ids=torch.cat([part["token_ids"] for part in parts]),
        empty_prompt=parts[0]["empty_prompt"],
    )
