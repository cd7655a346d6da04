"""Guidance branches that are derived from the first of their step: against the sums written out here."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.faster_cache import _split_low_high_freq

import lightcache_fx as lc
from lightcache_fx.deriving import weighted
from lightcache_fx.errors import PolicyError, ScheduleError
from oracle import HookOracle, assert_bitwise, plain_step
from zoo import ZOO, run_inputs

NUM_STEPS = 8
RULE = lc.Guidance(interval=3, first=2)
ALL = [0, 1, 3, 6]
"""Steps that compute every branch by `RULE`."""


def branches(name: str = "wan", count: int = 2) -> tuple[torch.nn.Module, list[list[dict[str, Any]]]]:
    """A model, and for each step the calls of its branches, with the same latent and timestep."""
    model, make_inputs = ZOO[name].build()
    prompts = [run_inputs(make_inputs, seed, 1)[0]["encoder_hidden_states"] for seed in range(count)]
    steps = run_inputs(make_inputs, 0, NUM_STEPS)
    return model, [[{**inputs, "encoder_hidden_states": prompt} for prompt in prompts] for inputs in steps]


def run(fast: torch.nn.Module, steps: list[list[dict[str, Any]]], *, named: bool = True) -> list[list[torch.Tensor]]:
    found = []
    with lc.marked_run(len(steps)):
        for calls in steps:
            outputs = []
            for branch, inputs in enumerate(calls):
                with lc.branch_name(str(branch) if named else "any"):
                    outputs.append(plain_step(fast, **inputs)[0])
            found.append(outputs)
            lc.step_done()
    return found


@pytest.mark.parametrize("named", [True, False])
def test_the_others_are_the_first_and_what_they_differed_by(named: bool) -> None:
    model, steps = branches(count=3)
    fast = lc.transform(model, lc.Policy(guidance=RULE))
    for _ in range(2):  # a second run begins anew
        differences: list[torch.Tensor] = []
        for step, (calls, outputs) in enumerate(zip(steps, run(fast, steps, named=named), strict=True)):
            eager = [plain_step(model, **inputs)[0] for inputs in calls]
            if step in ALL:
                differences = [one - eager[0] for one in eager[1:]]
                expected = eager
            else:
                expected = [eager[0], *(eager[0] + difference for difference in differences)]
                assert not torch.equal(expected[1], eager[1])
            for got, one in zip(outputs, expected, strict=True):
                assert_bitwise([got], [one], f"step {step}")
    report = lc.inspect(fast)
    assert report.counts["derived"] == 2 * 2 * (NUM_STEPS - len(ALL))
    assert report.counts["full"] == 2 * (3 * len(ALL) + NUM_STEPS - len(ALL))


def test_a_branch_that_has_missed_a_full_step_makes_it_up() -> None:
    """What a branch keeps is never older than its cache's schedule says: the step after a missed one is full."""
    model, steps = branches()
    policy = lc.Policy(cache=lc.Cache(cut="blocks.1", interval=2), guidance=RULE)
    fast = lc.transform(model, policy)
    outputs = run(fast, steps)
    oracles = [HookOracle(model, ["blocks.1"]) for _ in range(2)]
    difference, missed = torch.empty(0), False
    for step, (calls, got) in enumerate(zip(steps, outputs, strict=True)):
        first = oracles[0].step(step % 2 == 0, **calls[0])[0]
        if step in ALL:
            other = oracles[1].step(step % 2 == 0 or missed, **calls[1])[0]
            difference, missed = other - first, False
        else:
            other, missed = first + difference, missed or step % 2 == 0
        assert_bitwise(got, [first, other], f"step {step}")


def test_what_its_caller_has_written_to_is_not_derived_from() -> None:
    model, steps = branches()
    fast = lc.transform(model, lc.Policy(guidance=RULE))
    with lc.marked_run(NUM_STEPS):
        for step, calls in enumerate(steps):
            with lc.branch_name("0"):
                plain_step_in_place = plain_step(fast, **calls[0])[0]
            if step == 2:
                with torch.no_grad():
                    fast_first = fast._lightcache.runtime.tracker.branches[0].derived.outputs[0]
                    fast_first.mul_(2)
            with lc.branch_name("1"):
                got = plain_step(fast, **calls[1])
            if step == 2:
                assert_bitwise(got, plain_step(model, **calls[1]), "computed")
            assert plain_step_in_place.isfinite().all()
            lc.step_done()
    assert lc.inspect(fast).counts["derived"] == NUM_STEPS - len(ALL) - 1


