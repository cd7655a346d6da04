"""Small random models beside the zoo's, of classes that nothing here was made for: diffusers' newer ones, and adapters.

`MORE` has them by name, `WIDE` what they are fed at another size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection, get_1d_rotary_pos_embed
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator
from torch import nn

from zoo import Draw, Entry, Inputs, levels

MORE: dict[str, Entry] = {}
WIDE: dict[str, Callable[[Draw], Inputs]] = {}
WIDER = {"wide": True}
TALLER = {"h": 12, "w": 8}


def register(
    name: str,
    create: Callable[..., nn.Module],
    stack: str = "",
    *,
    depth: int = 4,
    second: dict[str, Any] | None = None,
    **config: Any,
) -> Callable[[Callable[..., Inputs]], Callable[..., Inputs]]:
    """Register the model `create(**config)` with the decorated function, which draws its inputs.

    Args:
        name: in `MORE`.
        create: a class, or what makes one.
        stack: the model's blocks; empty where no range of them is kept in tests.
        depth: how many there are.
        second: arguments of the decorated function for another size.
        config: of the model.
    """

    def add(inputs: Callable[..., Inputs]) -> Callable[..., Inputs]:
        residual = (f"{stack}.1", f"{stack}.{depth - 2}") if stack else None
        MORE[name] = Entry(name, partial(create, **config), inputs, (), residual)
        if second:
            WIDE[name] = partial(inputs, **second)
        return inputs

    return add


def config_of(name: str) -> dict[str, Any]:
    """The configuration of a registered model."""
    made: Any = MORE[name].create
    return dict(made.keywords)


def mask_of(draw: Draw, length: int, batch: int = 1) -> torch.Tensor:
    """1 for the words, whose number depends on the prompt; 0 behind them."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, int(torch.randint(2, length, (1,), generator=draw._conditioning)) :] = 0
    return mask


# A model's settings read best as paragraphs.
# fmt: off
@register(
    "cogview3plus", diffusers.CogView3PlusTransformer2DModel, "transformer_blocks", second=WIDER,
    patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
    text_embed_dim=24, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=8,
)
def _cogview3plus(draw: Draw, wide: bool = False) -> Inputs:
    width = 12 if wide else 8
    size = draw.values(64, 64).repeat(2, 1)
    return {
        "hidden_states": draw.latent(2, 4, 8, width),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "timestep": draw.timestep(2),
        "original_size": size, "target_size": size.clone(), "crop_coords": draw.values(0, 0).repeat(2, 1),
        "return_dict": False,
    }


@register(
    "cogview4", diffusers.CogView4Transformer2DModel, "transformer_blocks", second=WIDER,
    patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
    text_embed_dim=24, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=8, rope_axes_dim=(16, 16),
)
def _cogview4(draw: Draw, wide: bool = False) -> Inputs:
    width = 12 if wide else 10  # 20 image tokens beside 16 words: streams of different shapes
    size = draw.values(64, 64).repeat(1, 1)
    return {
        "hidden_states": draw.latent(1, 4, 8, width),
        "encoder_hidden_states": draw.conditioning(1, 16, 24),
        "timestep": draw.timestep(1, torch.float32),
        "original_size": size, "target_size": size.clone(), "crop_coords": draw.values(0, 0).repeat(1, 1),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "lumina2", diffusers.Lumina2Transformer2DModel, "layers", second=WIDER,
    sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=1,
    num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16),
    cap_feat_dim=16,
)
def _lumina2(draw: Draw, wide: bool = False) -> Inputs:
    width = 12 if wide else 8
    return {
        "hidden_states": draw.latent(1, 4, 8, width),
        "timestep": 1 - draw.flow_time(1, torch.float32),
        "encoder_hidden_states": draw.conditioning(1, 7, 16),
        "encoder_attention_mask": mask_of(draw, 7),
        "return_dict": False,
        "attention_kwargs": {},
    }


def _omnigen_text(draw: Draw, tokens: int, words: tuple[int, int], length: int) -> Inputs:
    collator = OmniGenCollator(hidden_size=32)
    mask = torch.tensor([[0] * (length - n) + [1] * n for n in words])
    position_ids = collator.create_position(mask, [tokens] * 2)
    attention_mask, _ = collator.create_mask(mask, [tokens] * 2)
    return {"position_ids": position_ids, "attention_mask": attention_mask}


