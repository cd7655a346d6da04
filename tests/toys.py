"""Tiny denoisers that several tests share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lightcache_fx as lc


class Denoiser(nn.Module):
    """Three layers and a skip: `skip = inner(x)`, `up = middle(skip, t, prompt)`, `outer([up, skip])`.

    Shapes: sample (B, 4), timestep () or (B,), encoder_hidden_states (B, 3) -> (B, 4). Cut 0 keeps `middle`.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.middle = Middle()
        self.outer = nn.Linear(16, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.eval().requires_grad_(False)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, scale: float = 1.0
    ) -> torch.Tensor:
        skip = self.inner(sample)
        up = self.middle(skip, timestep, encoder_hidden_states)
        return self.outer(torch.cat([up * scale, skip], dim=-1))


class Middle(nn.Module):
    """What a reuse step leaves out; `embed` depends on the prompt alone, so it is hoisted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 8))
        self.layer = nn.Linear(8, 8)

    def forward(
        self, hidden: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        phase = torch.sin(torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1) / 100)
        return self.layer(torch.tanh(hidden * phase.to(hidden.dtype) + self.embed(encoder_hidden_states)))


class Tower(nn.Module):
    """A skip around blocks whose weights are large beside its activations; what `prompt` computes is hoisted.

    Shapes: sample (B, 4), timestep () or (B,), encoder_hidden_states (B, 3) -> (B, 4). Cut 0 keeps the last block.
    """

    def __init__(self, num_blocks: int = 6, width: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.prompt = nn.Sequential(nn.Linear(3, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(num_blocks)
        )
        self.outer = nn.Linear(2 * width, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        self.eval().requires_grad_(False)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        skip = self.inner(sample)
        phase = torch.sin(timestep.to(sample.dtype).reshape(-1, 1) / 100)
        up = skip * phase + self.prompt(encoder_hidden_states)
        for block in self.blocks:
            up = up + block(up)
        return self.outer(torch.cat([up, skip], dim=-1))


def latent(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(1000 + seed))


class Watched:
    """A transformed module whose calls say which program ran, and are compared with eager where that was `full`."""

    def __init__(self, model: nn.Module, policy: lc.Policy) -> None:
        self.model = model
        self.transformed = lc.transform(model, policy)

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.transformed._lightcache.runtime.counts)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """Call it; returns `full` or `reuse`. A full step must equal the eager model, bitwise."""
        before = self.counts
        with torch.no_grad():
            self.output = self.transformed(*args, **kwargs)
            after = self.counts
            (kind,) = [name for name in ("full", "reuse") if after.get(name, 0) > before.get(name, 0)]
            if kind == "full":
                expected = self.model(*args, **kwargs)
                assert torch.equal(self.output, expected), "a full step differs from eager"
        return kind

    def run(self, times: Any, conditioning: torch.Tensor, *, seed: int = 0) -> list[str]:
        """One generation of fresh latents."""
        return [
            self(latent(100 * seed + step, conditioning.shape[0]), time, conditioning)
            for step, time in enumerate(times)
        ]


class Resnet(nn.Module):
    """Two norms, two convolutions and a residual, behind a convolution that makes the residual the program's own.

    A budget cuts it, with results over inputs and parts written directly. Shapes: sample (B, 1, H, W) -> the same; a
    timestep is added.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, 8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.leave = nn.Conv2d(8, 1, 3, padding=1)
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        hidden = residual = self.enter(sample)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = conv(F.silu(norm(hidden)))
        result: torch.Tensor = self.leave(residual + hidden)
        return result if timestep is None else result + timestep
