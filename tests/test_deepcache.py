"""Whole runs against the PyPI package `DeepCache` 0.1.1, on real schedulers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

import lightcache_fx as lc
from oracle import assert_bitwise, measure_helper_bytes
from zoo import ZOO, Inputs

NUM_STEPS = 20
INTERVAL = 3
BRANCHES = [0, 1, 2]
# What branch 0, 1, 2 keep: docs/deepcache_branches.md.
KEPT_MODULES = {
    "sd": ["up_blocks.3.attentions.1", "up_blocks.3.attentions.0", "up_blocks.2"],
    "svd": ["up_blocks.2.attentions.1", "up_blocks.2.attentions.0", "up_blocks.1"],
    "modelscope": ["up_blocks.2.temp_attentions.1", "up_blocks.2.temp_attentions.0", "up_blocks.1"],
    "animatediff": ["up_blocks.2.motion_modules.1", "up_blocks.2.motion_modules.0", "up_blocks.1"],
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "sd": DDIMScheduler,
    "svd": lambda: EulerDiscreteScheduler(prediction_type="v_prediction"),
    "modelscope": DDIMScheduler,
    "animatediff": lambda: EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="linear"),
}


def _denoise(unet: nn.Module, scheduler: Any, inputs: Inputs) -> list[torch.Tensor]:
    """Every predicted noise of a run and its final latent. SVD's conditioning latent stays as drawn."""
    conditioning = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    channels = unet.config.out_channels
    frame_first = inputs["sample"].ndim == 5 and inputs["sample"].shape[2] == unet.config.in_channels
    channel_dim = 2 if frame_first else 1
    latent, image_latent = inputs["sample"].split([channels, unet.config.in_channels - channels], dim=channel_dim)
    latent = latent * scheduler.init_noise_sigma
    trace = []
    for timestep in scheduler.timesteps:
        sample = torch.cat([scheduler.scale_model_input(latent, timestep), image_latent], dim=channel_dim)
        with torch.no_grad():
            noise = unet(sample, timestep, **{**conditioning, "return_dict": False})[0]
        latent = scheduler.step(noise, timestep, latent).prev_sample
        trace.append(noise)
    return [*trace, latent]


def _scheduler(name: str) -> Any:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def _with_package(name: str, model: nn.Module, branch: int, inputs: Inputs) -> tuple[list[torch.Tensor], int]:
    """The package's run, and the bytes it holds. It patches the U-Net's methods, hence the copy."""
    unet, scheduler = copy.deepcopy(model), _scheduler(name)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=branch)
    helper.enable()
    trace = _denoise(unet, scheduler, inputs)
    return trace, measure_helper_bytes(helper)[1]


def _output_bytes(model: nn.Module, path: str, inputs: Inputs) -> int:
    sizes: list[int] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: sizes.append(_nbytes(output)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return sizes[0]


def _nbytes(output: Any) -> int:
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor.nbytes


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        pytest.param(name, branch, marks=[pytest.mark.slow] if branch and name != "sd" else [])
        for name, branch in itertools.product(KEPT_MODULES, BRANCHES)
    ],
)
def test_run_equals_the_package(name: str, branch: int) -> None:
    model, make_inputs = ZOO[name].build()
    inputs = make_inputs(0)
    expected, helper_bytes = _with_package(name, model, branch, inputs)
    plain = _denoise(model, _scheduler(name), inputs)
    assert not torch.equal(plain[1], expected[1]), "the package cached nothing"

    transformed = lc.transform(model, lc.Policy.deepcache(INTERVAL, branch))
    # Bitwise at every branch: each one is a single cut (the requirement is 1e-5 of the scale for 1 and 2).
    assert_bitwise(_denoise(transformed, _scheduler(name), inputs), expected, f"{name}, branch {branch}")

    kept_bytes = lc.inspect(transformed).kept_bytes
    assert kept_bytes == _output_bytes(model, KEPT_MODULES[name][branch], inputs)
    assert kept_bytes < helper_bytes / 5