@register(
    "omnigen", diffusers.OmniGenTransformer2DModel, "layers", second=WIDER,
    in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
    num_layers=4, pad_token_id=0, vocab_size=50, max_position_embeddings=64, original_max_position_embeddings=32,
    pos_embed_max_size=16, time_step_dim=16,
    rope_scaling={"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.1 * i for i in range(8)]},
)
def _omnigen(draw: Draw, wide: bool = False, image: bool = False) -> Inputs:
    width = 12 if wide else 8
    return {
        "hidden_states": draw.latent(2, 4, 8, width),
        "timestep": draw.flow_time(2, torch.float32),
        "input_ids": torch.randint(1, 50, (2, 7), generator=draw._conditioning),
        "input_img_latents": [draw.conditioning(1, 4, 4, 4)] if image else [],
        "input_image_sizes": {0: [[1, 5]]} if image else {},
        **_omnigen_text(draw, 4 * width // 2, (7, 4), 7),
        "return_dict": False,
    }


@register(
    "omnigen_image", diffusers.OmniGenTransformer2DModel, "layers", second=WIDER, **config_of("omnigen"),
)
def _omnigen_image(draw: Draw, wide: bool = False) -> Inputs:
    return _omnigen(draw, wide, image=True)


@register(
    "hidream", diffusers.HiDreamImageTransformer2DModel, "double_stream_blocks", second=WIDER,
    patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_single_layers=2, attention_head_dim=8,
    num_attention_heads=4, caption_channels=[24, 16], text_emb_dim=16, num_routed_experts=4, num_activated_experts=2,
    axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1, 2, 3, 0, 1],
)
def _hidream(draw: Draw, wide: bool = False) -> Inputs:
    size = 12 if wide else 8
    return {
        "hidden_states": draw.latent(2, 4, size, size),
        "timesteps": draw.timestep(2, torch.float32),
        "encoder_hidden_states_t5": draw.conditioning(2, 5, 24),
        "encoder_hidden_states_llama3": draw.conditioning(4, 2, 5, 16),
        "pooled_embeds": draw.conditioning(2, 16),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "hidream_oneexpert", diffusers.HiDreamImageTransformer2DModel, "double_stream_blocks", second=WIDER,
    **{**config_of("hidream"), "num_routed_experts": 1, "num_activated_experts": 1},
)
def _hidream_oneexpert(draw: Draw, wide: bool = False) -> Inputs:
    return _hidream(draw, wide)


@register(
    "consisid", diffusers.ConsisIDTransformer3DModel, "transformer_blocks", second=WIDER,
    num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=4, time_embed_dim=8, text_embed_dim=24,
    num_layers=4, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
    max_text_seq_length=6, use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=2,
    cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=12, LFE_vit_dim=16, LFE_depth=4, LFE_dim_head=8,
    LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=32, LFE_ff_mult=2, LFE_num_scale=2,
)
def _consisid(draw: Draw, wide: bool = False) -> Inputs:
    width = 12 if wide else 8
    return {
        "hidden_states": draw.latent(2, 3, 8, 8, width),  # B F C H W, image latents beside the latents
        "encoder_hidden_states": draw.conditioning(2, 6, 24),
        "timestep": draw.timestep(2),
        "image_rotary_emb": draw.angles(3 * 4 * width // 2, 12),
        "attention_kwargs": None,
        "return_dict": False,
        "id_vit_hidden": [draw.conditioning(2, 5, 16) for _ in range(2)],
        "id_cond": draw.conditioning(2, 12),
    }


_WANLIKE: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24,
    "freq_dim": 16, "ffn_dim": 48, "num_layers": 4, "rope_max_seq_len": 16,
}


@register("skyreels", diffusers.SkyReelsV2Transformer3DModel, "blocks", second=WIDER, **_WANLIKE)
def _skyreels(draw: Draw, wide: bool = False) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, 12 if wide else 8),
        "timestep": draw.timestep(1),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "skyreels_df", diffusers.SkyReelsV2Transformer3DModel, "blocks", second=WIDER, **_WANLIKE, inject_sample_info=True,
    num_frame_per_block=1,
)
def _skyreels_df(draw: Draw, wide: bool = False) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, 12 if wide else 8),
        "timestep": draw.timestep() - torch.tensor([[0, 50, 100]]),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "enable_diffusion_forcing": True,
        "fps": [1],
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "wan_vace", diffusers.WanVACETransformer3DModel, "blocks", second=WIDER, **{**_WANLIKE, "num_layers": 5},
    depth=5, vace_layers=[0, 2], vace_in_channels=6,
)
def _wan_vace(draw: Draw, wide: bool = False) -> Inputs:
    width = 12 if wide else 8
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, width),
        "timestep": draw.timestep(1),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "control_hidden_states": draw.conditioning(1, 6, 3, 8, width),
        "control_hidden_states_scale": torch.tensor([1.0, 1.0]).to(draw.dtype),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "flux2", diffusers.Flux2Transformer2DModel, "transformer_blocks", second=WIDER,
    patch_size=1, in_channels=4, num_layers=4, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
)
def _flux2(draw: Draw, wide: bool = False) -> Inputs:
    width = 6 if wide else 4
    one = torch.arange(1)
    return {
        "hidden_states": draw.latent(1, 4 * width, 4),
        "timestep": draw.flow_time(1),
        "guidance": torch.full([1], 4.0).expand(1),
        "encoder_hidden_states": draw.conditioning(1, 6, 24),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(6))[None],
        "img_ids": torch.cartesian_prod(one, torch.arange(4), torch.arange(width), one)[None],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "bria", diffusers.BriaTransformer2DModel, "transformer_blocks", second=WIDER,
    patch_size=1, in_channels=4, num_layers=4, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, axes_dims_rope=[0, 8, 8],
)
def _bria(draw: Draw, wide: bool = False) -> Inputs:
    width = 6 if wide else 4
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(float(width)), indexing="ij")
    return {
        "hidden_states": draw.latent(2, 4 * width, 4),
        "timestep": draw.timestep(2, torch.float32),
        "encoder_hidden_states": draw.conditioning(2, 6, 24),
        "attention_kwargs": None,
        "return_dict": False,
        "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.stack([torch.zeros(4, width), rows, columns], dim=-1).reshape(-1, 3).to(draw.dtype),
    }


