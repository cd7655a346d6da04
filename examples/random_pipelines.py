"""The five systems' pipelines with random weights: of the published sizes, or small ones for a CPU. Nothing is read.

    pipe = modelscope(SMALL)

Published sizes are those of `lightcache_fx.cli.presets`. Tokenizers know single bytes and have no merges, so a prompt
has more tokens than the published ones make of it; all are padded to the same length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from benchmarks.common import randomize
from lightcache_fx.cli import presets

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
"""Of EasyAnimate's tokenizer here: the prompt as it is."""


@dataclass(frozen=True)
class Scale:
    """How large the models are, and where they are made.

    Attributes:
        widths: channels of the U-Net's levels; None for the published models.
        layers: residual blocks of each level.
        vae_width: channels of the outermost level of autoencoders, which halve height and width three times.
        blocks: of a transformer; of a published one, where it is cut short, so many (None for all).
        device, dtype: of the weights.
    """

    widths: tuple[int, ...] | None = None
    layers: int = 2
    vae_width: int = 32
    blocks: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def make(self, cls: Any, config: Any) -> Any:
        """A model of random weights, in evaluation mode: `config` is a mapping, or a configuration of transformers."""
        with torch.device(self.device):
            model: nn.Module = cls(**config) if isinstance(config, Mapping) else cls(config)
        randomize(model)
        nn.Module.to(model, dtype=getattr(torch, self.dtype))
        return model.eval().requires_grad_(False)

    def of(self, published: Mapping[str, Any], small: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration of this scale."""
        return published if self.widths is None else small


PUBLISHED = Scale()
SMALL = Scale(widths=(32, 64), layers=1, vae_width=16, blocks=4)
"""Seconds on a CPU, for trying a script."""


def byte_vocabulary(*specials: str, end_of_word: bool) -> dict[str, int]:
    """Tokens of single bytes, of those that end a word as well where a tokenizer marks it, and special ones."""
    letters = sorted(ByteLevel.alphabet())
    endings = [f"{letter}</w>" for letter in letters] if end_of_word else []
    return {token: index for index, token in enumerate([*letters, *endings, *specials])}


# A configuration reads best as a paragraph.
# fmt: off


def clip_text(scale: Scale, published: Mapping[str, Any], width: int, length: int = 77) -> dict[str, Any]:
    """A byte-level CLIP tokenizer and a text encoder: the published one, or one of two layers and `width` features."""
    vocabulary = byte_vocabulary("<|startoftext|>", "<|endoftext|>", end_of_word=True)
    end = vocabulary["<|endoftext|>"]
    config = scale.of(published, {
        "vocab_size": len(vocabulary), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": length,
    })
    config = transformers.CLIPTextConfig(**config, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    return {
        "tokenizer": transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length),
        "text_encoder": scale.make(transformers.CLIPTextModel, config),
    }


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """A byte-level tokenizer for EasyAnimate."""
    vocabulary = byte_vocabulary("<|endoftext|>", end_of_word=False)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=256)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_text(width: int) -> transformers.Qwen2VLConfig:
    """The configuration of a text encoder of two layers for it; its pictures' part is there and is not used."""
    end = len(byte_vocabulary(end_of_word=False))
    text = {
        "vocab_size": end + 8, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": _thirds(width // 4)},
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def _thirds(count: int) -> list[int]:
    return [count // 3, count // 3, count - 2 * (count // 3)]


def _levels(scale: Scale, kind: str) -> dict[str, Any]:
    """The blocks of a small U-Net: attention at every level but the innermost, as the published ones have it."""
    assert scale.widths is not None
    down = [f"CrossAttnDownBlock{kind}"] * (len(scale.widths) - 1) + [f"DownBlock{kind}"]
    up = [f"UpBlock{kind}"] + [f"CrossAttnUpBlock{kind}"] * (len(scale.widths) - 1)
    return {
        "block_out_channels": scale.widths, "down_block_types": tuple(down), "up_block_types": tuple(up),
        "layers_per_block": scale.layers,
    }


def _vae_widths(scale: Scale) -> tuple[int, ...]:
    width = scale.vae_width
    return (width, width, 2 * width, 2 * width)


def _image_vae(scale: Scale) -> nn.Module:
    small = {**presets.IMAGE_VAE, "block_out_channels": _vae_widths(scale), "layers_per_block": 1, "norm_num_groups": 8,
             "sample_size": 96}
    vae: nn.Module = scale.make(diffusers.AutoencoderKL, scale.of(presets.IMAGE_VAE, small))
    return vae


CONTEXT = 32
"""Features of a prompt's token in small models."""


def stable_video_diffusion(scale: Scale) -> Any:
    """SVD img2vid-XT, but for `force_upcast`: the autoencoder keeps its dtype, which would change twice a run."""
    assert scale.widths is None or scale.vae_width % 32 == 0 or scale.vae_width == 16
    unet = {} if scale.widths is None else {
        **_levels(scale, "SpatioTemporal"), "sample_size": 16, "cross_attention_dim": CONTEXT,
        "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96,
        "num_attention_heads": tuple(width // 16 for width in scale.widths), "num_frames": 8,
    }
    vision = transformers.CLIPVisionConfig(**scale.of(presets.CLIP_VISION_H, {
        "hidden_size": CONTEXT, "intermediate_size": 64, "projection_dim": CONTEXT, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 224, "patch_size": 32,
    }))
    # The decoder's group norms have 32 groups whatever the configuration says.
    widths = (32, 32, 32, 32) if scale.vae_width < 32 else _vae_widths(scale)
    small = {**presets.VIDEO_VAE, "block_out_channels": widths, "layers_per_block": 1}
    vae = {**scale.of(presets.VIDEO_VAE, small), "force_upcast": False}
    return diffusers.StableVideoDiffusionPipeline(
        vae=scale.make(diffusers.AutoencoderKLTemporalDecoder, vae),
        image_encoder=scale.make(transformers.CLIPVisionModelWithProjection, vision),
        unet=scale.make(diffusers.UNetSpatioTemporalConditionModel, scale.of(presets.SVD_XT_UNET, unet)),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous", sigma_max=700.0,
            sigma_min=0.002, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        ),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=224, size=224),
    )


def stable_diffusion(scale: Scale) -> Any:
    """A small picture model shaped like Stable Diffusion 1.5: DDIM, scaled linear betas. There is no published size."""
    assert scale.widths is not None
    unet = {
        **_levels(scale, "2D"), "sample_size": 16, "cross_attention_dim": CONTEXT, "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return diffusers.StableDiffusionPipeline(
        **clip_text(scale, presets.CLIP_TEXT_L, CONTEXT), vae=_image_vae(scale),
        unet=scale.make(diffusers.UNet2DConditionModel, unet),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def _motion_pipeline(scale: Scale, scheduler: Any) -> Any:
    unet = {} if scale.widths is None else {
        **_levels(scale, "Motion"), "sample_size": 16, "cross_attention_dim": CONTEXT, "num_attention_heads": 4,
        "motion_num_attention_heads": 4, "motion_max_seq_length": 32, "use_motion_mid_block": True,
        "norm_num_groups": 8,
    }
    return diffusers.AnimateDiffPipeline(
        **clip_text(scale, presets.CLIP_TEXT_L, CONTEXT), vae=_image_vae(scale), motion_adapter=None,
        unet=scale.make(diffusers.UNetMotionModel, scale.of(presets.MOTION_UNET, unet)), scheduler=scheduler,
    )


def animatediff_lightning(scale: Scale) -> Any:
    """Stable Diffusion 1.5 with AnimateDiff-Lightning's motion modules: Euler, trailing, linear betas."""
    return _motion_pipeline(scale, diffusers.EulerDiscreteScheduler(
        timestep_spacing="trailing", beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    ))


def animatediff(scale: Scale) -> Any:
    """Stable Diffusion 1.5 with the motion adapter v1.5: DDIM, linear betas."""
    return _motion_pipeline(scale, diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    ))


def modelscope(scale: Scale) -> Any:
    """ModelScope text-to-video: DDIM."""
    unet = {} if scale.widths is None else {
        **_levels(scale, "3D"), "sample_size": 16, "cross_attention_dim": CONTEXT, "attention_head_dim": 16,
        "norm_num_groups": 8,
    }
    return diffusers.TextToVideoSDPipeline(
        **clip_text(scale, presets.CLIP_TEXT_H, CONTEXT), vae=_image_vae(scale),
        unet=scale.make(diffusers.UNet3DConditionModel, scale.of(presets.MODELSCOPE_UNET, unet)),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
    )


def easyanimate(scale: Scale) -> Any:
    """EasyAnimate V5.1. The published size has no text encoder: nothing here says how large that is.

    Its prompts are given as embeddings; `arguments_without_text` makes some.
    """
    heads = 1 if scale.widths is None else scale.widths[-1] // 16
    transformer = scale.of(presets.EASYANIMATE_TRANSFORMER, {
        **presets.EASYANIMATE_TRANSFORMER, "num_attention_heads": heads, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "sample_width": 16, "sample_height": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    })
    if scale.blocks is not None:
        transformer = {**transformer, "num_layers": scale.blocks, "mmdit_layers": scale.blocks}
    width = scale.vae_width
    vae = scale.of({}, {
        "latent_channels": 4, "block_out_channels": [width] * 4, "norm_num_groups": 8, "layers_per_block": 1,
        "spatial_group_norm": False,
    })
    text = None if scale.widths is None else scale.make(transformers.Qwen2VLForConditionalGeneration, qwen_text(24))
    return diffusers.EasyAnimatePipeline(
        vae=scale.make(diffusers.AutoencoderKLMagvit, vae), text_encoder=text, tokenizer=qwen_tokenizer(),
        transformer=scale.make(diffusers.EasyAnimateTransformer3DModel, transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


# fmt: on


def arguments_without_text(pipe: Any, seed: int = 0) -> dict[str, Any]:
    """Random embeddings of a prompt and of the empty one, for a pipeline of EasyAnimate that has no text encoder."""
    draw = torch.Generator().manual_seed(seed)
    where = {"device": pipe.transformer.device, "dtype": pipe.transformer.dtype}
    shape = (1, 256, pipe.transformer.config.text_embed_dim)  # B L C
    mask = torch.ones(shape[:2], dtype=torch.int64, device=where["device"])
    return {
        "prompt_embeds": torch.randn(shape, generator=draw).to(**where),
        "negative_prompt_embeds": torch.randn(shape, generator=draw).to(**where),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
    }
