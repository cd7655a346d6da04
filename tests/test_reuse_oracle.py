"""Reuse steps against the eager model with the cut's values replaced by forward hooks, step by step and bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from oracle import HookOracle, Oracle, ResidualOracle, assert_bitwise, full_steps, plain_step, run
from zoo import ZOO, run_inputs

NUM_STEPS = 5
INTERVAL = 3
SLOW = {"sdxl", "svd", "modelscope", "animatediff", "i2vgenxl"}
"""Of these the first cut is tried each time, the others where there is time."""
CUTS = [
    pytest.param(name, cut, id=f"{name}-{cut}", marks=[pytest.mark.slow] if number and name in SLOW else [])
    for name, entry in ZOO.items()
    for number, cut in enumerate(entry.cuts)
]
RESIDUALS = [(name, *entry.residual) for name, entry in ZOO.items() if entry.residual is not None]
MANY_MODULES = [
    ("flux", ["transformer_blocks.2", "single_transformer_blocks.0.attn"]),
    ("sd", ["down_blocks.1.attentions.0", "mid_block", "up_blocks.3.attentions.0"]),
    pytest.param("svd", ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"], marks=pytest.mark.slow),
]


def _check(model: nn.Module, oracle: Oracle, cut: Any, steps: list[dict[str, Any]]) -> lc.Report:
    """Run both; reuse steps must differ from the plain model, or the comparison would show nothing."""
    full = full_steps(len(steps), INTERVAL)
    expected = run(oracle, list(zip(full, steps, strict=True)))
    plain = [plain_step(model, **inputs) for inputs in steps]
    for is_full, outputs, reference in zip(full, expected, plain, strict=True):
        assert torch.equal(outputs[0], reference[0]) == is_full

    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, interval=INTERVAL)))
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(transformed, **inputs), expected[step], f"step {step}")
    return lc.inspect(transformed)


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_module_cut(name: str, cut: str) -> None:
    model, make_inputs = ZOO[name].build()
    oracle = HookOracle(model, [cut])
    report = _check(model, oracle, cut, run_inputs(make_inputs, 0, NUM_STEPS))
    assert report.kept_bytes == oracle.kept_bytes


@pytest.mark.parametrize(("name", "first", "last"), RESIDUALS, ids=[name for name, _, _ in RESIDUALS])
def test_residual_range(name: str, first: str, last: str) -> None:
    model, make_inputs = ZOO[name].build()
    oracle = ResidualOracle(model, first, last)
    report = _check(model, oracle, lc.Residual(first=first, last=last), run_inputs(make_inputs, 0, NUM_STEPS))
    assert report.kept_bytes == oracle.kept_bytes


@pytest.mark.parametrize(("name", "paths"), MANY_MODULES)
def test_several_modules_are_one_cut(name: str, paths: list[str]) -> None:
    model, make_inputs = ZOO[name].build()
    _check(model, HookOracle(model, paths), paths, run_inputs(make_inputs, 0, NUM_STEPS))


@pytest.mark.parametrize("name", ["svd", "sd3"])
def test_module_cut_in_bfloat16(name: str) -> None:
    model, make_inputs = ZOO[name].build(torch.bfloat16)
    cut = ZOO[name].cuts[0]
    _check(model, HookOracle(model, [cut]), cut, run_inputs(make_inputs, 0, NUM_STEPS))


def test_a_block_with_two_streams_keeps_both() -> None:
    model, make_inputs = ZOO["sd3"].build()
    cut = "transformer_blocks.1"
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, interval=INTERVAL)))
    steps = run_inputs(make_inputs, 0, NUM_STEPS)
    outputs = []
    handle = model.get_submodule(cut).register_forward_hook(lambda module, args, output: outputs.append(output))
    plain_step(model, **steps[0])
    handle.remove()
    for inputs in steps:
        plain_step(transformed, **inputs)
    encoder_stream, hidden_stream = outputs[0]
    assert lc.inspect(transformed).kept_bytes == encoder_stream.nbytes + hidden_stream.nbytes


def test_full_and_reuse_run_as_scheduled() -> None:
    model, make_inputs = ZOO["dit"].build()
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut="transformer_blocks.1", interval=INTERVAL)))
    for inputs in run_inputs(make_inputs, 0, 7):
        plain_step(transformed, **inputs)
    counts = lc.inspect(transformed).counts
    assert (counts["full"], counts["reuse"]) == (3, 4)


@pytest.mark.parametrize(
    ("schedule", "full"),
    [
        ({"steps": [0, 3, 4]}, [True, False, False, True, True]),
        ({"mask": [True, False, True, False, False]}, [True, False, True, False, False]),
        ({"interval": 4, "first": 2}, [True, True, False, False, True]),
        ({"interval": 5, "last": 1, "num_steps": 5}, [True, False, False, False, True]),
    ],
    ids=["steps", "mask", "first", "last"],
)
def test_schedules(schedule: dict[str, Any], full: list[bool]) -> None:
    model, make_inputs = ZOO["dit"].build()
    cut = "transformer_blocks.1"
    steps = run_inputs(make_inputs, 0, len(full))
    expected = run(HookOracle(model, [cut]), list(zip(full, steps, strict=True)))
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, **schedule)))
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(transformed, **inputs), expected[step], f"step {step}")
