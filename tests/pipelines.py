"""Small random diffusers pipelines, built without a network, around the denoisers of `zoo.py`.

pipe = PIPELINES["svd"].build()
frames = PIPELINES["svd"].generate(pipe, seed=0, size=SMALL)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from examples.random_pipelines import byte_vocabulary, qwen_tokenizer
from zoo import ZOO

NUM_STEPS = 8
SMALL = (2, 2)  # height and width, in units of 16 pixels
WIDE = (2, 3)


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline: how to build and call it, and which part of its denoiser to keep between steps."""

    name: str
    component: str  # the denoiser's name in the pipeline
    create: Callable[[], Any]
    arguments: dict[str, Any]
    kept: str | tuple[str, str]  # the module that branch 0 keeps, or the blocks of a residual range

    def build(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = self.create()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, pipe: Any, seed: int, size: tuple[int, int], num_steps: int = NUM_STEPS) -> torch.Tensor:
        """The decoded images or frames of one run."""
        prompted = {} if "image" in self.arguments else {"prompt": f"box {seed}", "negative_prompt": "grey"}
        output = pipe(
            **self.arguments,
            **prompted,
            height=16 * size[0],
            width=16 * size[1],
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            return_dict=False,
        )[0]
        return torch.from_numpy(np.asarray(output))


def text_parts(width: int = 16, encoder: Any = CLIPTextModel) -> dict[str, Any]:
    """A byte-level CLIP tokenizer of 7 tokens a prompt and a text encoder, by default as the zoo's U-Nets expect."""
    vocabulary = byte_vocabulary("<|startoftext|>", "<|endoftext|>", end_of_word=True)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return {
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=7),
        "text_encoder": encoder(config).eval(),
    }


def image_vae() -> torch.nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def _denoiser(name: str) -> torch.nn.Module:
    return ZOO[name].build()[0]


def _stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        **text_parts(),
        vae=image_vae(),
        unet=_denoiser("sd"),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _animatediff() -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="linear", steps_offset=1)
    return diffusers.AnimateDiffPipeline(
        **text_parts(), vae=image_vae(), unet=_denoiser("animatediff"), motion_adapter=None, scheduler=scheduler
    )


def _text_to_video() -> Any:
    return diffusers.TextToVideoSDPipeline(
        **text_parts(),
        vae=image_vae(),
        unet=_denoiser("modelscope"),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    )


def _stable_video_diffusion() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,  # the pipeline resizes to it, whatever the encoder
        patch_size=112,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), sample_size=16
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=_denoiser("svd"),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            timestep_type="continuous",
            sigma_max=700.0,
            sigma_min=0.002,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )


def _easyanimate() -> Any:
    vocabulary = byte_vocabulary("<|endoftext|>", end_of_word=False)
    text = {
        "vocab_size": len(vocabulary) + 8,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
        "bos_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8, 8, 8],
        norm_num_groups=2,
        layers_per_block=1,
        spatial_group_norm=False,
    )
    return diffusers.EasyAnimatePipeline(
        vae=vae.eval(),
        text_encoder=Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=_denoiser("easyanimate"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _first_frame() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PIPELINES = {
    case.name: case
    for case in (
        PipelineCase("sd", "unet", _stable_diffusion, {}, "up_blocks.3.attentions.1"),
        PipelineCase("animatediff", "unet", _animatediff, {"num_frames": 3}, "up_blocks.2.motion_modules.1"),
        PipelineCase("modelscope", "unet", _text_to_video, {"num_frames": 3}, "up_blocks.2.temp_attentions.1"),
        PipelineCase(
            "svd",
            "unet",
            _stable_video_diffusion,
            {"image": _first_frame(), "num_frames": 3, "decode_chunk_size": 2},
            "up_blocks.2.attentions.1",
        ),
        PipelineCase(
            "easyanimate",
            "transformer",
            _easyanimate,
            {"num_frames": 9},
            ("transformer_blocks.1", "transformer_blocks.2"),
        ),
    )
}
