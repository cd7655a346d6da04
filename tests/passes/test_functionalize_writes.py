"""Writes in place become values: each is what eager makes it, and nothing else is traced again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import fx
from torch._guards import detect_fake_mode
from torch.export import Dim, ExportedProgram

import lightcache_fx as lc
from golden import check_golden
from graphs import apply_to, as_module, captured, operators
from lightcache_fx import diff
from lightcache_fx.errors import CaptureError
from lightcache_fx.graphs import GraphInput, placeholders, writes_in_place
from lightcache_fx.passes.base import PassResult
from lightcache_fx.passes.functionalize_writes import functionalize_writes
from oracle import assert_bitwise, plain_step

Tensors = tuple[torch.Tensor, ...]


def inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


def exported(function: Callable[..., Any]) -> tuple[fx.GraphModule, Tensors]:
    """The graph as export leaves it, and the constants that it takes before its inputs."""
    program = torch.export.export(as_module(function), inputs(0), strict=False)
    constants = tuple(program.constants.values())
    for index, node in enumerate(placeholders(program.graph_module.graph)):
        kind = "constant" if index < len(constants) else "user"
        node.meta["lightcache_input"] = GraphInput(kind, node.name, "latent")  # type: ignore[arg-type]
    assert writes_in_place(program.graph_module.graph)
    return program.graph_module, constants


def assert_functional(function: Callable[..., Any]) -> tuple[fx.GraphModule, PassResult]:
    """The pass makes the graph functional, and it computes what the function does."""
    graph_module, constants = exported(function)
    result = apply_to(graph_module, functionalize_writes)
    assert result.modified
    assert not writes_in_place(graph_module.graph)
    detect_fake_mode(
        [node.meta["val"] for node in graph_module.graph.nodes if "val" in node.meta]
    )  # raises for several
    for seed in (1, 2):
        expected = function(*inputs(seed))
        found = graph_module(*constants, *inputs(seed))
        assert_bitwise(list(found), list(expected) if isinstance(expected, tuple) else [expected])
    return graph_module, result


def rotary(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(sample)
    out[..., 0::2] = sample[..., 0::2] * other[..., 1::2] - sample[..., 1::2]
    out[..., 1::2] = sample[..., 1::2] * other[..., 0::2] + sample[..., 0::2]
    return out.sin()


def versions(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one = sample * 2
    early = one + other
    one.add_(early)
    flat = one.view(-1)
    flat.mul_(3)
    return one, early, flat, flat[3:].exp()


def a_view_from_before(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one = sample + 1
    column, late = one[:, 1], one.t()[2:]
    before = column * 2
    one[1].copy_(other[0])
    between = column * 2
    late.clamp_(min=0)
    return before, between, column * 2, late, one


def two_at_once(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one, two = sample.clone(), other.clone()
    one[0] = two[1]
    two[1:3] += one[0:2]
    one[2] = two[2] * 2
    return one, two, one @ two.t()


def copies_and_views(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one = sample + other
    copied, viewed = one.t().reshape(-1), one.reshape(-1)
    same, cast = one.contiguous(), one.to(torch.float64)
    copied += 1
    viewed *= 2
    same -= 3
    return one, copied, viewed, same, cast


def unannotated_alias(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one = sample + other
    same = F.dropout(one, 0.5, training=False)
    one += 1
    return same * 2, one


def scattered(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one = sample + 0
    one[torch.tensor([0, 2])] = other[:2]
    one.masked_fill_(other > 0, 7.0)
    parts = one.unbind(0)
    parts[1].fill_(2.0)
    left, _ = one.chunk(2, dim=1)
    left.zero_()
    return one, left


def only_a_constant(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """PyTorch detaches a tensor that is made of Python data in place."""
    return sample * other + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def from_nothing(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    one = torch.zeros(4, 6)
    one[1:3] = 1.0
    return sample + one


def detached_first(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    one = (sample * 2).detach_()
    one[0] = other[0]
    return one.exp()


FUNCTIONS = [
    only_a_constant,
    from_nothing,
    detached_first,
    rotary,
    versions,
    a_view_from_before,
    two_at_once,
    copies_and_views,
    unannotated_alias,
    scattered,
]


def test_golden() -> None:
    before, _ = exported(rotary)
    after, _ = assert_functional(rotary)
    check_golden(diff(before, after), "functionalize_writes", __file__)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers(function: Callable[..., Any]) -> None:
    _, result = assert_functional(function)
    assert (result.counts["writes"] > 0) == (function is not only_a_constant)
    assert result.counts["detached"] == (function in (only_a_constant, scattered))


@pytest.mark.parametrize("function", [rotary, versions, two_at_once, unannotated_alias, detached_first])
def test_numbers_at_other_sizes(function: Callable[..., Any]) -> None:
    """Where sizes are symbols, the result holds for all of them."""
    open_ = ({0: Dim.AUTO}, {0: Dim.AUTO})
    program = torch.export.export(as_module(function), inputs(0), strict=False, dynamic_shapes=open_)
    graph = program.graph_module.graph
    assert functionalize_writes(graph).modified
    assert not writes_in_place(graph)
    program.graph_module.recompile()
    for batch in (4, 7, 3):
        given = [torch.cat([tensor, tensor])[:batch] for tensor in inputs(batch)]
        expected = function(*given)
        assert_bitwise(
            list(program.graph_module(*given)), list(expected) if isinstance(expected, tuple) else [expected]
        )


def test_not_where_functorch_takes_no_symbols() -> None:
    open_ = ({0: Dim.AUTO}, {0: Dim.AUTO})
    program = torch.export.export(as_module(a_view_from_before), inputs(0), strict=False, dynamic_shapes=open_)
    before = str(program.graph_module.graph)
    assert not functionalize_writes(program.graph_module.graph).modified
    assert str(program.graph_module.graph) == before


def test_not_where_nothing_is_written() -> None:
    given = captured(lambda sample, other: (sample[0] * other).t(), *inputs(0), normalized=False)
    after, result = given.apply(functionalize_writes)
    assert not result.modified
    assert operators(after) == operators(given.graph_module)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_application_does_nothing(function: Callable[..., Any]) -> None:
    graph_module, _ = assert_functional(function)
    assert not apply_to(graph_module, functionalize_writes).modified


@pytest.mark.parametrize("function", FUNCTIONS)
def test_captured_without_a_second_trace(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the whole program is traced again")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    model = as_module(function)
    transformed = lc.transform(model, lc.Policy())
    for seed in (1, 2):
        given = dict(zip(("sample", "other"), inputs(seed), strict=True))
        assert_bitwise(plain_step(transformed, **given), plain_step(model, **given))
    assert lc.inspect(transformed).counts["full"] == 2


def test_what_stands_apart_is_not_touched() -> None:
    """Only what has to do with the written memory is traced anew."""

    def function(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        apart = F.layer_norm(sample.reshape(-1, 3), (3,)).flatten()
        written = other + 1
        written[0] = 5.0
        return (written.flatten() * apart).reshape(2, -1)

    after, _ = assert_functional(function)
    assert {"aten.layer_norm.default", "aten.reshape.default", "aten.flatten.using_ints"} <= set(operators(after))


def lists(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one, two = sample.clone(), other.clone()
    torch._foreach_add_([one, two], 1.0)
    return one, two


def to_an_input(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    sample[0] = 1.0
    return sample * other


def test_not_where_it_is_not_known_who_shares_memory() -> None:
    graph_module, _ = exported(rotary)
    written = next(node.args[0] for node in graph_module.graph.nodes if node.target == torch.ops.aten.copy_.default)
    with written.meta["val"].fake_mode:
        written.meta["val"] = written.meta["val"].clone()
    assert not apply_to(graph_module, functionalize_writes).modified


@pytest.mark.parametrize("function", [lists, to_an_input])
def test_not_where_that_needs_more_than_the_writes(function: Callable[..., Any]) -> None:
    graph_module, _ = exported(function)
    before = operators(graph_module)
    assert not apply_to(graph_module, functionalize_writes).modified
    assert operators(graph_module) == before


def test_lists_are_left_to_the_second_trace() -> None:
    given = dict(zip(("sample", "other"), inputs(3), strict=True))
    model = as_module(lists)
    assert_bitwise(plain_step(lc.transform(model, lc.Policy()), **given), plain_step(model, **given))


def test_writes_to_what_is_given_are_refused() -> None:
    given = dict(zip(("sample", "other"), inputs(3), strict=True))
    with pytest.raises(
        CaptureError, match=r"by trace: CaptureError: forward writes to its argument sample; a step must be pure"
    ):
        plain_step(lc.transform(as_module(to_an_input), lc.Policy()), **given)


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x[1:3],
    lambda x: x.t(),
    lambda x: x[..., ::2],
    lambda x: x.reshape(-1),
    lambda x: x.unsqueeze(0),
    lambda x: x.contiguous(),
]
WRITES: list[Callable[[torch.Tensor, torch.Tensor], object]] = [
    lambda x, y: x.add_(1.0),
    lambda x, y: x.mul_(y.mean()),
    lambda x, y: x.copy_(y.sum()),
    lambda x, y: x.clamp_(-1.0, 1.0),
    lambda x, y: x[..., :1].sub_(y.max()),
]
STEPS = st.tuples(st.sampled_from(["view", "write", "read", "make"]), st.integers(0, 50), st.integers(0, 50))


@settings(max_examples=60, deadline=None)
@drawn(st.lists(STEPS, min_size=3, max_size=12).filter(lambda steps: any(kind == "write" for kind, _, _ in steps)))
def test_random_programs(steps: list[tuple[str, int, int]]) -> None:
    def function(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
        values = [sample * 2, other + 1]
        for kind, first, second in steps:
            value, partner = values[first % len(values)], values[second % len(values)]
            if kind == "view" and value.dim() == 2:
                values.append(VIEWS[second % len(VIEWS)](value))
            elif kind == "write":
                WRITES[(first + second) % len(WRITES)](value, partner)
            elif kind == "read":
                values.append(value * partner.sum())
            elif kind == "make":
                values.append(value.clone())
        return tuple(values)

    assert_functional(function)