@register(
    "hunyuanimage", diffusers.HunyuanImageTransformer2DModel, "transformer_blocks", second=WIDER,
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_single_layers=2,
    num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=24, text_embed_2_dim=12, rope_axes_dim=(8, 8),
)
def _hunyuanimage(draw: Draw, wide: bool = False) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 4, 4, 6 if wide else 4),
        "timestep": draw.timestep(1, draw.dtype),
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": {},
        "return_dict": False,
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "encoder_attention_mask": mask_of(draw, 7),
        "encoder_hidden_states_2": draw.conditioning(1, 5, 12),
        "encoder_attention_mask_2": mask_of(draw, 5),
    }


@register(
    "framepack", diffusers.HunyuanVideoFramepackTransformer3DModel, "transformer_blocks", second=WIDER,
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_single_layers=2,
    num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=24, pooled_projection_dim=8,
    rope_axes_dim=(4, 4, 8), has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True,
)
def _framepack(draw: Draw, wide: bool = False) -> Inputs:
    width = 24 if wide else 16
    parts = torch.arange(1 + 2 + 3 + 1 + 2 + 4).split([1, 2, 3, 1, 2, 4])
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, width),
        "timestep": draw.timestep(1, torch.float32),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "encoder_attention_mask": mask_of(draw, 7),
        "pooled_projections": draw.conditioning(1, 8),
        "image_embeds": draw.conditioning(1, 3, 12),
        "indices_latents": parts[2],
        "guidance": draw.values(6000),
        "latents_clean": draw.conditioning(1, 4, 2, 8, width),
        "indices_latents_clean": torch.cat([parts[0], parts[3]]),
        "latents_history_2x": draw.conditioning(1, 4, 2, 8, width),
        "indices_latents_history_2x": parts[4],
        "latents_history_4x": draw.conditioning(1, 4, 4, 8, width),
        "indices_latents_history_4x": parts[5],
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "hunyuanvideo15", diffusers.HunyuanVideo15Transformer3DModel, "transformer_blocks", second=WIDER,
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_refiner_layers=1,
    patch_size=1, patch_size_t=1, text_embed_dim=24, text_embed_2_dim=12, image_embed_dim=10, rope_axes_dim=(4, 4, 8),
)
def _hunyuanvideo15(draw: Draw, wide: bool = False, image: bool = False) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 9, 2, 4, 6 if wide else 4),
        "image_embeds": draw.conditioning(1, 3, 10) if image else torch.zeros(1, 3, 10, dtype=draw.dtype),
        "timestep": draw.timestep(1, draw.dtype),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "encoder_attention_mask": mask_of(draw, 7),
        "encoder_hidden_states_2": draw.conditioning(1, 5, 12),
        "encoder_attention_mask_2": mask_of(draw, 5),
    }


