"""Writes in place inside a model: captured without a second trace, and every value is what eager makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram

import lightcache_fx as lc
from lightcache_fx.errors import CaptureError
from lightcache_fx.local_writes import without_local_writes, writes_in_place
from oracle import assert_bitwise, plain_step

Tensors = tuple[torch.Tensor, ...]


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: torch.Tensor, other: torch.Tensor) -> Any:
        return self.function(sample, other)


def inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


def assert_functional(function: Callable[..., Any]) -> str:
    """The exported graph without its writes computes what the function does; returns its code."""
    model = Model(function)
    program = torch.export.export(model, inputs(0), strict=False)
    exported, constants = program.graph_module, program.constants.values()
    assert writes_in_place(exported.graph)
    before = str(exported.graph)
    functional = without_local_writes(exported)
    assert functional is not None
    assert not writes_in_place(functional.graph)
    functional.graph.lint()
    detect_fake_mode([node.meta["val"] for node in functional.graph.nodes if "val" in node.meta])  # raises for several
    assert str(exported.graph) == before
    for seed in (1, 2):
        expected = model(*inputs(seed))
        found = functional(*constants, *inputs(seed))
        assert_bitwise(list(found), list(expected) if isinstance(expected, tuple) else [expected])
    return functional.code


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


FUNCTIONS = [
    only_a_constant,
    rotary,
    versions,
    a_view_from_before,
    two_at_once,
    copies_and_views,
    unannotated_alias,
    scattered,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functional_in_place(function: Callable[..., Any]) -> None:
    assert_functional(function)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_captured_without_a_second_trace(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the whole program is traced again")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    model = Model(function).eval()
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

    code = assert_functional(function)
    for kept in ("layer_norm", "aten.reshape.default", "aten.flatten.using_ints"):
        assert kept in code


def lists(sample: torch.Tensor, other: torch.Tensor) -> Tensors:
    one, two = sample.clone(), other.clone()
    torch._foreach_add_([one, two], 1.0)
    return one, two


def test_what_is_traced_again() -> None:
    """Lists of tensors are left to PyTorch, and right."""
    exported = torch.export.export(Model(lists), inputs(0), strict=False).graph_module
    assert without_local_writes(exported) is None
    model = Model(lists).eval()
    given = dict(zip(("sample", "other"), inputs(3), strict=True))
    assert_bitwise(plain_step(lc.transform(model, lc.Policy()), **given), plain_step(model, **given))


def test_writes_to_what_is_given_are_refused() -> None:
    def to_an_input(sample: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        sample[0] = 1.0
        return sample * other

    with pytest.raises(
        CaptureError, match=r"by trace: CaptureError: forward writes to its argument sample; a step must be pure"
    ):
        plain_step(lc.transform(Model(to_an_input).eval(), lc.Policy()), sample=inputs(0)[0], other=inputs(0)[1])


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
@given(st.lists(STEPS, min_size=3, max_size=12).filter(lambda steps: any(kind == "write" for kind, _, _ in steps)))
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
