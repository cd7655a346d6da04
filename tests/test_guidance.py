"""Pipelines whose guidance changes the denoiser or calls it once more: the plain pipeline and its hooked denoiser."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import nn
from transformers import CLIPTextModelWithProjection

import lightcache_fx as lc
from benchmarks.common import randomize
from lightcache_fx.errors import CutError
from oracle import HookOracle, assert_bitwise, plain_step, scheduled, tensors
from pipelines import image_vae, text_parts
from zoo import ZOO

NUM_STEPS = 8
INTERVAL = 2


def _generate(pipe: Any, num_steps: int = NUM_STEPS, **arguments: Any) -> torch.Tensor:
    output = pipe(
        prompt="box",
        negative_prompt="grey",
        height=32,
        width=32,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
        **arguments,
    )
    return output[0]  # type: ignore[no-any-return]


# Perturbed attention: the pipeline sets attention processors for a run ---------------------------------------------

KEPT = "up_blocks.0.attentions.0"
PERTURBED = ["mid", "up_blocks.0.attentions.1"]  # one that reuse steps skip and one that they run


def _small_unet() -> nn.Module:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    randomize(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def perturbed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = diffusers.StableDiffusionPAGPipeline(
            **text_parts(),
            vae=image_vae(),
            unet=_small_unet(),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            pag_applied_layers=PERTURBED,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_perturbed_attention_is_that_of_the_plain_pipeline(perturbed: Any) -> None:
    fast = lc.transform_pipeline(perturbed, lc.Policy())
    three, two = {"guidance_scale": 7.5}, {"guidance_scale": 0.0}  # passes in the batch, the perturbed one included
    for passes, scale in ((three, 3.0), (two, 3.0), (three, 0.0), (three, 3.0), (three, 3.0)):
        expected = _generate(perturbed, 2, pag_scale=scale, **passes)
        assert_bitwise([_generate(fast, 2, pag_scale=scale, **passes)], [expected], f"scale {scale}, {passes}")
        assert not fast.pag_attn_processors, "the pipeline has put its processors back"


def test_cached_perturbed_attention_is_that_of_the_hooked_pipeline(perturbed: Any) -> None:
    fast = lc.transform_pipeline(perturbed, lc.Policy(cache=lc.Cache(cut=KEPT, interval=INTERVAL)))
    for scale in (3.0, 3.0, 0.0, 3.0):
        with scheduled(perturbed.unet, HookOracle(perturbed.unet, [KEPT]), INTERVAL):
            expected = _generate(perturbed, pag_scale=scale)
        assert not torch.equal(expected, _generate(perturbed, pag_scale=scale)), "caching changed nothing"
        assert_bitwise([_generate(fast, pag_scale=scale)], [expected], f"scale {scale}")


# Skipped layers: a further call in some of the steps ---------------------------------------------------------------


def _small_transformer() -> nn.Module:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    randomize(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def skipping() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = text_parts(8, CLIPTextModelWithProjection), text_parts(8, CLIPTextModelWithProjection)
        pipe = diffusers.StableDiffusion3Pipeline(
            **first,
            **{f"{name}_2": part for name, part in second.items()},
            tokenizer_3=None,
            text_encoder_3=None,
            vae=image_vae(),
            transformer=_small_transformer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


ATTENTION = "transformer_blocks.1.attn"
SKIP: dict[str, Any] = {
    "skip_guidance_layers": [0],
    "skip_layer_guidance_start": 0.2,  # of 8 steps those from 2 to 5
    "skip_layer_guidance_stop": 0.7,
    "max_sequence_length": 8,
}


class _Branches:
    """Which branch a plain call is of and whether it is full: by the schedule, and where a branch comes anew.

    In a marked run the schedule is of the run's steps, elsewhere of the branch's own since it came.
    """

    def __init__(self, denoiser: nn.Module, *, marked: bool) -> None:
        self._oracles = {skips: HookOracle(denoiser, [ATTENTION]) for skips in (False, True)}
        self._came = {False: 0, True: 0}
        self._last = {False: -2, True: -2}
        self._marked = marked
        self._step = -1
        self.skipping: list[tuple[int, bool]] = []  # step, full?

    def hooked(self, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        skips = inputs.get("skip_layers") is not None
        self._step += not skips  # each step calls the other branch first
        if self._last[skips] != self._step - 1:
            self._came[skips] = self._step
        self._last[skips] = self._step
        since = 0 if self._marked else self._came[skips]
        full = (self._step - since) % INTERVAL == 0 or self._came[skips] == self._step
        if skips:
            self.skipping.append((self._step, full))
        return self._oracles[skips].hooked(full)


@contextmanager
def _branching(denoiser: nn.Module, *, marked: bool = True) -> Iterator[_Branches]:
    branches, stack = _Branches(denoiser, marked=marked), ExitStack()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.enter_context(branches.hooked(kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.close()

    handles = [denoiser.register_forward_pre_hook(enter, with_kwargs=True), denoiser.register_forward_hook(leave)]
    try:
        yield branches
    finally:
        stack.close()
        for handle in handles:
            handle.remove()


def test_skipped_layers_are_those_of_the_plain_pipeline(skipping: Any) -> None:
    expected = _generate(skipping, **SKIP)
    without = _generate(skipping, max_sequence_length=8)
    assert not torch.equal(expected, without)
    fast = lc.transform_pipeline(skipping, lc.Policy())
    for run in range(2):
        assert_bitwise([_generate(fast, **SKIP)], [expected], f"skipping, run {run}")
        assert_bitwise([_generate(fast, max_sequence_length=8)], [without], f"not skipping, run {run}")


def test_cached_skipped_layers_are_those_of_the_hooked_pipeline(skipping: Any) -> None:
    fast = lc.transform_pipeline(skipping, lc.Policy(cache=lc.Cache(cut=ATTENTION, interval=INTERVAL)))
    for start in (0.2, 0.2, 0.3):  # it comes with a full step of the others, and with a reuse step
        arguments = {**SKIP, "skip_layer_guidance_start": start}
        with _branching(skipping.transformer) as branches:
            expected = _generate(skipping, **arguments)
        assert (
            branches.skipping
            == {
                0.2: [(2, True), (3, False), (4, True), (5, False)],
                0.3: [(3, True), (4, True), (5, False)],
            }[start]
        )
        assert not torch.equal(expected, _generate(skipping, **arguments)), "caching changed nothing"
        assert_bitwise([_generate(fast, **arguments)], [expected], f"from {start}")


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "by_timestep"])
def test_a_branch_that_sat_out_steps_comes_back_full(marked: bool) -> None:
    model = _small_transformer()
    steps = [False, True, True, True, False, True, True, True]  # whether the step skips layers in a further call
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=ATTENTION, interval=INTERVAL)))
    with _branching(model, marked=marked) as branches:
        expected = _run(model, steps)
    assert (5, True) in branches.skipping
    assert (2, False) in branches.skipping or (3, False) in branches.skipping
    with lc.marked_run() if marked else nullcontext():
        assert_bitwise(_run(fast, steps), expected)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "by_timestep"])
def test_a_branch_without_what_others_keep_is_full(
    marked: bool, order: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The cut is in the layer that guidance skips: the other branch is cached as ever, this one computed."""
    model, cut = _small_transformer(), "transformer_blocks.0.attn"
    steps = [False, True, True, False, True, True, True]
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, interval=INTERVAL, order=order)))
    alone = lc.transform(copy.deepcopy(model), lc.Policy(cache=lc.Cache(cut=cut, interval=INTERVAL, order=order)))
    with lc.marked_run() if marked else nullcontext():
        cached = iter(_run(alone, [False] * len(steps)))
    plain = _run(model, steps)
    places = [skips for step in steps for skips in ((False, True) if step else (False,))]
    expected = [plain[place] if skips else next(cached) for place, skips in enumerate(places)]
    assert not all(map(torch.equal, expected, plain))

    def ran(which: nn.Module) -> list[torch.Tensor]:
        with lc.marked_run() if marked else nullcontext():
            return _run(which, steps)

    for run in range(2):
        assert_bitwise(ran(fast), expected, f"run {run}")
    (note,) = {record.getMessage() for record in caplog.records if "every step of these calls" in record.getMessage()}
    assert re.search(r"SD3Transformer2DModel is full.*'transformer_blocks\.0\.attn'", note)
    ran_in = Counter((run.branch, run.program) for run in lc.inspect(fast).timeline if run.program != "prologue")
    assert ran_in[0, "reuse"] == len(steps) // INTERVAL
    lc.save(fast, tmp_path / "saved")
    assert_bitwise(ran(lc.load(tmp_path / "saved")), expected, "loaded")


