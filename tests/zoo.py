"""Small random models of the families the package must capture, with the inputs their pipelines pass.

    model, make_inputs = ZOO["svd"].build(torch.bfloat16)
    model(**make_inputs(seed=0, step=3))

Shapes in comments: B batch (guidance included), F frames, C channels, H height, W width, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import (
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
    get_3d_rotary_pos_embed_allegro,
)
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.common import randomize

Inputs = dict[str, Any]


class Draw:
    """Random inputs of one denoising step: conditioning depends on the seed alone, the latent on seed and step."""

    def __init__(self, seed: int, step: int, dtype: torch.dtype) -> None:
        self._conditioning = torch.Generator().manual_seed(seed)
        self._latent = torch.Generator().manual_seed(100_003 * (seed + 1) + step)
        self.dtype = dtype
        self._step = step

    def latent(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._latent).to(self.dtype)

    def conditioning(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._conditioning).to(self.dtype)

    def angles(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines as a pipeline's rotary tables hold them: float32, each angle repeated once."""
        angle = torch.randn(shape, generator=self._conditioning).repeat_interleave(2, dim=-1)
        return angle.cos(), angle.sin()

    def timestep(self, batch: int | None = None, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        timestep = torch.tensor(981 - 97 * self._step, dtype=dtype)
        return timestep if batch is None else timestep.expand(batch)

    def flow_time(self, batch: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A flow-matching time in [0, 1], as Flux's pipeline passes it."""
        return self.timestep(batch, dtype or self.dtype) / 1000

    def values(self, *numbers: float) -> torch.Tensor:
        return torch.tensor(numbers, dtype=self.dtype)


@dataclass(frozen=True)
class Entry:
    """One small model: how to build it, what to feed it, where it is sensible to cut."""

    name: str
    create: Callable[[], nn.Module]
    inputs: Callable[[Draw], Inputs]
    cuts: tuple[str, ...]
    residual: tuple[str, str] | None = None  # first and last block of a range kept as `out - in`

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[..., Inputs]]:
        """The model in eval mode, and `make_inputs(seed, step=0)` for the keyword arguments of one call."""
        model = self.create()
        randomize(model)
        cast(model, dtype)
        model.eval().requires_grad_(False)

        def make_inputs(seed: int, step: int = 0) -> Inputs:
            return self.inputs(Draw(seed, step, dtype))

        return model, make_inputs


def run_inputs(make_inputs: Callable[..., Inputs], seed: int, num_steps: int) -> list[Inputs]:
    """The calls of one generation. As in a pipeline, what does not change is the same tensor object at every step."""
    first = make_inputs(seed, 0)

    def share(initial: Any, current: Any) -> Any:
        unchanged = isinstance(initial, torch.Tensor) and torch.equal(initial, current)
        return initial if unchanged else current

    return [first, *(pytree.tree_map(share, first, make_inputs(seed, step)) for step in range(1, num_steps))]


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(torch_dtype=...)` does: some models keep parts of themselves in float32."""
    exempt = set(model._keep_in_fp32_modules or ())
    kept = {name: tensor.data for name, tensor in model.named_parameters() if exempt.intersection(name.split("."))}
    model.to(dtype)
    for name, tensor in kept.items():
        model.get_parameter(name).data = tensor


ZOO: dict[str, Entry] = {}


def register(
    name: str,
    model_class: type[nn.Module],
    *,
    cuts: tuple[str, ...],
    residual: tuple[str, str] | None = None,
    **config: Any,
) -> Callable[[Callable[[Draw], Inputs]], Callable[[Draw], Inputs]]:
    """Register the model `model_class(**config)` with the decorated function, which draws its inputs."""

    def add(inputs: Callable[[Draw], Inputs]) -> Callable[[Draw], Inputs]:
        ZOO[name] = Entry(name, partial(model_class, **config), inputs, cuts, residual)
        return inputs

    return add


def levels(kind: str, *, plain_first: bool = False, depth: int = 3) -> dict[str, tuple[str, ...]]:
    """Block types of a U-Net that has no attention at its outermost or (Stable Diffusion) its innermost level."""
    down = [f"CrossAttnDownBlock{kind}"] * depth
    down[0 if plain_first else -1] = f"DownBlock{kind}"
    up = [block.replace("Down", "Up") for block in reversed(down)]
    return {"down_block_types": tuple(down), "up_block_types": tuple(up)}


# A model's settings read best as paragraphs.
# fmt: off

# U-Nets -----------------------------------------------------------------------------------------------------------


@register(
    "sd", diffusers.UNet2DConditionModel, cuts=("up_blocks.3.attentions.1", "up_blocks.2"),
    sample_size=16, **levels("2D", depth=4), block_out_channels=(8, 16, 16, 16), norm_num_groups=4,
    cross_attention_dim=16, attention_head_dim=2,
)
def _sd(draw: Draw) -> Inputs:
    return {
        "sample": draw.latent(2, 4, 16, 16),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.conditioning(2, 7, 16),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }


@register(
    "sdxl", diffusers.UNet2DConditionModel, cuts=("up_blocks.2.resnets.1", "up_blocks.1.attentions.1"),
    sample_size=8, **levels("2D", plain_first=True), block_out_channels=(8, 16, 16), norm_num_groups=4,
    cross_attention_dim=16, attention_head_dim=(2, 2, 4), transformer_layers_per_block=(1, 1, 2),
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
)
def _sdxl(draw: Draw) -> Inputs:
    return {
        "sample": draw.latent(2, 4, 8, 8),
        "timestep": draw.timestep(dtype=torch.float32),
        "encoder_hidden_states": draw.conditioning(2, 7, 16),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": {
            "text_embeds": draw.conditioning(2, 16),
            "time_ids": draw.values(64, 64, 0, 0, 64, 64).repeat(2, 1),
        },
        "return_dict": False,
    }


@register(
    "svd", diffusers.UNetSpatioTemporalConditionModel, cuts=("up_blocks.2.attentions.1", "up_blocks.1"),
    # its group norms have 32 groups, whatever the config says
    sample_size=8, **levels("SpatioTemporal"), block_out_channels=(32, 32, 64), num_attention_heads=(2, 2, 4),
    cross_attention_dim=16, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
)
def _svd(draw: Draw) -> Inputs:
    return {
        "sample": draw.latent(2, 3, 8, 8, 8),  # B F C H W
        "timestep": draw.timestep(dtype=torch.float32),
        "encoder_hidden_states": draw.conditioning(2, 1, 16),
        "added_time_ids": draw.values(6, 127, 0.02).repeat(2, 1),
        "return_dict": False,
    }


@register(
    "modelscope", diffusers.UNet3DConditionModel, cuts=("up_blocks.2.temp_attentions.1", "up_blocks.1"),
    sample_size=8, **levels("3D"), block_out_channels=(8, 16, 16), norm_num_groups=4, cross_attention_dim=16,
    attention_head_dim=4,
)
def _modelscope(draw: Draw) -> Inputs:
    return {
        "sample": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.conditioning(2, 7, 16),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "animatediff", diffusers.UNetMotionModel, cuts=("up_blocks.2.motion_modules.1", "up_blocks.1"),
    sample_size=8, **levels("Motion"), block_out_channels=(8, 16, 16), norm_num_groups=4,
    cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
)
def _animatediff(draw: Draw) -> Inputs:
    return {
        "sample": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.conditioning(2, 7, 16).repeat_interleave(3, dim=0),  # B*F L C
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": True,
    }


@register(
    "i2vgenxl", diffusers.I2VGenXLUNet, cuts=("up_blocks.2.temp_attentions.1", "up_blocks.1"),
    sample_size=8, **levels("3D"), block_out_channels=(8, 16, 16), norm_num_groups=4, cross_attention_dim=16,
    attention_head_dim=4,
)
def _i2vgenxl(draw: Draw) -> Inputs:
    return {
        "sample": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.conditioning(2, 7, 16),
        "fps": torch.tensor([16, 16]),
        "image_latents": draw.conditioning(2, 4, 3, 8, 8),
        "image_embeddings": draw.conditioning(2, 1, 16),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


# Transformers -----------------------------------------------------------------------------------------------------


@register(
    "flux", diffusers.FluxTransformer2DModel, cuts=("transformer_blocks.1", "single_transformer_blocks.1"),
    residual=("transformer_blocks.0", "transformer_blocks.2"),
    in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
)
def _flux(draw: Draw) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": draw.latent(1, 16, 4),
        "timestep": draw.flow_time(1),
        "guidance": torch.tensor([3.5]),
        "pooled_projections": draw.conditioning(1, 16),
        "encoder_hidden_states": draw.conditioning(1, 6, 24),
        "txt_ids": draw.values(0, 0, 0).repeat(6, 1),
        "img_ids": torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).reshape(16, 3).to(draw.dtype),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


@register(
    "sd3", diffusers.SD3Transformer2DModel, cuts=("transformer_blocks.1", "transformer_blocks.2.attn"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=16,
    dual_attention_layers=(0, 1), qk_norm="rms_norm",
)
def _sd3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "timestep": draw.timestep(2, torch.float32),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "pooled_projections": draw.conditioning(2, 16),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "wan", diffusers.WanTransformer3DModel, cuts=("blocks.1", "blocks.2"), residual=("blocks.1", "blocks.2"),
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
    ffn_dim=48, num_layers=4, rope_max_seq_len=16,
)
def _wan(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(1),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "attention_kwargs": None,
        "return_dict": False,
    }


_COGVIDEOX: dict[str, Any] = {
    "model_class": diffusers.CogVideoXTransformer3DModel,
    "cuts": ("transformer_blocks.1", "transformer_blocks.2.attn1"),
    "residual": ("transformer_blocks.1", "transformer_blocks.2"),
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 24, "num_layers": 4, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 6,
}


@register("cogvideox", **_COGVIDEOX)
def _cogvideox(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 3, 4, 8, 8),  # B F C H W
        "encoder_hidden_states": draw.conditioning(2, 6, 24),
        "timestep": draw.timestep(2),
        "image_rotary_emb": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


@register("cogvideox_resized", **_COGVIDEOX)
def _cogvideox_resized(draw: Draw) -> Inputs:
    """At a size that is not the config's, the position table is built anew, with numpy, inside `forward`."""
    return {**_cogvideox(draw), "hidden_states": draw.latent(2, 3, 4, 8, 12)}  # B F C H W


@register(
    "cogvideox1.5", **_COGVIDEOX, use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False,
)
def _cogvideox_1_5(draw: Draw) -> Inputs:
    return {
        **_cogvideox(draw),
        "hidden_states": draw.latent(2, 4, 4, 8, 8),  # B F C H W
        "image_rotary_emb": draw.angles(2 * 4 * 4, 8),
    }


@register(
    "easyanimate", diffusers.EasyAnimateTransformer3DModel, cuts=("transformer_blocks.1", "transformer_blocks.2.attn1"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
    sample_height=8, num_layers=4, mmdit_layers=4, time_embed_dim=8, text_embed_dim=24,
)
def _easyanimate(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(2, draw.dtype),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "encoder_hidden_states_t5": None,
        "return_dict": False,
    }


@register(
    "ltx", diffusers.LTXVideoTransformer3DModel, cuts=("transformer_blocks.1", "transformer_blocks.2"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
    num_layers=4, caption_channels=24,
)
def _ltx(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 3 * 4 * 4, 8),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "timestep": draw.timestep(2, torch.float32),
        "encoder_attention_mask": torch.tensor([[True] * 4 + [False] * 3, [True] * 7]),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "hunyuanvideo", diffusers.HunyuanVideoTransformer3DModel,
    cuts=("transformer_blocks.1", "single_transformer_blocks.1"),
    residual=("single_transformer_blocks.0", "single_transformer_blocks.1"),
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
    num_single_layers=3, num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=8,
    rope_axes_dim=(4, 4, 8),
)
def _hunyuanvideo(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(1, draw.dtype),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 2]),
        "pooled_projections": draw.conditioning(1, 8),
        "guidance": draw.values(6000),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "mochi", diffusers.MochiTransformer3DModel, cuts=("transformer_blocks.1", "transformer_blocks.2.attn1"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    num_attention_heads=2, attention_head_dim=16, num_layers=4, pooled_projection_dim=16, in_channels=4,
    text_embed_dim=24, time_embed_dim=8, max_sequence_length=7,
)
def _mochi(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "timestep": draw.timestep(2, draw.dtype),
        "encoder_attention_mask": torch.tensor([[True] * 4 + [False] * 3, [True] * 7]),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "latte", diffusers.LatteTransformer3DModel, cuts=("temporal_transformer_blocks.0", "transformer_blocks.1"),
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
    cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=24,
    video_length=3,
)
def _latte(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "timestep": draw.timestep(2),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


@register(
    "pixart", diffusers.PixArtTransformer2DModel, cuts=("transformer_blocks.1", "transformer_blocks.2"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    num_attention_heads=2, attention_head_dim=8, num_layers=4, cross_attention_dim=16, sample_size=8,
    norm_num_groups=4, caption_channels=24,
)
def _pixart(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7]),
        "timestep": draw.timestep(2),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


@register(
    "dit", diffusers.DiTTransformer2DModel, cuts=("transformer_blocks.1", "transformer_blocks.2.ff"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=4, norm_num_groups=4, sample_size=8,
)
def _dit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "timestep": draw.timestep(2),
        "class_labels": torch.tensor([207, 1000]),
        "return_dict": True,
    }


@register(
    "auraflow", diffusers.AuraFlowTransformer2DModel,
    cuts=("joint_transformer_blocks.0", "single_transformer_blocks.1"),
    residual=("joint_transformer_blocks.0", "joint_transformer_blocks.1"),
    sample_size=8, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, caption_projection_dim=32, pos_embed_max_size=64,
)
def _auraflow(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "timestep": draw.flow_time(2),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "allegro", diffusers.AllegroTransformer3DModel, cuts=("transformer_blocks.1", "transformer_blocks.2"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    num_attention_heads=2, attention_head_dim=24, num_layers=4, cross_attention_dim=48, sample_height=8,
    sample_width=8, sample_frames=3, caption_channels=24,
)
def _allegro(draw: Draw) -> Inputs:
    frequencies = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=3
    )
    grid = torch.cartesian_prod(*(axis.long() for axis in frequencies[3:]))  # L 3
    return {
        "hidden_states": draw.latent(2, 4, 3, 8, 8),  # B C F H W
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7]),
        "timestep": draw.timestep(2),
        "image_rotary_emb": (frequencies[:3], tuple(grid.T.unsqueeze(1).contiguous())),
        "return_dict": False,
    }


@register(
    "sana", diffusers.SanaTransformer2DModel, cuts=("transformer_blocks.1", "transformer_blocks.2.ff"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=4,
    num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
    sample_size=8,
)
def _sana(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7]),
        "timestep": draw.timestep(2),
        "attention_kwargs": None,
        "return_dict": False,
    }


@register(
    "cosmos", diffusers.CosmosTransformer3DModel, cuts=("transformer_blocks.1", "transformer_blocks.2"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, mlp_ratio=2,
    text_embed_dim=24, adaln_lora_dim=8, max_size=(4, 16, 16),
    concat_padding_mask=False,  # resizing the mask needs torchvision
)
def _cosmos(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 4, 3, 8, 8),  # B C F H W
        "timestep": draw.timestep(1, draw.dtype),
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "fps": 30,
        "return_dict": False,
    }


@register(
    "lumina_next", diffusers.LuminaNextDiT2DModel, cuts=("layers.0", "layers.1"), residual=("layers.1", "layers.2"),
    sample_size=8, hidden_size=32, num_layers=4, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
    cross_attention_dim=24,
)
def _lumina_next(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "timestep": draw.flow_time(2, torch.float32),
        "encoder_hidden_states": draw.conditioning(2, 7, 24),
        "encoder_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7]),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


@register(
    "hunyuandit", diffusers.HunyuanDiT2DModel, cuts=("blocks.1", "blocks.2"),
    num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
    num_layers=4, cross_attention_dim=24, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5,
    text_len_t5=6,
)
def _hunyuandit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(2, 4, 8, 8),
        "timestep": draw.timestep(2, draw.dtype),
        "encoder_hidden_states": draw.conditioning(2, 5, 24),
        "text_embedding_mask": torch.tensor([[1] * 4 + [0], [1] * 5]),
        "encoder_hidden_states_t5": draw.conditioning(2, 6, 16),
        "text_embedding_mask_t5": torch.tensor([[1] * 2 + [0] * 4, [1] * 6]),
        "image_meta_size": draw.values(64, 64, 64, 64, 0, 0).repeat(2, 1),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
        "return_dict": False,
    }


@register(
    "qwenimage", diffusers.QwenImageTransformer2DModel, cuts=("transformer_blocks.1", "transformer_blocks.2.attn"),
    residual=("transformer_blocks.1", "transformer_blocks.2"),
    in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
)
def _qwenimage(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(1, 16, 16),
        "timestep": draw.flow_time(1),
        "guidance": None,
        "encoder_hidden_states": draw.conditioning(1, 7, 24),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7]),
        "img_shapes": [[(1, 4, 4)]],
        "attention_kwargs": {},
        "return_dict": False,
    }


@register(
    "chroma", diffusers.ChromaTransformer2DModel, cuts=("transformer_blocks.1", "single_transformer_blocks.1"),
    residual=("transformer_blocks.0", "transformer_blocks.1"),
    in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
    approximator_layers=1,
)
def _chroma(draw: Draw) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": draw.latent(1, 16, 4),
        "timestep": draw.flow_time(1),
        "encoder_hidden_states": draw.conditioning(1, 6, 24),
        "txt_ids": draw.values(0, 0, 0).repeat(6, 1),
        "img_ids": torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).reshape(16, 3).to(draw.dtype),
        "attention_mask": torch.tensor([[True] * 4 + [False] * 2 + [True] * 16]),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
