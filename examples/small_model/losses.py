"""What the models minimise.

Both denoisers, the U-Net and the transformer, are trained in exactly the parametrisation that `EulerDiscreteScheduler`
samples with when `prediction_type` is `v_prediction` and `timestep_type` is `continuous`: noisy = latents + sigma *
noise, the input is noisy / sqrt(sigma^2 + 1), the timestep is log(sigma) / 4 and the output is
v = (noise - sigma * latents) / sqrt(sigma^2 + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd

from examples.small_model.config import CLIP_IMAGE_SIZE, Denoiser
from examples.small_model.data import CaptionPool, LatentPool, to_model_range
from examples.small_model.dit import TextDenoiser
from examples.small_model.sprites import FPS

CONDITION_DROPOUT = 0.1
KL_WEIGHT = 5e-4
EDGE_WEIGHT = 0.5
SPRITE_WEIGHT = 6.0


@dataclass(frozen=True)
class NoiseLevels:
    """A log-normal distribution of sigma."""

    mean: float
    std: float

    def log_sigma_at(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return log(sigma) at `quantiles` (0..1)."""
        return self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)


UNET_LEVELS = NoiseLevels(mean=0.2, std=1.5)
DIT_LEVELS = NoiseLevels(mean=0.7, std=1.6)
"""Higher, for there is no first frame: the layout too has to come out of the noise."""


@dataclass(frozen=True)
class Noise:
    """The random part of one denoising batch: `log_sigma` (batch,), noise `values`, `dropped` (batch,) bool."""

    log_sigma: torch.Tensor
    values: torch.Tensor
    dropped: torch.Tensor

    def __getitem__(self, clips: torch.Tensor) -> Noise:
        """Return the noise of some clips of the batch."""
        return Noise(self.log_sigma[clips], self.values[clips], self.dropped[clips])


def draw_noise(shape: torch.Size, generator: torch.Generator, levels: NoiseLevels = UNET_LEVELS) -> Noise:
    """Draw noise levels, one from each equal share of their distribution, noise and dropped conditions.

    `shape` is that of the latents, the batch first.
    """
    batch = shape[0]
    quantiles = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return Noise(
        log_sigma=levels.log_sigma_at(quantiles.clamp(1e-4, 1 - 1e-4)),
        values=torch.randn(shape, generator=generator),
        dropped=torch.rand(batch, generator=generator) < CONDITION_DROPOUT,
    )


def even_noise(shape: torch.Size, levels: NoiseLevels) -> Noise:
    """Return fixed noise to measure with: levels at even quantiles of their distribution, nothing dropped."""
    quantiles = (torch.arange(shape[0]) + 0.5) / shape[0]
    return Noise(
        log_sigma=levels.log_sigma_at(quantiles),
        values=torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        dropped=torch.zeros(shape[0], dtype=torch.bool),
    )


def mix(latents: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a denoiser is given and the v that it should return, both shaped like `latents`."""
    sigma = noise.log_sigma.exp()[:, None, None, None, None]
    scale = (sigma**2 + 1).sqrt()
    return (latents + sigma * noise.values) / scale, (noise.values - sigma * latents) / scale


def embed_images(denoiser: Denoiser, first_frames: torch.Tensor) -> torch.Tensor:
    """Return (batch, 1, embedding) from uint8 images, resized and normalised as the pipeline does."""
    size = (CLIP_IMAGE_SIZE, CLIP_IMAGE_SIZE)
    resized = svd._resize_with_antialiasing(to_model_range(first_frames), size)  # noqa: SLF001 the pipeline's own resize
    embeddings: torch.Tensor = denoiser.image_encoder(resized).image_embeds
    return embeddings[:, None]


def denoising_losses(denoiser: Denoiser, pool: LatentPool, clips: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Return the mean squared error of v for each of `clips` (batch,), a float (batch,)."""
    latents = pool.latents[clips]
    noisy, target = mix(latents, noise)
    kept = (~noise.dropped).float()
    image_latents = (pool.image_latents[clips] * kept[:, None, None, None])[:, None].expand_as(latents)
    embeddings = embed_images(denoiser, pool.first_frames[clips]) * kept[:, None, None]
    time_ids = torch.stack(
        [torch.full_like(kept, FPS - 1), pool.motion_bucket_ids[clips].float(), pool.noise_aug[clips]], dim=1
    )
    predicted = denoiser.unet(
        torch.cat([noisy, image_latents], dim=2),
        noise.log_sigma / 4,
        encoder_hidden_states=embeddings,
        added_time_ids=time_ids,
    ).sample
    return (predicted - target).square().mean(dim=(1, 2, 3, 4))


def embed_prompts(denoiser: TextDenoiser, token_ids: torch.Tensor) -> torch.Tensor:
    """Return (batch, tokens, text_dim) from padded token ids (batch, tokens), as the pipeline does."""
    mask = (token_ids != denoiser.text_encoder.config.pad_token_id).long()
    embeddings: torch.Tensor = denoiser.text_encoder(token_ids, attention_mask=mask).last_hidden_state
    return embeddings


def text_denoising_losses(denoiser: TextDenoiser, pool: CaptionPool, clips: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Return the mean squared error of v for each of `clips` (batch,), a float (batch,)."""
    noisy, target = mix(pool.latents[clips], noise)
    token_ids = torch.where(noise.dropped[:, None], pool.empty_prompt, pool.token_ids[clips])
    predicted = denoiser.transformer(
        noisy, noise.log_sigma / 4, encoder_hidden_states=embed_prompts(denoiser, token_ids)
    ).sample[:, : target.shape[1]]
    return (predicted - target).square().mean(dim=(1, 2, 3, 4))


def sprite_weight(pixels: torch.Tensor) -> torch.Tensor:
    """Return 1 where a pixel is like the rest of its row, as the backdrop is, and more where it is not.

    `pixels` is (images, 3, height, width) in -1..1; the result (images, 1, height, width).
    """
    contrast = (pixels - pixels.median(dim=-1, keepdim=True).values).abs().amax(dim=1, keepdim=True)
    return 1 + SPRITE_WEIGHT * (contrast > 0.15).float()


def _edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(
    vae: AutoencoderKLTemporalDecoder, pixels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return the autoencoder's loss, a scalar, for `pixels` (clips, frames, 3, height, width) in -1..1.

    It is L1, heavier on the sprites, plus L1 of the differences between neighbours, plus a small KL term.
    """
    num_frames = pixels.shape[1]
    images = pixels.flatten(0, 1)
    posterior = vae.encode(images).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(latents, num_frames=num_frames).sample
    error = (sprite_weight(images) * (decoded - images).abs()).mean()
    edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(decoded), _edges(images), strict=True))
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error + EDGE_WEIGHT * edges + KL_WEIGHT * divergence
