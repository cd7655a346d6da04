"""Small decoders and encoders of the families that denoisers work in the latents of.

    VAES["wan"].decoder()(torch.randn(VAES["wan"].latent))

Shapes in comments: B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn


class Decode(nn.Module):
    """`decode` as a module's call."""

    def __init__(self, vae: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.vae, self.options = vae, options

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent, return_dict=False, **self.options)[0]


class Encode(nn.Module):
    """The parameters of the distribution that `encode` returns, as a module's call."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(video, return_dict=False)[0].parameters


@dataclass(frozen=True)
class Vae:
    """One small model and the sizes of what it decodes and encodes."""

    model_class: type[nn.Module]
    latent: tuple[int, ...]
    video: tuple[int, ...]
    config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def decoder(self) -> nn.Module:
        return Decode(self.build(), self.options).eval()

    def encoder(self) -> nn.Module:
        return Encode(self.build()).eval()

    def build(self) -> nn.Module:
        """The autoencoder itself."""
        torch.manual_seed(0)
        return self.model_class(**self.config).eval().requires_grad_(False)


def _vae(model_class: type[nn.Module], latent: tuple[int, ...], video: tuple[int, ...], **config: Any) -> Vae:
    return Vae(model_class, latent, video, config)


_IMAGE = (1, 3, 16, 16)  # B C H W
_LATENT, _VIDEO = (1, 4, 3, 4, 4), (1, 3, 9, 32, 32)  # B C F H W
_FOUR = (8, 8, 8, 8)

VAES = {
    "kl": _vae(
        diffusers.AutoencoderKL, (1, 4, 4, 4), _IMAGE,
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    ),
    "svd": Vae(
        diffusers.AutoencoderKLTemporalDecoder, (3, 4, 4, 4), _IMAGE,  # B and F together
        {
            "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4,
            "sample_size": 16,
        },
        {"num_frames": 3},
    ),
    "wan": _vae(
        diffusers.AutoencoderKLWan, _LATENT, (1, 3, 5, 32, 32),
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        temperal_downsample=[False, True, True],
    ),
    "cogvideox": _vae(
        diffusers.AutoencoderKLCogVideoX, _LATENT, _VIDEO,
        block_out_channels=_FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_height=32,
        sample_width=32,
    ),
    "hunyuanvideo": _vae(
        diffusers.AutoencoderKLHunyuanVideo, _LATENT, _VIDEO,
        block_out_channels=_FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=4,
    ),
    "ltx": _vae(
        diffusers.AutoencoderKLLTXVideo, _LATENT, _VIDEO,
        block_out_channels=_FOUR, latent_channels=4, layers_per_block=(1,) * 5, decoder_block_out_channels=_FOUR,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False),
    ),
    "magvit": _vae(
        diffusers.AutoencoderKLMagvit, _LATENT, _VIDEO,
        block_out_channels=_FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=4,
    ),
    "mochi": _vae(
        diffusers.AutoencoderKLMochi, _LATENT, (1, 3, 13, 32, 32),
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=4,
        layers_per_block=(1,) * 5,
    ),
}  # fmt: skip
