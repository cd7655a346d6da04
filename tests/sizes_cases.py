"""Models and calls whose sizes vary, for the tests of dynamic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oracle import assert_bitwise, plain_step
from toys import latent, prompt

TIMES = [981, 884, 787, 690, 593, 496]


def entries(module: nn.Module) -> list[Any]:
    return list(module._lightcache.runtime.repertoire.compiled.values())


def is_dynamic(module: nn.Module) -> list[bool]:
    """Of each size in the order of last use: whether its programs are those of sizes that vary."""
    return [made.signature.dynamic is not None for made in entries(module)]


def at_batch(batch: int, seed: int = 0, time: float = 981) -> dict[str, Any]:
    return {"sample": latent(seed, batch), "timestep": time, "encoder_hidden_states": prompt(seed, batch)}


def check(model: nn.Module, transformed: nn.Module, **inputs: Any) -> None:
    assert_bitwise(plain_step(transformed, **inputs), plain_step(model, **inputs))


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def toy(function: Callable[..., torch.Tensor]) -> nn.Module:
    """A model of the latent `x`, the timestep `t` and a conditioning `c`."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
            return function(self.layer(x), c) * t

    return Toy().eval().requires_grad_(False)


def of_toy(*shape: int, c: tuple[int, ...] | None = None, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    given = {"x": torch.randn(shape, generator=draw), "t": torch.tensor(2.0)}
    return given if c is None else {**given, "c": torch.randn(c, generator=draw)}


class Video(nn.Module):
    """Attention within frames and between them. x (B, F, L, 4) -> the same; frames are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.between, self.out = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(8, 4)
        self.register_buffer("places", torch.randn(16, 4))

    def attend(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x + F.scaled_dot_product_attention(*layer(x).chunk(3, dim=-1))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        batch, frames, tokens, width = x.shape
        skip = x + self.places[:frames, None] + c.mean(1)[:, None, None]
        x = self.attend(self.inside, skip.reshape(batch * frames, tokens, width))
        x = x.reshape(batch, frames, tokens, width).transpose(1, 2).reshape(batch * tokens, frames, width)
        x = self.attend(self.between, x).reshape(batch, tokens, frames, width).transpose(1, 2)
        return self.out(torch.cat([x, skip], dim=-1)) * timestep


def of_video(batch: int, frames: int, words: int = 3, step: int = 0, seed: int = 0) -> dict[str, Any]:
    draw, fixed = torch.Generator().manual_seed(100 * seed + step), torch.Generator().manual_seed(seed)
    x, c = torch.randn(batch, frames, 5, 4, generator=draw), torch.randn(batch, words, 4, generator=fixed)
    return {"x": x, "timestep": torch.tensor(9.0 - step), "c": c}


def video() -> nn.Module:
    return Video().eval().requires_grad_(False)


def batched(make_inputs: Callable[..., dict[str, Any]], batch: int, step: int) -> dict[str, Any]:
    """Inputs of another batch size: rows of those that the zoo makes, of other seeds."""
    made = [make_inputs(seed, step) for seed in range(batch)]

    def joined(*values: Any) -> Any:
        if isinstance(values[0], torch.Tensor) and values[0].dim():
            return torch.cat([value[:1] for value in values])
        if isinstance(values[0], dict):
            return {key: joined(*(value[key] for value in values)) for key in values[0]}
        return values[0]

    return {key: joined(*(one[key] for one in made)) for key in made[0]}
