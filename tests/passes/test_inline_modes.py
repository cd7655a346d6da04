"""Regions without gradients or without autocast are inlined; a region that switches autocast on stays."""

from __future__ import annotations

import torch

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff
from lightcache_fx.passes.inline_modes import inline_modes

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def _regions(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", enabled=False):  # (2), with two results
        hidden, gate = sample.sin(), sample.cos()
    with torch.enable_grad():  # (1): captures run without gradients
        hidden = hidden * gate + 1
    return hidden, gate * 2


def _nested(sample: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        hidden = sample.sin()
        with torch.enable_grad():
            hidden = hidden * 3
            with torch.autocast("cpu", enabled=False):
                hidden = hidden.cos() - 1
        hidden = hidden + sample
    with torch.autocast("cpu", enabled=False):
        return hidden.exp()


def _switched_on(sample: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return sample @ sample.T


def test_golden() -> None:
    given = captured(_regions, X, normalized=False)
    after, result = given.apply(inline_modes)
    assert result.counts == {"regions": 2}
    check_golden(diff(given.graph_module, after), "inline_modes", __file__)


def test_numbers() -> None:
    given = captured(_regions, X, normalized=False)
    after, _ = given.apply(inline_modes)
    assert all(map(torch.equal, given.run(after), _regions(X)))


def test_regions_in_regions() -> None:
    given = captured(_nested, X, normalized=False)
    after, _ = given.apply(inline_modes)
    assert not any("wrap_with" in name for name in operators(after))
    assert torch.equal(given.run(after)[0], _nested(X))


def test_not_where_autocast_is_switched_on() -> None:
    given = captured(_switched_on, X, normalized=False)
    after, result = given.apply(inline_modes)
    assert not result.modified
    assert any("wrap_with_autocast" in name for name in operators(after))
    (found,) = given.run(after)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, _switched_on(X))


def test_second_application_does_nothing() -> None:
    after, _ = captured(_regions, X, normalized=False).apply(inline_modes)
    assert not apply_to(after, inline_modes).modified