def test_frequencies() -> None:
    """Weighted as FasterCache splits them, with a mask about the centre of a shifted spectrum."""
    difference = torch.randn(1, 4, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of meshgrid, in diffusers
        low, high = _split_low_high_freq(difference)
    expected = torch.fft.ifft2(torch.fft.ifftshift(1.3 * low + 0.7 * high)).real
    # Its shift is of all dimensions; those before the last two are put back.
    dims = (-2, -1)
    shifted = torch.fft.fftshift(torch.fft.fft2(difference), dim=dims)
    rows, columns = torch.meshgrid(torch.arange(12) - 6, torch.arange(10) - 5, indexing="ij")
    mask = (rows**2 + columns**2 <= 2**2).float()
    by_hand = torch.fft.ifft2(torch.fft.ifftshift(shifted * (1.3 * mask + 0.7 * (1 - mask)), dim=dims)).real
    torch.testing.assert_close(weighted(difference, 1.3, 0.7), by_hand, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected, by_hand, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted(difference, 1.0, 1.0), difference, rtol=1e-5, atol=1e-5)


def test_weighted_in_a_run() -> None:
    model, steps = branches()
    rule = lc.Guidance(interval=3, first=2, low=1.2, high=0.9)
    fast = lc.transform(model, lc.Policy(guidance=rule))
    outputs = run(fast, steps)
    eager = [[plain_step(model, **inputs)[0] for inputs in calls] for calls in steps]
    expected = eager[2][0] + weighted(eager[1][1] - eager[1][0], 1.2, 0.9)
    assert_bitwise([outputs[2][1]], [expected], "step 2")


@pytest.mark.parametrize(
    "others",
    [
        {"compile": "aot_eager"},
        {"swap": lc.Swap(budget="75%")},
        {"chunk": lc.Chunk(budget="80%")},
        {"cache": lc.Cache(cut="blocks.1", interval=2, order=1)},
    ],
    ids=["compile", "swap", "chunk", "cache"],
)
def test_beside_the_other_passes(others: dict[str, Any], tmp_path: Path) -> None:
    """Derived from what they compute, but for chunks' rounding; the same when saved and loaded, where nothing moves."""

    def check(got: list[torch.Tensor], expected: list[torch.Tensor], where: str) -> None:
        if "chunk" in others:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=where)
        else:
            assert_bitwise(got, expected, where)

    model, steps = branches()
    plain = {"cache": others["cache"]} if "cache" in others else {}
    outputs = run(lc.transform(model, lc.Policy(guidance=RULE, **plain)), steps)
    fast = lc.transform(copy.deepcopy(model), lc.Policy(guidance=RULE, **others))
    for step, (got, expected) in enumerate(zip(run(fast, steps), outputs, strict=True)):
        check(got, expected, f"step {step}")
    assert lc.inspect(fast).counts["derived"] == NUM_STEPS - len(ALL)
    assert bool(lc.inspect(fast).plan.chunks) == ("chunk" in others)
    if "swap" not in others:
        lc.save(fast, tmp_path / "saved")
        loaded = lc.load(tmp_path / "saved")
        for step, (got, expected) in enumerate(zip(run(loaded, steps), outputs, strict=True)):
            check(got, expected, f"loaded, step {step}")


def test_a_checked_run_computes_what_is_too_far_off() -> None:
    model, steps = branches()
    cache = lc.Cache(cut="blocks.1", interval=1, guard=lc.Guard(bound=1e-6))
    fast = lc.transform(model, lc.Policy(cache=cache, guidance=RULE))
    outputs = run(fast, steps)
    for step, (calls, got) in enumerate(zip(steps, outputs, strict=True)):
        assert_bitwise(got, [plain_step(model, **inputs)[0] for inputs in calls], f"step {step}")
    assert lc.inspect(fast).counts["derived"] == 1


def test_one_branch_is_said_to_have_nothing_to_derive(caplog: pytest.LogCaptureFixture) -> None:
    model, steps = branches(count=1)
    fast = lc.transform(model, lc.Policy(guidance=RULE))
    run(fast, steps)
    run(fast, steps)
    warnings = [record.getMessage() for record in caplog.records if "guidance:" in record.getMessage()]
    assert len(warnings) == 1
    assert "is called once a step, so there is no other branch to derive" in warnings[0]


def test_bad_settings() -> None:
    with pytest.raises(PolicyError, match="interval"):
        lc.Guidance(interval=0)
    with pytest.raises(PolicyError, match="guidance: expected a Guidance, or a mapping with the keys interval, first"):
        lc.Policy(guidance=3)
    model, steps = branches()
    fast = lc.transform(model, lc.Policy(guidance=lc.Guidance(interval=2, last=1)))
    with pytest.raises(ScheduleError, match="last=1: the number of steps is not known here"):
        plain_step(fast, **steps[0][0])
    with pytest.raises(PolicyError, match=r"guidance: low=2 and high=1 weigh frequencies of images"):
        weighted(torch.zeros(1, 6, 8), 2.0, 1.0)
    policy = lc.Policy(guidance=lc.Guidance(interval=5, first=8, low=1.1))
    assert lc.Policy.from_yaml(policy.to_yaml()) == policy
