"""A value is computed once for each pass over it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.passes.recompute_values import passes_over, recompute_values

CHAIN = ["exp", "sin", "relu", "add", "sub", "mul"]


def two_sums() -> Captured:
    """The second sum depends on the first, and reads what the first read, along two ways."""

    def model(sample: torch.Tensor) -> torch.Tensor:
        wide = sample.exp()
        hidden = wide.sin().relu() + wide
        return ((hidden - hidden.sum()) * hidden).sum()

    return captured(model, torch.randn(3, 4))


def test_golden() -> None:
    given = two_sums()
    after, result = given.apply(partial(recompute_values, names=CHAIN))
    assert result.counts == {"copies": 4, "moves": 0}
    check_golden(diff(given.graph_module, after), "recompute_values", __file__)


def test_a_pass_makes_a_value_once() -> None:
    """`exp` and `add` have two readers in either pass; a copy for each would double with every such step."""
    given = two_sums()
    graph = given.graph_module.graph
    streamed = {node for node in graph.nodes if node.name in CHAIN}
    assert [[node.name for node in readers] for readers in passes_over(graph, streamed)] == [["sum_1"], ["sum_2"]]


def test_numbers() -> None:
    given = two_sums()
    after, _ = given.apply(partial(recompute_values, names=CHAIN))
    assert all(map(torch.equal, given.run(after), given.run()))


def test_what_reads_one_after_the_other_reads_the_same_copy_and_a_third_pass_its_own() -> None:
    def model(sample: torch.Tensor) -> torch.Tensor:
        hidden = sample.exp().sin()
        first = hidden.sum()
        second = (hidden * first).sum()
        return (hidden * second).sum()

    given = captured(model, torch.randn(3, 4))
    after, result = given.apply(partial(recompute_values, names=["exp", "sin"]))
    assert result.counts == {"copies": 4, "moves": 0}
    assert all(len(node.users) == 1 for node in after.graph.nodes if node.name.startswith(("exp", "sin")))
    assert all(map(torch.equal, given.run(after), given.run()))


def test_a_large_value_between_two_readers_parts_them() -> None:
    def model(sample: torch.Tensor) -> torch.Tensor:
        hidden = sample.exp()
        first = hidden.sum()
        other = F.pad(sample, (4, 4)).cos().sum()
        return hidden.mean() + first + other

    given = captured(model, torch.randn(3, 4))
    _, result = given.apply(partial(recompute_values, names=["exp"]))
    assert result.counts["copies"] == 1


def test_what_is_made_early_moves_to_its_reader() -> None:
    given = captured(lambda sample: (wide := sample.exp(), sample.sin().sum() + wide.sum())[1], torch.randn(3, 4))
    after, result = given.apply(partial(recompute_values, names=["exp"]))
    assert result.counts == {"copies": 0, "moves": 1}
    assert [n.name for n in after.graph.nodes if n.op == "call_function"][:3] == ["sin", "sum_1", "exp"]
    assert all(map(torch.equal, given.run(after), given.run()))


def test_what_is_returned_keeps_its_value() -> None:
    given = captured(lambda sample: ((hidden := sample.exp()), (hidden - hidden.sum()).sum()), torch.randn(3))
    _, result = given.apply(partial(recompute_values, names=["exp"]))
    assert not result.modified


def test_one_pass_or_no_such_name_is_passed_over() -> None:
    _, result = two_sums().apply(partial(recompute_values, names=["sub", "nothing"]))
    assert not result.modified


def test_a_second_application_does_nothing() -> None:
    _, result = two_sums().apply(partial(recompute_values, names=CHAIN), partial(recompute_values, names=CHAIN))
    assert not result.modified
