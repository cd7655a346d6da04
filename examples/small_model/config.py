"""Component configurations of the small Stable-Video-Diffusion-shaped pipeline.

32 x 32 pixels become 8 x 8 latents of 8 channels; 8 frames. The U-Net has the block types of the real one, three levels
instead of four, attention at the first level only, and the real one's two layers a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip import image_processing_pil_clip

from examples.small_model.sprites import IMAGE_SIZE, NUM_FRAMES

CLIP_IMAGE_SIZE = 224
"""Pixels; the pipeline resizes every image to this before the feature extractor."""


@dataclass(frozen=True)
class ModelConfig:
    """Widths of the components; the defaults are the shipped model, tests use narrower ones."""

    latent_channels: int = 8
    vae_channels: tuple[int, ...] = (64, 64, 64)
    unet_channels: tuple[int, ...] = (64, 64, 64)
    unet_heads: int = 2
    embedding_dim: int = 64
    clip_layers: int = 1
    clip_patch: int = 16


def make_vae(config: ModelConfig) -> AutoencoderKLTemporalDecoder:
    """Make the untrained autoencoder; it halves the image once per entry of `vae_channels` but the last."""
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        force_upcast=True,
    )
    _start_frame_by_frame(vae)
    return vae


@torch.no_grad()
def _start_frame_by_frame(vae: AutoencoderKLTemporalDecoder) -> None:
    """Let training start from a decoder that does not mix frames and from a narrow posterior."""
    for name, module in vae.decoder.named_modules():
        if name.endswith("temporal_res_block"):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    torch.nn.init.dirac_(vae.decoder.time_conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.time_conv_out.bias)
    vae.quant_conv.bias[vae.config.latent_channels :] = -4


def make_unet(config: ModelConfig) -> UNetSpatioTemporalConditionModel:
    """Make the untrained U-Net: attention at the first level, plain blocks below it, every residual branch at zero."""
    num_plain = len(config.unet_channels) - 1
    time_dim = 32
    unet = UNetSpatioTemporalConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(config.vae_channels) - 1),
        in_channels=2 * config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) + ("DownBlockSpatioTemporal",) * num_plain,
        up_block_types=("UpBlockSpatioTemporal",) * num_plain + ("CrossAttnUpBlockSpatioTemporal",),
        block_out_channels=config.unet_channels,
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=3 * time_dim,
        layers_per_block=2,
        cross_attention_dim=config.embedding_dim,
        num_attention_heads=config.unet_heads,
        num_frames=NUM_FRAMES,
    )
    for name, module in unet.named_modules():
        if name.endswith(("res_block.conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def make_image_encoder(config: ModelConfig) -> CLIPVisionModelWithProjection:
    """Make the untrained image encoder."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.embedding_dim,
            intermediate_size=2 * config.embedding_dim,
            projection_dim=config.embedding_dim,
            num_hidden_layers=config.clip_layers,
            num_attention_heads=2,
            image_size=CLIP_IMAGE_SIZE,
            patch_size=config.clip_patch,
        )
    )


def make_feature_extractor() -> image_processing_pil_clip.CLIPImageProcessorPil:
    """Make the image processor; it maps 0..1 to -1..1."""
    return image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_IMAGE_SIZE},
        crop_size=CLIP_IMAGE_SIZE,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """Make the scheduler: Stable Video Diffusion's, over a range of noise levels that suits 8 x 8 latents."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        interpolation_type="linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.01,
        sigma_max=60.0,
    )


class Denoiser(torch.nn.Module):
    """The U-Net and the image encoder that are trained together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.unet = make_unet(config)
        self.image_encoder = make_image_encoder(config)
