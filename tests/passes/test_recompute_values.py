"""A value is computed once for each of its readers."""

from __future__ import annotations

from functools import partial

import torch

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.passes.recompute_values import recompute_values


def shared() -> Captured:
    def model(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = sample.exp()
        hidden = wide.sin()
        return hidden.sum(), hidden.cos() + hidden

    return captured(model, torch.randn(3, 4))


def test_golden() -> None:
    given = shared()
    after, result = given.apply(partial(recompute_values, names=["sin"]))
    assert result.counts == {"copies": 2}
    check_golden(diff(given.graph_module, after), "recompute_values", __file__)


def test_a_chain_is_copied_whole() -> None:
    given = shared()
    after, result = given.apply(partial(recompute_values, names=["exp", "sin"]))
    assert result.counts == {"copies": 4}
    assert all(len(node.users) == 1 for node in after.graph.nodes if node.name.startswith(("exp", "sin")))


def test_numbers() -> None:
    given = shared()
    after, _ = given.apply(partial(recompute_values, names=["exp", "sin"]))
    assert all(map(torch.equal, given.run(after), given.run()))


def test_what_is_returned_keeps_its_value() -> None:
    given = captured(lambda sample: ((hidden := sample.exp()), hidden + 1), torch.randn(3))
    after, result = given.apply(partial(recompute_values, names=["exp"]))
    assert result.counts == {"copies": 1}
    assert all(map(torch.equal, given.run(after), given.run()))


def test_one_reader_or_no_such_name_is_passed_over() -> None:
    _, result = shared().apply(partial(recompute_values, names=["cos", "nothing"]))
    assert not result.modified


def test_a_second_application_does_nothing() -> None:
    names = ["sin"]
    _, result = shared().apply(partial(recompute_values, names=names), partial(recompute_values, names=names))
    assert not result.modified
