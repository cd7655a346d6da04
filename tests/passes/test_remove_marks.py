"""Marks go; what they marked stays."""

from __future__ import annotations

import torch
from torch import nn

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff
from lightcache_fx.passes.remove_marks import remove_marks

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.same = nn.Identity()

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.same(self.layer(sample)).sin()


MODEL = Model().eval()


def test_golden() -> None:
    given = captured(MODEL, X, mark=["layer", "same"])
    after, result = given.apply(remove_marks)
    assert result.counts == {"marks": 4}
    check_golden(diff(given.graph_module, after), "remove_marks", __file__)


def test_numbers() -> None:
    given = captured(MODEL, X, mark=["layer", "same"])
    after, _ = given.apply(remove_marks)
    assert torch.equal(given.run(after)[0], given.eager()[0])
    assert torch.equal(given.run()[0], given.eager()[0]), "marks are the identity"


def test_not_on_a_graph_without_marks() -> None:
    given = captured(MODEL, X)
    after, result = given.apply(remove_marks)
    assert not result.modified
    assert operators(after) == ["aten.linear.default", "aten.sin.default"]


def test_second_application_does_nothing() -> None:
    after, _ = captured(MODEL, X, mark=["layer", "same"]).apply(remove_marks)
    assert not apply_to(after, remove_marks).modified
