"""Component configurations of the small Latte-shaped text-to-video pipeline.

Its latents are those of the image-to-video model beside it: 8 frames of 8 x 8 x 8, decoded by the same autoencoder, so
that what differs between the two is the denoiser. Six spatial and six temporal blocks alternate over 8 x 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import LatteTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from examples.small_model.captions import NUM_WORDS, WORDS
from examples.small_model.sprites import NUM_FRAMES

NUM_TOKENS = NUM_WORDS + 1
"""Of a caption of one sprite: its words and the end of the sequence."""

_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

_CAPTION_GAIN = 4.0
"""Brings projected words to about unit size: at torch's own start they are a fifth of it, and are averaged."""


@dataclass(frozen=True)
class DiTConfig:
    """Widths of the components; the defaults are the shipped model, tests use narrower ones."""

    latent_channels: int = 8
    latent_size: int = 8
    num_layers: int = 6
    num_heads: int = 5
    head_dim: int = 32
    patch_size: int = 2
    text_dim: int = 64
    text_layers: int = 2


def make_tokenizer() -> T5Tokenizer:
    """Make the tokenizer: one token a word of a caption, anything else unknown, `</s>` at the end."""
    vocabulary = [(token, 0.0) for token in _SPECIAL_TOKENS] + [(f"▁{word}", -1.0) for word in WORDS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def make_text_encoder(config: DiTConfig) -> T5EncoderModel:
    """Make the untrained text encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_SPECIAL_TOKENS) + len(WORDS),
            d_model=config.text_dim,
            d_kv=config.text_dim // 2,
            d_ff=2 * config.text_dim,
            num_layers=config.text_layers,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def make_transformer(config: DiTConfig) -> LatteTransformer3DModel:
    """Make the untrained transformer: every residual branch at zero, open gates.

    As Latte's own it returns a variance beside v, which the pipeline drops; nothing trains it.
    """
    transformer = LatteTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=2 * config.latent_channels,
        num_layers=config.num_layers,
        cross_attention_dim=config.num_heads * config.head_dim,
        attention_bias=True,
        sample_size=config.latent_size,
        patch_size=config.patch_size,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=config.text_dim,
        video_length=NUM_FRAMES,
    )
    _start_from_nothing(transformer)
    return transformer


@torch.no_grad()
def _start_from_nothing(transformer: LatteTransformer3DModel) -> None:
    for name, module in transformer.named_modules():
        if name.endswith(("to_out.0", "ff.net.2", "adaln_single.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    transformer.caption_projection.linear_2.weight.mul_(_CAPTION_GAIN)
    transformer.scale_shift_table.zero_()
    for block in (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks):
        shift_scale_gate = torch.tensor([0.0, 0.0, 1.0]).repeat(2)[:, None]
        block.scale_shift_table.copy_(shift_scale_gate.expand_as(block.scale_shift_table))


class TextDenoiser(torch.nn.Module):
    """The transformer and the text encoder that are trained together."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.transformer = make_transformer(config)
        self.text_encoder = make_text_encoder(config)


def tokenize(tokenizer: T5Tokenizer, captions: list[str]) -> torch.Tensor:
    """Return the token ids (captions, NUM_TOKENS) of captions of one sprite each."""
    ids: torch.Tensor = tokenizer(captions, return_tensors="pt").input_ids
    if ids.shape[1:] != (NUM_TOKENS,):
        raise ValueError(f"expected captions of {NUM_WORDS} words, got {ids.shape[1] - 1} in the longest")
    return ids


def empty_prompt(tokenizer: T5Tokenizer) -> torch.Tensor:
    """Return the token ids (NUM_TOKENS,) of the empty prompt, padded."""
    ids: torch.Tensor = tokenizer("", padding="max_length", max_length=NUM_TOKENS, return_tensors="pt").input_ids[0]
    return ids
