"""Published systems by name, as their configurations say: for the command line and the benchmarks only.

The compiler knows none of these names. Weights are never needed: what counts are the shapes.
"""

from __future__ import annotations

from lightcache_fx.cli.systems import Component, Defaults, System
from lightcache_fx.published import PUBLISHED

# A configuration reads best as a paragraph.
# fmt: off
_WIDTHS = (320, 640, 1280, 1280)
SVD_XT_UNET = {
    "sample_size": 96, "block_out_channels": _WIDTHS, "num_attention_heads": (5, 10, 20, 20), "layers_per_block": 2,
    "cross_attention_dim": 1024, "in_channels": 8, "projection_class_embeddings_input_dim": 768,
    "addition_time_embed_dim": 256, "num_frames": 25,
}
"""stable-video-diffusion-img2vid-xt."""
MOTION_UNET = {
    "sample_size": 64, "block_out_channels": _WIDTHS, "cross_attention_dim": 768, "num_attention_heads": 8,
    "motion_num_attention_heads": 8, "motion_max_seq_length": 32, "use_motion_mid_block": True,
}
"""Stable Diffusion 1.5 with the motion adapter v1.5.2, or Lightning's: the settings of both are diffusers' defaults."""
MODELSCOPE_UNET = {
    "sample_size": 32, "block_out_channels": _WIDTHS, "cross_attention_dim": 1024, "attention_head_dim": 64,
}
"""text-to-video-ms-1.7b."""
EASYANIMATE_TRANSFORMER = {
    "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "sample_width": 90, "sample_height": 60, "num_layers": 28, "mmdit_layers": 28, "text_embed_dim": 3584,
    "text_embed_dim_t5": None, "time_embed_dim": 512, "enable_text_attention_mask": True, "add_norm_text_encoder": True,
}
"""EasyAnimate V5.1 7B text-to-video; with the class's default of 48 blocks it would have 11.8 billion parameters."""
VIDEO_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
    "latent_channels": 4, "sample_size": 768,
}
IMAGE_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
}
CLIP_VISION_H = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
}
CLIP_TEXT_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
}
CLIP_TEXT_H = {
    "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "max_position_embeddings": 77, "projection_dim": 512, "hidden_act": "gelu",
}
# fmt: on

_IMAGE_VAE = Component("vae", "diffusers", "AutoencoderKL", IMAGE_VAE)
_ANIMATEDIFF = (
    Component("text_encoder", "transformers", "CLIPTextModel", CLIP_TEXT_L),
    Component("unet", "diffusers", "UNetMotionModel", MOTION_UNET),
    _IMAGE_VAE,
)

PRESETS = {
    "svd-xt": System(
        "Stable Video Diffusion img2vid-XT",
        (
            Component("image_encoder", "transformers", "CLIPVisionModelWithProjection", CLIP_VISION_H),
            Component("vae", "diffusers", "AutoencoderKLTemporalDecoder", VIDEO_VAE),
            Component("unet", "diffusers", "UNetSpatioTemporalConditionModel", SVD_XT_UNET),
        ),
        Defaults(height=576, width=1024, frames=25, steps=25, guidance=True, decode_frames=8),
        PUBLISHED["svd-xt"].cache,
    ),
    "animatediff-lightning": System(
        "AnimateDiff-Lightning",
        _ANIMATEDIFF,
        Defaults(height=512, width=512, frames=25, steps=8, guidance=False, decode_frames=16),
        PUBLISHED["animatediff-lightning"].cache,
    ),
    "animatediff": System(
        "AnimateDiff v1.5",
        _ANIMATEDIFF,
        Defaults(height=512, width=512, frames=16, steps=25, guidance=True, decode_frames=16),
        PUBLISHED["animatediff"].cache,
    ),
    "modelscope": System(
        "ModelScope text-to-video 1.7B",
        (
            Component("text_encoder", "transformers", "CLIPTextModel", CLIP_TEXT_H),
            Component("unet", "diffusers", "UNet3DConditionModel", MODELSCOPE_UNET),
            _IMAGE_VAE,
        ),
        Defaults(height=256, width=256, frames=25, steps=25, guidance=True),
        PUBLISHED["modelscope"].cache,
    ),
    "easyanimate": System(
        "EasyAnimate V5.1 7B",
        (
            Component("transformer", "diffusers", "EasyAnimateTransformer3DModel", EASYANIMATE_TRANSFORMER),
            Component("vae", "diffusers", "AutoencoderKLMagvit", {}),
        ),
        Defaults(height=512, width=512, frames=25, steps=50, guidance=True),
        PUBLISHED["easyanimate"].cache,
        left_out={"text_encoder": "the preset has no configuration of it"},
    ),
}
