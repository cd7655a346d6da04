"""GroupNorm in two: statistics over the whole value, then what can be cut."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.norm_stats import join_moments, row_moments
from lightcache_fx.passes.split_group_norm import group_norms, split_group_norm


def normed(*shape: int, affine: bool = True, dtype: torch.dtype = torch.float32) -> Captured:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, shape[1], affine=affine).eval()
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    sample = (torch.randn(shape) * 3 + 50).to(dtype)  # a mean far from zero shows a careless variance
    return captured(norm.to(dtype), sample)


def split(given: Captured) -> partial[object]:
    return partial(split_group_norm, names=group_norms(given.graph_module.graph))


def test_golden() -> None:
    given = normed(2, 4, 6, 5)
    after, result = given.apply(split(given))
    assert result.counts == {"group norms": 1}
    check_golden(diff(given.graph_module, after), "split_group_norm", __file__)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 8, 3, 7, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_numbers(shape: tuple[int, ...], affine: bool) -> None:
    given = normed(*shape, affine=affine)
    after, _ = given.apply(split(given))
    torch.testing.assert_close(given.run(after), given.run(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    given = normed(2, 4, 6, 5, dtype=dtype)
    after, _ = given.apply(split(given))
    (found,), (expected,) = given.run(after), given.run()
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_moments_are_those_of_the_whole() -> None:
    value = torch.randn(3, 8, 5, 40, 30) * 2 + 7
    mean, rstd = join_moments(row_moments(value, 4, 3), 1e-5)
    _, expected_mean, expected_rstd = torch.native_group_norm(value, None, None, 3, 8, 6000, 4, 1e-5)
    torch.testing.assert_close((mean, rstd), (expected_mean, expected_rstd), rtol=1e-5, atol=1e-5)


def test_sequences_are_left_alone() -> None:
    given = normed(2, 4, 6)
    assert group_norms(given.graph_module.graph) == []


def test_a_second_application_does_nothing() -> None:
    given = captured(lambda sample: F.group_norm(sample, 2), torch.randn(2, 4, 6, 5))
    names = group_norms(given.graph_module.graph)
    _, result = given.apply(partial(split_group_norm, names=names), partial(split_group_norm, names=names))
    assert not result.modified
