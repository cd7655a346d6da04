"""The route behind export: what real-tensor tracing captures, and what it bakes in and is refused for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightcache_fx as lc


class CountFromABuffer(nn.Module):
    """Reads a constant through numpy, which no fake tensor allows; the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("count", torch.tensor(2.0))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for _ in range(int(self.count.numpy())):
            sample = self.layer(sample)
        return sample * timestep


class BranchThroughNumpy(nn.Module):
    """Decides by the sign of the latent's sum, where no tracer sees it."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.detach().numpy().sum() > 0 else sample * timestep


class BranchOnATensor(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.sum() > 0 else sample * timestep


def test_real_tensors_are_traced_where_export_fails() -> None:
    torch.manual_seed(0)
    model = CountFromABuffer().eval()
    transformed = lc.transform(model)
    for seed in range(3):
        sample = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(transformed(sample, torch.tensor(4.0)), model(sample, torch.tensor(4.0)))
    assert lc.inspect(transformed).route == "trace"


@pytest.mark.parametrize("model", [BranchThroughNumpy(), BranchOnATensor()], ids=lambda m: type(m).__name__)
def test_a_decision_by_the_example_is_refused(model: nn.Module) -> None:
    sample = torch.ones(3, 8)
    with pytest.raises(lc.errors.CaptureError, match=type(model).__name__) as error:
        lc.transform(model.eval())(sample, torch.tensor(4.0))
    assert "by trace" in str(error.value)
    assert torch.equal(model(sample, torch.tensor(4.0)), sample * 2)