def test_a_cut_that_no_call_has_had_is_refused() -> None:
    fast = lc.transform(_small_transformer(), lc.Policy(cache=lc.Cache(cut="transformer_blocks.0.attn", interval=2)))
    with pytest.raises(CutError, match=r"transformer_blocks\.0\.attn"):
        fast(torch.randn(1, 4, 4, 4), torch.randn(1, 5, 16), torch.randn(1, 16), torch.tensor([900.0]), skip_layers=[0])
    assert not torch.equal(*_run(fast, [False, False]))  # and the next call is as if that had not been


def _run(model: nn.Module, steps: Sequence[bool]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, 4, 4, generator=generator) for _ in steps]
    text, pooled = torch.randn(1, 5, 16, generator=generator), torch.randn(1, 16, generator=generator)
    outputs = []
    for step, skips in enumerate(steps):
        for layers in (None, [0]) if skips else (None,):
            timestep = torch.tensor([900.0 - 100 * step])
            with torch.no_grad():
                outputs += tensors(model(latents[step], text, pooled, timestep, skip_layers=layers))
        lc.step_done()
    return outputs


# Hooks of diffusers that skip layers -------------------------------------------------------------------------------

HOOKS: dict[str, dict[str, bool]] = {
    "blocks": {"skip_attention": True, "skip_ff": True},
    "attention_scores": {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True},
}


def test_hooks_that_skip_layers_are_seen() -> None:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        norm_num_groups=4,
        caption_channels=24,
    )
    randomize(model)
    model.eval()
    make_inputs = ZOO["pixart"].build()[1]
    inputs = make_inputs(0)
    fast = lc.transform(model, lc.Policy())
    plain = plain_step(model, **inputs)
    assert_bitwise(plain_step(fast, **inputs), plain, "before")
    for name, skipped in HOOKS.items():
        apply_layer_skip(fast, LayerSkipConfig(indices=[1], fqn="transformer_blocks", **skipped))
        expected = plain_step(model, **inputs)
        assert not torch.equal(expected[0], plain[0])
        assert_bitwise(plain_step(fast, **inputs), expected, name)
        for module in model.modules():
            if (registry := getattr(module, "_diffusers_hook", None)) is not None:
                registry.remove_hook("layer_skip_hook")
    assert_bitwise(plain_step(fast, **inputs), plain, "after")
