"""Metadata asserts of export go; what they asserted about is what it was."""

from __future__ import annotations

import torch

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff
from lightcache_fx.passes.remove_asserts import remove_asserts

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def _casts(sample: torch.Tensor) -> torch.Tensor:
    hidden = sample.to(torch.float64) * 2  # export guards every cast by an assert
    hidden = hidden.sin().to(torch.bfloat16)
    return hidden.to(torch.float32) + sample


def test_golden() -> None:
    given = captured(_casts, X, normalized=False)
    after, result = given.apply(remove_asserts)
    assert result.counts == {"asserts": 3}
    check_golden(diff(given.graph_module, after), "remove_asserts", __file__)


def test_numbers() -> None:
    given = captured(_casts, X, normalized=False)
    after, _ = given.apply(remove_asserts)
    assert torch.equal(given.run(after)[0], _casts(X))


def test_not_on_a_graph_without_asserts() -> None:
    given = captured(lambda sample: sample.sin() * 2, X, normalized=False)
    after, result = given.apply(remove_asserts)
    assert not result.modified
    assert operators(after) == ["aten.sin.default", "aten.mul.Tensor"]


def test_second_application_does_nothing() -> None:
    after, _ = captured(_casts, X, normalized=False).apply(remove_asserts)
    assert not apply_to(after, remove_asserts).modified
