"""Guidance in the ways that pipelines have it: each branch has a state of its own, and none reuses an old one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import lightcache_fx as lc
from oracle import HookOracle, assert_bitwise, plain_step, scheduled
from pipelines import _image_vae, _text_parts
from zoo import ZOO, run_inputs

NUM_STEPS = 6
INTERVAL = 2


def perturbed() -> Any:
    """Perturbed attention: the pipeline puts its own processors into the denoiser while it runs."""
    pipe = diffusers.StableDiffusionPAGPipeline(
        **_text_parts(),
        vae=_image_vae(),
        unet=ZOO["sd"].build()[0],
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        pag_applied_layers="mid",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_perturbed(pipe: Any, pag_scale: float, seed: int = 0) -> list[torch.Tensor]:
    output = pipe(
        prompt=f"box {seed}",
        negative_prompt="grey",
        pag_scale=pag_scale,
        height=32,
        width=32,
        num_inference_steps=NUM_STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    return [output.images]


def test_perturbed_attention() -> None:
    """Three branches in a batch; without the third another capture, whose processors are the model's own again."""
    pipe = perturbed()
    whole = {scale: with_perturbed(pipe, scale) for scale in (3.0, 0.0)}
    assert not torch.equal(whole[3.0][0], whole[0.0][0])
    exact = lc.transform_pipeline(pipe, lc.Policy())
    kept = "up_blocks.3.attentions.1"
    fast = lc.transform_pipeline(pipe, lc.Policy.deepcache(INTERVAL))
    processors = {name: type(one) for name, one in pipe.unet.attn_processors.items()}
    for scale in (3.0, 0.0, 3.0):
        assert_bitwise(with_perturbed(exact, scale), whole[scale], f"whole, {scale}")
        with scheduled(pipe.unet, HookOracle(pipe.unet, [kept]), INTERVAL):
            expected = with_perturbed(pipe, scale)
        assert not torch.equal(expected[0], whole[scale][0])
        assert_bitwise(with_perturbed(fast, scale), expected, f"cached, {scale}")
    assert {name: type(one) for name, one in pipe.unet.attn_processors.items()} == processors
    assert lc.inspect(fast.unet).counts["reuse"] == 3 * NUM_STEPS // 2


def skipping() -> Any:
    """Skip-layer guidance: in a part of the steps a further call leaves layers out."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=ZOO["sd3"].build()[0],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_skipped(pipe: Any, start: float, seed: int = 0) -> list[torch.Tensor]:
    """Layer 2 is left out in steps from behind `start` on."""
    source = torch.Generator().manual_seed(seed)
    embeds = {
        "prompt_embeds": torch.randn(1, 7, 24, generator=source),
        "negative_prompt_embeds": torch.randn(1, 7, 24, generator=source),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=source),
        "negative_pooled_prompt_embeds": torch.randn(1, 16, generator=source),
    }
    output = pipe(
        **embeds,
        height=64,
        width=64,
        num_inference_steps=NUM_STEPS,
        skip_guidance_layers=[2],
        skip_layer_guidance_start=start,
        skip_layer_guidance_stop=1.0,
        generator=source,
        output_type="latent",
    )
    return [output.images]


@contextmanager
def each_by_itself(denoiser: nn.Module, path: str) -> Iterator[list[tuple[str, bool]]]:
    """Hooks for two branches with a state each; a branch that keeps nothing yet is full. Yields what each call was."""
    oracles = {name: HookOracle(denoiser, [path]) for name in ("both", "skipped")}
    made: list[tuple[str, bool]] = []
    steps = -1
    stack = ExitStack()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal steps
        name = "both" if kwargs.get("skip_layers") is None else "skipped"
        steps += name == "both"
        full = steps % INTERVAL == 0 or name not in dict(made)
        made.append((name, full))
        stack.enter_context(oracles[name].hooked(full))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.close()

    handles = [
        denoiser.register_forward_pre_hook(enter, with_kwargs=True),
        denoiser.register_forward_hook(leave),
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("start", [0.45, 0.2])
def test_skipped_layers(start: float) -> None:
    """The further branch comes in the midst of a run, at a step that the schedule would reuse (3) or not (2)."""
    pipe = skipping()
    whole = with_skipped(pipe, start)
    assert_bitwise(with_skipped(lc.transform_pipeline(pipe, lc.Policy()), start), whole, "whole")
    kept = "transformer_blocks.1"
    fast = lc.transform_pipeline(pipe, lc.Policy(cache=lc.Cache(cut=kept, interval=INTERVAL)))
    for seed in (0, 1, 0):
        with each_by_itself(pipe.transformer, kept) as made:
            expected = with_skipped(pipe, start, seed)
        assert_bitwise(with_skipped(fast, start, seed), expected, f"cached, seed {seed}")
    skipped = [full for name, full in made if name == "skipped"]
    assert skipped == ([True, True, False] if start == 0.45 else [True, False, True, False])
    ran = [(run.branch, run.program) for run in lc.inspect(fast.transformer).timeline if run.program != "prologue"]
    assert [program == "full" for _, program in ran] == [full for _, full in made]


def test_a_branch_that_sat_out_steps_begins_anew() -> None:
    """Of two branches one is called at some steps only: what it kept before is out of step by then."""
    model, make_inputs = ZOO["wan"].build()
    steps = run_inputs(make_inputs, 0, 8)
    other = run_inputs(make_inputs, 7, 1)[0]["encoder_hidden_states"]
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut="blocks.1", interval=4)))
    oracles = [HookOracle(model, ["blocks.1"]) for _ in range(2)]
    full_at = [[0, 4], [0, 5]]
    called_at = [range(8), [0, 1, 5, 6]]
    with lc.marked_run(8):
        for step, inputs in enumerate(steps):
            for branch, given in enumerate((inputs, {**inputs, "encoder_hidden_states": other})):
                if step in called_at[branch]:
                    expected = oracles[branch].step(step in full_at[branch], **given)
                    with lc.branch_name(str(branch)):
                        assert_bitwise(plain_step(fast, **given), expected, f"step {step}, branch {branch}")
            lc.step_done()


def test_layers_skipped_by_hooks() -> None:
    """Hooks of diffusers that leave layers out replace forwards below: the capture has them, and sees them go."""
    from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

    model, make_inputs = ZOO["wan"].build()
    inputs = run_inputs(make_inputs, 0, 1)[0]
    whole = plain_step(model, **inputs)
    fast = lc.transform(model)
    assert_bitwise(plain_step(fast, **inputs), whole, "before")
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks"))
    skipped = plain_step(model, **inputs)
    assert not torch.equal(skipped[0], whole[0])
    assert_bitwise(plain_step(fast, **inputs), skipped, "with the hooks")
    HookRegistry.check_if_exists_or_initialize(model.blocks[1]).remove_hook("layer_skip_hook")
    assert_bitwise(plain_step(fast, **inputs), whole, "after")
