"""Inference dropout goes; dropout that draws random numbers stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff
from lightcache_fx.passes.remove_dropout import remove_dropout

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def _every_kind(sample: torch.Tensor) -> torch.Tensor:
    hidden = F.dropout(sample * 2, 0.1, training=False)
    hidden = F.dropout2d(hidden.sin(), 0.2, training=False)
    hidden = F.alpha_dropout(hidden.cos(), 0.3, training=False)
    return F.dropout(hidden + sample, 0.0, training=True)


def _random(sample: torch.Tensor) -> torch.Tensor:
    return F.dropout(sample * 2, 0.5, training=True) + 1


def test_golden() -> None:
    given = captured(_every_kind, X, normalized=False)
    after, result = given.apply(remove_dropout)
    assert result.counts == {"dropouts": 4}
    check_golden(diff(given.graph_module, after), "remove_dropout", __file__)


def test_numbers() -> None:
    given = captured(_every_kind, X, normalized=False)
    after, _ = given.apply(remove_dropout)
    assert torch.equal(given.run(after)[0], _every_kind(X))


def test_not_where_random_numbers_are_drawn() -> None:
    given = captured(_random, X, normalized=False)
    after, result = given.apply(remove_dropout)
    assert not result.modified
    assert "aten.dropout.default" in operators(after)
    torch.manual_seed(3)
    expected = _random(X)
    torch.manual_seed(3)
    assert torch.equal(given.run(after)[0], expected)


def test_second_application_does_nothing() -> None:
    after, _ = captured(_every_kind, X, normalized=False).apply(remove_dropout)
    assert not apply_to(after, remove_dropout).modified
