"""Schedulers for the trained small models, which tell time by `log(sigma) / 4`, and what caching costs under each.

A variance-preserving scheduler names its discrete training steps instead. Both scale their input alike and predict the
same v, so the one time is all that has to be translated: an Euler step from either notation is the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import nn

import lightcache_fx as lc
from examples.small_model import sample, sample_dit
from examples.small_model.captions import caption
from lightcache_fx.cli.stages import denoiser_of
from lightcache_fx.quality import compare_videos

SCHEDULERS: Mapping[str, tuple[type[Any], dict[str, Any]]] = {
    "Euler": (EulerDiscreteScheduler, {}),
    "DDIM": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "Heun": (HeunDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""The variance-preserving noise that latent diffusion models are trained with; its sigmas lie within what these saw."""


def continuous_times() -> torch.Tensor:
    """`log(sigma) / 4` of each discrete training step: float32 (steps,)."""
    left = torch.from_numpy(DDIMScheduler(**NOISE).alphas_cumprod.double().numpy())
    return (((1 - left) / left).sqrt().log() / 4).float()


class DiscreteTimes(nn.Module):
    """A denoiser of continuous times, called with discrete ones; whatever else is asked of it is asked of the denoiser.

    Args:
        denoiser: its second argument, `timestep`, is `log(sigma) / 4`.
    """

    times: torch.Tensor

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("times", continuous_times(), persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(
        self,
        sample: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        *,
        hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The latent has either of the names that models give it; times between two steps are interpolated."""
        assert timestep is not None
        times = self.times
        at = timestep.to(torch.float32).clamp(0, len(times) - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=len(times) - 1)
        latent = sample if hidden_states is None else hidden_states
        return self.denoiser(latent, torch.lerp(times[below], times[above], at - below), **kwargs)


def with_scheduler(pipe: Any, name: str) -> Any:
    """A small pipeline of the same networks whose scheduler is another."""
    kind, settings = SCHEDULERS[name]
    scheduler = kind(**NOISE, prediction_type="v_prediction", timestep_spacing="trailing", **settings)
    part = "unet" if "unet" in pipe.components else "transformer"
    found = type(pipe)(**{**pipe.components, part: DiscreteTimes(pipe.components[part]).eval(), "scheduler": scheduler})
    found.set_progress_bar_config(disable=True)
    return found


@dataclass(frozen=True)
class Trained:
    """A trained small model, and what of it is kept.

    Attributes:
        load: its pipeline.
        cut: of the denoiser inside `DiscreteTimes`.
        generate: a held-out clip's frames by its index: uint8 (frames, height, width, 3).
    """

    load: Callable[[], Any]
    cut: int | lc.Residual
    generate: Callable[[Any, int, int], Any]


def unet_clip(pipe: Any, index: int, steps: int) -> Any:
    """A held-out clip by its index: uint8 (frames, height, width, 3)."""
    clip = sample.generate(pipe, sample.heldout_clip(index), steps=steps, max_guidance_scale=1.5, seed=index)
    return clip.transpose(0, 2, 3, 1)


def transformer_clip(pipe: Any, index: int, steps: int) -> Any:
    """As `unet_clip`, of the text-to-video model."""
    prompt = caption(sample_dit.heldout_clips(index + 1)[index])
    clip = sample_dit.generate(pipe, prompt, steps=steps, guidance_scale=2.0, seed=index)
    return clip.transpose(0, 2, 3, 1)


MODELS: Mapping[str, Trained] = {
    "svd-sprites": Trained(sample.load_pipeline, 0, unet_clip),
    "latte-sprites": Trained(
        sample_dit.load_pipeline,
        lc.Residual(first="denoiser.transformer_blocks.1", last="denoiser.transformer_blocks.5"),
        transformer_clip,
    ),
}


def measure_schedulers(
    names: Sequence[str], intervals: Sequence[int], *, clips: int, steps: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """By model and scheduler: PSNR of each interval's videos against those of every step in full, and calls made."""
    found: dict[str, Any] = {}
    for model, trained in MODELS.items():
        for name in names:
            pipe, rows = with_scheduler(trained.load(), name), []
            plain = [trained.generate(pipe, index, steps) for index in range(clips)]
            for interval in intervals:
                cache = lc.Cache(cut=trained.cut, interval=interval)
                fast = lc.transform_pipeline(pipe, lc.Policy(cache=cache))
                pairs = zip(plain, [trained.generate(fast, index, steps) for index in range(clips)], strict=True)
                scores = [compare_videos(*pair, measures=("psnr",)) for pair in pairs]
                report = lc.inspect(denoiser_of(fast))
                calls = report.counts["full"] + report.counts["reuse"]
                rows.append(
                    {
                        "interval": interval,
                        "psnr": float(np.mean([score.psnr.mean for score in scores])),
                        "calls_per_step": calls / (clips * steps),
                        "flop_speedup": report.plan.flop_bound_speedup(calls // clips),
                    }
                )
            found.setdefault(model, {})[name] = rows
            log(f"{model}, {name}: " + ", ".join(f"{row['interval']}: {row['psnr']:.1f} dB" for row in rows))
    return found