@register(
    "hunyuanvideo15_image", diffusers.HunyuanVideo15Transformer3DModel, "transformer_blocks", second=WIDER,
    **config_of("hunyuanvideo15"),
)
def _hunyuanvideo15_image(draw: Draw, wide: bool = False) -> Inputs:
    return _hunyuanvideo15(draw, wide, image=True)


@register(
    "kandinsky5", diffusers.Kandinsky5Transformer3DModel, second=WIDER,
    in_visual_dim=4, in_text_dim=24, in_text_dim2=12, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=32,
    ff_dim=48, num_text_blocks=1, num_visual_blocks=4, axes_dims=(4, 6, 6), visual_cond=True,
)
def _kandinsky5(draw: Draw, wide: bool = False) -> Inputs:
    width = 12 if wide else 8
    return {
        "hidden_states": draw.latent(1, 3, 8, width, 9),  # B F H W C
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "pooled_projections": draw.conditioning(1, 12),
        "timestep": draw.timestep(1, draw.dtype),
        "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(width // 2)],
        "text_rope_pos": torch.arange(7),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": True,
    }


@register(
    "stable_audio", diffusers.StableAudioDiTModel, "transformer_blocks", second=WIDER,
    sample_size=16, in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
    num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16, time_proj_dim=16,
    global_states_input_dim=12, cross_attention_input_dim=24,
)
def _stable_audio(draw: Draw, wide: bool = False) -> Inputs:
    length = 24 if wide else 16
    return {
        "hidden_states": draw.latent(2, 4, length),
        "timestep": draw.timestep(dtype=torch.float32).unsqueeze(0) / 1000,
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "global_hidden_states": draw.conditioning(2, 1, 12),
        "rotary_embedding": get_1d_rotary_pos_embed(8, length + 1, use_real=True, repeat_interleave_real=False),
        "return_dict": False,
    }


@register(
    "sana_video", diffusers.SanaVideoTransformer3DModel, "transformer_blocks", second=WIDER,
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=4,
    num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
    sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
)
def _sana_video(draw: Draw, wide: bool = False) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 3, 8, 12 if wide else 8),
        "encoder_hidden_states": draw.conditioning(2, 7, 16),
        "encoder_attention_mask": mask_of(draw, 7, batch=2),
        "timestep": draw.timestep(2, torch.float32),
        "return_dict": False,
        "attention_kwargs": None,
    }
# fmt: on


@register(
    "kandinsky3",
    diffusers.Kandinsky3UNet,
    second={"h": 24, "w": 16},
    in_channels=4,
    time_embedding_dim=16,
    groups=4,
    attention_head_dim=8,
    layers_per_block=2,
    block_out_channels=(16, 32, 64, 128),
    cross_attention_dim=16,
    encoder_hid_dim=16,
)
def _k3(d, h=16, w=16):
    return {
        "sample": d.latent(2, 4, h, w),
        "timestep": d.timestep(),
        "encoder_hidden_states": d.conditioning(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7]),
        "return_dict": False,
    }


_T = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


