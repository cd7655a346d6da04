"""Statistics of GroupNorm by rows: those of the whole value, in any layout, and the bytes that they take."""

from __future__ import annotations

import pytest
import torch

from lightcache_fx.measure import measure_peak
from lightcache_fx.norm_stats import join_moments, moments_workspace, row_moments

GROUPS = 4
SHAPES = [((2, 8, 40, 24), 2), ((1, 16, 3, 20, 12), 3), ((3, 8, 33), 2), ((1, 4, 1, 5), 2), ((2, 8, 300, 200), 2)]


def layouts(value: torch.Tensor) -> list[torch.Tensor]:
    """The value as it is, with channels last, and with samples and space swapped in memory."""
    last = value.movedim(1, -1).contiguous().movedim(-1, 1)
    swapped = value.transpose(0, 2).contiguous().transpose(0, 2)
    return [value, last, swapped]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_rows(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5).to(dtype)
    rows = value.double().unflatten(1, (GROUPS, -1)).movedim(dim + 1, 0)
    variance, mean = torch.var_mean(rows, dim=list(range(3, rows.dim())), correction=0)
    for laid_out in layouts(value):
        found = row_moments(laid_out, GROUPS, dim)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.stack([mean, variance], -1), rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    """Sums of squares would lose all of it in float32: 1e8 and 1 are eight digits apart."""
    value = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    _, rstd = join_moments(row_moments(value, 1, 2), 0.0)
    assert float(rstd) == pytest.approx(float(value.double().std(correction=0)) ** -1, rel=1e-3)


@pytest.mark.parametrize(("shape", "dim"), [given for given in SHAPES if len(given[0]) > 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_takes_is_known(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    value = torch.randn(shape).to(dtype)
    for laid_out in layouts(value)[:2]:
        result = row_moments(laid_out, GROUPS, dim)
        measured = measure_peak(lambda value=laid_out: row_moments(value, GROUPS, dim)).peak_bytes - result.nbytes
        predicted = moments_workspace(laid_out, GROUPS, dim)
        assert abs(measured - predicted) <= max(16, 0.02 * measured)


def test_a_large_value_is_never_copied_whole() -> None:
    value = torch.empty(1, 32, 512, 512)
    assert moments_workspace(value, GROUPS, 2) < value.nbytes / 10
