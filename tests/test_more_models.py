"""Models that nothing here was made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import lightcache_fx as lc
from lightcache_fx import Cache, Policy, Residual
from more_models import MORE, WIDE
from oracle import ResidualOracle, assert_bitwise, plain_step
from zoo import Draw, run_inputs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")]


def step_of(module: Any, **inputs: Any) -> list[torch.Tensor]:
    """As `plain_step`, in containers of its own: some models take out of a list what they are given."""
    return plain_step(module, **pytree.tree_map(lambda leaf: leaf, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_nothing_asked(name: str, dtype: torch.dtype) -> None:
    model, make_inputs = MORE[name].build(dtype)
    try:
        runs = [run_inputs(make_inputs, seed, 3) for seed in (0, 1)]
        expected = [[step_of(model, **inputs) for inputs in run] for run in runs]
    except RuntimeError as error:
        pytest.skip(f"eager does not run: {error}")
    transformed = lc.transform(model, Policy())
    for run, outputs in zip(runs, expected, strict=True):
        for inputs, output in zip(run, outputs, strict=True):
            assert_bitwise(step_of(transformed, **inputs), output)


@pytest.mark.parametrize("name", MORE)
def test_a_cut_that_is_found(name: str) -> None:
    model, make_inputs = MORE[name].build()
    transformed = lc.transform(model, Policy(cache=Cache(cut="auto", interval=2)))
    run = run_inputs(make_inputs, 0, 4)
    expected = [step_of(model, **inputs) for inputs in run]  # first, as some models keep tables from then on
    with lc.marked_run(4):
        for step, inputs in enumerate(run):
            found = step_of(transformed, **inputs)
            if step % 2 == 0:
                assert_bitwise(found, expected[step])
            else:
                assert all(bool(tensor.isfinite().all()) for tensor in found)
                assert not all(map(torch.equal, found, expected[step]))
            lc.step_done()
    report = lc.inspect(transformed)
    assert report.counts["full"] == report.counts["reuse"] == 2
    assert report.programs["reuse"].flops < 0.6 * report.programs["full"].flops


@pytest.mark.parametrize("name", [name for name in MORE if MORE[name].residual])
def test_a_residual_range(name: str) -> None:
    model, make_inputs = MORE[name].build()
    first, last = MORE[name].residual or ("", "")
    transformed = lc.transform(model, Policy(cache=Cache(cut=Residual(first=first, last=last), interval=2)))
    oracle = ResidualOracle(model, first, last)
    with lc.marked_run(4):
        for step, inputs in enumerate(run_inputs(make_inputs, 0, 4)):
            assert_bitwise(step_of(transformed, **inputs), oracle.step(step % 2 == 0, **inputs))
            lc.step_done()


@pytest.mark.parametrize("name", WIDE)
def test_another_size(name: str) -> None:
    model, make_inputs = MORE[name].build()
    transformed = lc.transform(model, Policy())
    sizes = (make_inputs(0), WIDE[name](Draw(0, 0, torch.float32)))
    for inputs in (*sizes, *sizes):
        assert_bitwise(step_of(transformed, **inputs), step_of(model, **inputs))


@pytest.mark.parametrize("name", ["cascade_prior", "cascade_decoder", "kandinsky3", "unet2d", "unet1d"])
def test_the_outermost_branch_of_a_u_net(name: str) -> None:
    model, make_inputs = MORE[name].build()
    plan = lc.plan(model, (), make_inputs(0), Policy.deepcache(interval=2, branch=0))
    assert plan.reuse_flops() < 0.5 * plan.full_flops