@register(
    "cascade_prior",
    diffusers.StableCascadeUNet,
    second=TALLER,
    in_channels=4,
    out_channels=4,
    timestep_ratio_embedding_dim=8,
    conditioning_dim=16,
    block_out_channels=(16, 16),
    num_attention_heads=(2, 2),
    down_num_layers_per_block=(1, 2),
    up_num_layers_per_block=(2, 1),
    block_types_per_layer=(_T, _T),
    clip_text_in_channels=16,
    clip_text_pooled_in_channels=16,
    clip_image_in_channels=8,
    switch_level=(False,),
)
def _cp(d, h=8, w=8):
    return {
        "sample": d.latent(2, 4, h, w),
        "timestep_ratio": d.timestep(2, d.dtype) / 1000,
        "clip_text_pooled": d.conditioning(2, 1, 16),
        "clip_text": d.conditioning(2, 7, 16),
        "clip_img": d.conditioning(2, 1, 8),
        "return_dict": False,
    }


@register(
    "cascade_decoder",
    diffusers.StableCascadeUNet,
    second={"h": 24, "w": 16},
    in_channels=4,
    out_channels=4,
    patch_size=2,
    timestep_ratio_embedding_dim=8,
    conditioning_dim=16,
    block_out_channels=(8, 16, 16),
    num_attention_heads=(-1, 2, 2),
    down_num_layers_per_block=(1, 1, 1),
    up_num_layers_per_block=(1, 1, 1),
    down_blocks_repeat_mappers=(1, 1, 1),
    up_blocks_repeat_mappers=(2, 2, 1),
    block_types_per_layer=(_T[:2], _T, _T),
    clip_text_pooled_in_channels=16,
    effnet_in_channels=4,
    dropout=(0.0, 0.0, 0.0),
    self_attn=True,
)
def _cd(d, h=16, w=16):
    return {
        "sample": d.latent(2, 4, h, w),
        "timestep_ratio": d.timestep(2, d.dtype) / 1000,
        "clip_text_pooled": d.conditioning(2, 1, 16),
        "effnet": d.conditioning(2, 4, 4, 4),
        "return_dict": False,
    }


@register(
    "uvit2d",
    diffusers.UVit2DModel,
    second=TALLER,
    hidden_size=32,
    cond_embed_dim=16,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=40,
    encoder_hidden_size=16,
    vocab_size=40,
    codebook_size=32,
    in_channels=16,
    block_out_channels=16,
    num_res_blocks=1,
    block_num_heads=2,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    sample_size=8,
)
def _uvit(d, h=8, w=8):
    ids = torch.randint(0, 33, (2, h, w), generator=d._latent)
    return {
        "input_ids": ids,
        "encoder_hidden_states": d.conditioning(2, 7, 16),
        "pooled_text_emb": d.conditioning(2, 16),
        "micro_conds": torch.tensor([[64, 64, 0, 0, 6]] * 2).to(d.dtype),
        "cross_attention_kwargs": None,
    }


