"""Casts, copies and views that return what they were given go; all others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff
from lightcache_fx.passes.remove_asserts import remove_asserts
from lightcache_fx.passes.remove_noops import remove_noops

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def _every_kind(sample: torch.Tensor) -> torch.Tensor:
    hidden = sample.sin().to(torch.float32)  # (1) a cast
    hidden = hidden.contiguous().clone() + 1  # (2) copies
    hidden = hidden.view(2, 4, 6).reshape(2, -1, 6).expand(2, 4, 6).permute(0, 1, 2)  # (3) views
    return hidden[:, 0:] * sample  # (4) a whole slice


def _all_needed(sample: torch.Tensor) -> torch.Tensor:
    hidden = sample.sin().to(torch.float64).to(torch.float32)  # rounds nothing, but changes the type
    hidden = hidden.transpose(1, 2).contiguous()  # strides
    hidden = hidden.view(2, 24).reshape(4, 12)  # shapes
    hidden = hidden.reshape(2, 4, 6)[:, 1:]
    return hidden[:, :, ::2].permute(0, 2, 1)


def test_golden() -> None:
    given = captured(_every_kind, X, normalized=False)
    after, result = given.apply(remove_asserts, remove_noops)
    assert result.counts["casts"] == 1
    assert result.counts["copies"] == 2
    check_golden(diff(given.graph_module, after), "remove_noops", __file__)


@pytest.mark.parametrize("function", [_every_kind, _all_needed])
def test_numbers(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = captured(function, X, normalized=False)
    after, _ = given.apply(remove_asserts, remove_noops)
    (found,) = given.run(after)
    assert torch.equal(found, function(X))
    assert found.stride() == function(X).stride()


def test_not_where_type_strides_or_shape_change() -> None:
    given = captured(_all_needed, X, normalized=False)
    without_asserts, _ = given.apply(remove_asserts)
    after, result = given.apply(remove_asserts, remove_noops)
    assert not result.modified
    assert operators(after) == operators(without_asserts)


def test_a_view_that_changes_the_stride_of_one_position_stays() -> None:
    """Convolutions choose their kernel by it: a FIR filter of diffusers has such a view, and lost its bits without."""

    def function(sample: torch.Tensor) -> torch.Tensor:
        return (sample * 2).unsqueeze(-1).permute(0, 3, 1, 2).view(2, 1, 4, 6) + 1

    given = captured(function, X, normalized=False)
    after, _ = given.apply(remove_asserts, remove_noops)
    assert "aten.view.default" in operators(after)
    (found,) = given.run(after)
    assert found.stride() == function(X).stride()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("the copy is returned", lambda sample: sample.clone()),
        pytest.param("a view of the copy is returned", lambda sample: sample.clone().view(-1)),
        pytest.param("a part of the copy is returned", lambda sample: sample.clone()[:, 1:]),
        pytest.param("beside another", lambda sample: (sample.sin(), sample.clone().transpose(0, 1))),
        pytest.param("both", lambda sample: (h := sample.sin(), h.clone().view(-1))),
    ],
)
def test_not_where_a_returned_tensor_would_share_memory(name: str, function: Callable[..., object]) -> None:
    """A caller may write to what a model returned: schedulers do."""
    given = captured(function, X, normalized=False)
    after, _ = given.apply(remove_asserts, remove_noops)
    found = given.run(after)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (X, *found)]
    assert len(set(storages)) == len(storages), name


def test_second_application_does_nothing() -> None:
    after, _ = captured(_every_kind, X, normalized=False).apply(remove_asserts, remove_noops)
    assert not apply_to(after, remove_noops).modified