@register(
    "unet2d",
    diffusers.UNet2DModel,
    second=TALLER,
    sample_size=8,
    block_out_channels=(8, 16, 16),
    norm_num_groups=4,
    attention_head_dim=4,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
def _u2(d, h=8, w=8):
    return {"sample": d.latent(2, 3, h, w), "timestep": d.timestep()}


@register(
    "unet2d_ncsnpp",
    diffusers.UNet2DModel,
    second=TALLER,
    sample_size=8,
    block_out_channels=(32, 32),
    norm_num_groups=None,
    attention_head_dim=None,
    layers_per_block=1,
    time_embedding_type="fourier",
    freq_shift=0,
    norm_eps=1e-6,
    mid_block_scale_factor=2**0.5,
    down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
)
def _u2n(d, h=8, w=8):
    return {"sample": d.latent(2, 3, h, w), "timestep": d.timestep(2, d.dtype) / 10 + 1}


@register(
    "unet1d",
    diffusers.UNet1DModel,
    second={"w": 48},
    sample_size=32,
    in_channels=2,
    out_channels=2,
    extra_in_channels=64,
    time_embedding_type="fourier",
    flip_sin_to_cos=True,
    block_out_channels=(32, 32, 64),
)
def _u1(d, w=32):
    return {"sample": d.latent(2, 2, w), "timestep": d.timestep()}


@register(
    "prior",
    diffusers.PriorTransformer,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    embedding_dim=16,
    num_embeddings=7,
)
def _prior(d):
    return {
        "hidden_states": d.latent(2, 16),
        "timestep": d.timestep(),
        "proj_embedding": d.conditioning(2, 16),
        "encoder_hidden_states": d.conditioning(2, 7, 16),
        "attention_mask": torch.tensor([[True] * 4 + [False] * 3, [True] * 7]),
    }


SD = dict(
    sample_size=8,
    **levels("2D", depth=3),
    block_out_channels=(8, 16, 16),
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=2,
)


def _sd(d, h, w):
    return {
        "sample": d.latent(2, 4, h, w),
        "timestep": d.timestep(),
        "encoder_hidden_states": d.conditioning(2, 7, 16),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
    }


@register("sd_controlnet", diffusers.UNet2DConditionModel, second=TALLER, **SD)
def _cn(d, h=8, w=8):
    shapes = [(8, 1)] * 3 + [(8, 2)] + [(16, 2)] * 2 + [(16, 4)] * 3
    down = tuple(d.latent(2, c, h // s, w // s) for c, s in shapes)
    return {
        **_sd(d, h, w),
        "down_block_additional_residuals": list(down),
        "mid_block_additional_residual": d.latent(2, 16, h // 4, w // 4),
        "added_cond_kwargs": None,
        "return_dict": False,
    }


@register("sd_controlnet_tuple", diffusers.UNet2DConditionModel, second=TALLER, **SD)
def _cnt(d, h=8, w=8):
    x = _cn(d, h, w)
    return {**x, "down_block_additional_residuals": tuple(x["down_block_additional_residuals"])}


@register("sd_t2i", diffusers.UNet2DConditionModel, second=TALLER, **SD)
def _t2i(d, h=8, w=8):
    return {
        **_sd(d, h, w),
        "down_intrablock_additional_residuals": [
            d.conditioning(2, 8, h, w),
            d.conditioning(2, 16, h // 2, w // 2),
            d.conditioning(2, 16, h // 4, w // 4),
        ],
        "return_dict": False,
    }


def _make_ip(**config):
    unet = diffusers.UNet2DConditionModel(**config)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(image_embed_dim=8, cross_attention_dim=16, num_image_text_embeds=4)]
    )
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    procs = {}
    for n in unet.attn_processors:
        if n.endswith("attn1.processor"):
            procs[n] = AttnProcessor2_0()
        else:
            hidden = unet.get_submodule(n.removesuffix(".processor")).to_q.in_features
            procs[n] = IPAdapterAttnProcessor2_0(hidden_size=hidden, cross_attention_dim=16, num_tokens=[4], scale=0.6)
    unet.set_attn_processor(procs)
    return unet


@register("sd_ip", _make_ip, second=TALLER, **SD)
def _ip(d, h=8, w=8):
    return {**_sd(d, h, w), "added_cond_kwargs": {"image_embeds": [d.conditioning(2, 1, 8)]}, "return_dict": False}


def _make_motion():
    unet = diffusers.UNet2DConditionModel(**{**SD, "sample_size": 8})
    ad = diffusers.MotionAdapter(
        block_out_channels=(8, 16, 16), motion_num_attention_heads=2, motion_norm_num_groups=4, motion_max_seq_length=8
    )
    return diffusers.UNetMotionModel.from_unet2d(unet, ad)


@register("motion_adapter", _make_motion, second=TALLER)
def _mo(d, h=8, w=8):
    return {
        "sample": d.latent(2, 4, 3, h, w),
        "timestep": d.timestep(),
        "encoder_hidden_states": d.conditioning(2, 7, 16).repeat_interleave(3, dim=0),
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
    }  # .sample


_LTX2 = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": 24,
}
_ltx2_rope = []


@register("ltx2", diffusers.LTX2VideoTransformer3DModel, second={"h": 6, "w": 4}, **_LTX2)
def _ltx2(d, h=4, w=4):
    if not _ltx2_rope:
        _ltx2_rope.append(diffusers.LTX2VideoTransformer3DModel(**_LTX2))
    m = _ltx2_rope[0]
    t = d.timestep(2, torch.float32)
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
    return {
        "hidden_states": d.latent(2, 3 * h * w, 8),
        "audio_hidden_states": d.latent(2, 5, 8),
        "encoder_hidden_states": d.conditioning(2, 7, 24),
        "audio_encoder_hidden_states": d.conditioning(2, 7, 24),
        "timestep": t,
        "sigma": t,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 3,
        "height": h,
        "width": w,
        "fps": 24.0,
        "audio_num_frames": 5,
        "video_coords": m.rope.prepare_video_coords(1, 3, h, w, torch.device("cpu"), fps=24.0).repeat(2, 1, 1, 1),
        "audio_coords": m.audio_rope.prepare_audio_coords(1, 5, torch.device("cpu")).repeat(2, 1, 1, 1),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "z_image",
    diffusers.ZImageTransformer2DModel,
    second={"h": 16, "w": 8},
    in_channels=4,
    dim=32,
    n_layers=3,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=24,
    axes_dims=[4, 6, 6],
    axes_lens=[128, 32, 32],
)
def _z(d, h=8, w=8):
    return {
        "x": [d.latent(4, 1, h, w), d.latent(4, 1, h, w)],
        "t": 1 - d.timestep(2, torch.float32) / 1000,
        "cap_feats": [d.conditioning(7, 24), d.conditioning(5, 24)],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "z_image_ragged",
    diffusers.ZImageTransformer2DModel,
    second={"h": 16, "w": 8},
    **config_of("z_image"),
)
def _zr(d, h=8, w=8):
    return {**_z(d, h, w), "cap_feats": [d.conditioning(40, 24), d.conditioning(5, 24)]}


@register(
    "prx",
    diffusers.PRXTransformer2DModel,
    second=TALLER,
    in_channels=4,
    context_in_dim=24,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=2,
    depth=3,
    axes_dim=[8, 8],
)
def _prx(d, h=8, w=8):
    return {
        "hidden_states": d.latent(2, 4, h, w),
        "timestep": d.flow_time(2),
        "encoder_hidden_states": d.conditioning(2, 7, 24),
        "attention_mask": torch.tensor([[True] * 4 + [False] * 3, [True] * 7]),
        "return_dict": False,
    }


def _ids(kind, h, w, start=0):
    r, c = torch.meshgrid(torch.arange(float(h)) + start, torch.arange(float(w)) + start, indexing="ij")
    return torch.stack([torch.full((h, w), float(kind)), r, c], -1).reshape(-1, 3)


def _tids(n):
    return torch.stack([torch.zeros(n), torch.arange(float(n)), torch.arange(float(n))], -1)


_FX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
}


@register(
    "ovis",
    diffusers.OvisImageTransformer2DModel,
    second={"h": 6, "w": 4},
    out_channels=4,
    axes_dims_rope=(4, 4, 8),
    **_FX,
)
def _ovis(d, h=4, w=4):
    return {
        "hidden_states": d.latent(1, h * w, 4),
        "timestep": d.flow_time(1),
        "encoder_hidden_states": d.conditioning(1, 6, 24),
        "txt_ids": _tids(6).to(d.dtype),
        "img_ids": _ids(0, h, w).to(d.dtype),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


@register(
    "longcat",
    diffusers.LongCatImageTransformer2DModel,
    second={"h": 6, "w": 4},
    pooled_projection_dim=16,
    axes_dims_rope=[4, 4, 8],
    **_FX,
)
def _longcat(d, h=4, w=4):
    return {
        "hidden_states": d.latent(1, h * w, 4),
        "timestep": d.flow_time(1),
        "guidance": None,
        "encoder_hidden_states": d.conditioning(1, 6, 24),
        "txt_ids": _tids(6),
        "img_ids": _ids(1, h, w, 6),
        "return_dict": False,
    }


@register(
    "wan_animate",
    diffusers.WanAnimateTransformer3DModel,
    second=TALLER,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=12,
    latent_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=16,
    ffn_dim=48,
    num_layers=4,
    image_dim=16,
    added_kv_proj_dim=32,
    rope_max_seq_len=16,
    motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)
def _wa(d, h=8, w=8):
    return {
        "hidden_states": d.latent(1, 12, 3, h, w),
        "timestep": d.timestep(1),
        "encoder_hidden_states": d.conditioning(1, 7, 24),
        "encoder_hidden_states_image": d.conditioning(1, 5, 16),
        "pose_hidden_states": d.conditioning(1, 4, 2, h, w),
        "face_pixel_values": d.conditioning(1, 3, 5, 16, 16),
        "motion_encode_batch_size": 2,
        "attention_kwargs": None,
        "return_dict": False,
    }


_CE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 3,
    "image_dim": 16,
    "added_kv_proj_dim": 32,
    "rope_max_seq_len": 16,
}


@register("chronoedit", diffusers.ChronoEditTransformer3DModel, second=TALLER, **_CE)
def _ce(d, h=8, w=8, f=3):
    return {
        "hidden_states": d.latent(1, 8, f, h, w),
        "timestep": d.timestep(1),
        "encoder_hidden_states": d.conditioning(1, 7, 24),
        "encoder_hidden_states_image": d.conditioning(1, 5, 16),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register("chronoedit_2f", diffusers.ChronoEditTransformer3DModel, second={"h": 8, "w": 8, "f": 3}, **_CE)
def _ce2(d, h=8, w=8, f=2):
    return _ce(d, h, w, f)


@register(
    "cosmos2",
    diffusers.CosmosTransformer3DModel,
    second=TALLER,
    in_channels=5,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    mlp_ratio=2,
    text_embed_dim=24,
    adaln_lora_dim=8,
    max_size=(4, 16, 16),
    extra_pos_embed_type=None,
    concat_padding_mask=False,
)
def _co2(d, h=8, w=8):
    t = d.flow_time(1).view(1, 1, 1, 1, 1).expand(1, 1, 3, 1, 1)
    ind = torch.zeros(1, 1, 3, 1, 1)
    ind[:, :, :1] = 1
    return {
        "hidden_states": d.latent(1, 4, 3, h, w),
        "timestep": (ind * 0.0001 + (1 - ind) * t).to(d.dtype),
        "encoder_hidden_states": d.conditioning(1, 7, 24),
        "fps": 16,
        "condition_mask": (ind * torch.ones(1, 1, 3, h, w)).to(d.dtype),
        "padding_mask": torch.zeros(1, 1, 8 * h, 8 * w, dtype=d.dtype),
        "return_dict": False,
    }


@register(
    "nucleus",
    diffusers.NucleusMoEImageTransformer2DModel,
    second={"h": 6, "w": 4},
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(4, 4, 8),
    dense_moe_strategy="leave_first_block_dense",
    num_experts=4,
    moe_intermediate_dim=16,
    capacity_factors=2.0,
    mlp_ratio=8.0,
)
def _nuc(d, h=4, w=4):
    return {
        "hidden_states": d.latent(1, h * w, 16),
        "timestep": d.flow_time(1),
        "encoder_hidden_states": d.conditioning(1, 7, 24),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7]),
        "img_shapes": [(1, h, w)],
        "attention_kwargs": {},
        "return_dict": False,
    }


@register(
    "nucleus_grouped",
    diffusers.NucleusMoEImageTransformer2DModel,
    second={"h": 6, "w": 4},
    use_grouped_mm=True,
    **config_of("nucleus"),
)
def _nucg(d, h=4, w=4):
    return _nuc(d, h, w)


@register(
    "helios",
    diffusers.HeliosTransformer3DModel,
    second={"h": 16, "w": 8},
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=16,
    ffn_dim=48,
    num_layers=3,
    rope_dim=(4, 6, 6),
)
def _hel(d, h=8, w=8):
    i = torch.arange(1 + 4 + 2 + 1 + 3)
    p, long, m, s, n = i.split([1, 4, 2, 1, 3])
    return {
        "hidden_states": d.latent(1, 4, 3, h, w),
        "timestep": d.timestep(1),
        "encoder_hidden_states": d.conditioning(1, 7, 24),
        "indices_hidden_states": n[None],
        "indices_latents_history_short": torch.cat([p, s])[None],
        "indices_latents_history_mid": m[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": d.conditioning(1, 4, 2, h, w),
        "latents_history_mid": d.conditioning(1, 4, 2, h, w),
        "latents_history_long": d.conditioning(1, 4, 4, h, w),
        "attention_kwargs": None,
        "return_dict": False,
    }
