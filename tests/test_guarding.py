"""Runs that check themselves, and what happens where they find too much."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import lightcache_fx as lc
from lightcache_fx.errors import PolicyError
from oracle import HookOracle, assert_bitwise, plain_step
from toys import Denoiser, latent, prompt

NUM_STEPS = 6
CUT = "middle"
FULL = [True, False, False, True, False, False]


def transformed(guard: lc.Guard | None, **schedule: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    model = Denoiser()
    schedule = schedule or {"interval": 3}
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=CUT, guard=guard, **schedule)))
    condition = prompt(0)
    steps = [
        {"sample": latent(step), "timestep": torch.tensor(900 - 100 * step), "encoder_hidden_states": condition}
        for step in range(NUM_STEPS)
    ]
    return model, fast, steps


def generate(fast: Any, steps: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
    with lc.marked_run(len(steps)):
        outputs = []
        for inputs in steps:
            outputs.append(plain_step(fast, **inputs))
            lc.step_done()
    return outputs


def off(model: Any, steps: list[dict[str, Any]]) -> list[float]:
    """How far each reuse step is off, by hooks."""
    oracle, found = HookOracle(model, [CUT]), []
    for full, inputs in zip(FULL, steps, strict=True):
        reused, plain = oracle.step(full, **inputs)[0].double(), plain_step(model, **inputs)[0].double()
        if not full:
            found.append(float((reused - plain).square().mean().sqrt() / plain.square().mean().sqrt()))
    return found


def test_a_wide_bound_changes_nothing() -> None:
    model, fast, steps = transformed(lc.Guard(bound=1e6))
    _, unguarded, _ = transformed(None)
    for got, expected in zip(generate(fast, steps), generate(unguarded, steps), strict=True):
        assert_bitwise(got, expected)
    errors = off(model, steps)
    assert fast._lightcache.runtime.watch.worst == pytest.approx(max(errors), rel=1e-6)
    assert lc.inspect(fast).guard == f"guard: 4 reuse steps checked, off by {max(errors):.3g} at worst"
    generate(fast, steps)
    assert fast._lightcache.runtime.watch.checked == 4  # the first run alone
    assert "guard: 4 reuse steps" in str(lc.inspect(fast))


def test_every_second_run() -> None:
    _, fast, steps = transformed(lc.Guard(bound=1e6, every=2))
    checked = []
    for _ in range(5):
        generate(fast, steps)
        checked.append(fast._lightcache.runtime.watch.checked)
    assert checked == [4, 4, 8, 8, 12]


def test_beyond_the_bound_everything_is_full_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The first step that is too far off is replaced by the full one; those before it stay."""
    model, fast, steps = transformed(lc.Guard(bound=1.0))
    errors = off(model, steps)
    bound = (errors[0] + max(errors)) / 2
    assert errors[0] < bound
    first = next(place for place, error in enumerate(errors) if error > bound)
    _, fast, _ = transformed(lc.Guard(bound=bound))
    with caplog.at_level(logging.WARNING):
        outputs = generate(fast, steps)
    reused = [step for step, full in enumerate(FULL) if not full]
    oracle = HookOracle(model, [CUT])
    for step, (inputs, got) in enumerate(zip(steps, outputs, strict=True)):
        expected = oracle.step(FULL[step], **inputs) if step < reused[first] else plain_step(model, **inputs)
        assert_bitwise(got, expected, f"step {step}")
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("guard")]
    assert len(said) == 1
    assert f"step {reused[first]} of run 1 was off by" in said[0]
    for got, inputs in zip(generate(fast, steps), steps, strict=True):
        assert_bitwise(got, plain_step(model, **inputs))
    assert f"in full since step {reused[first]} of run 1" in str(lc.inspect(fast))


@pytest.mark.parametrize(
    "schedule", [{"adaptive": lc.Adaptive(threshold=2.0, max_reuse=2)}, {"interval": 3, "order": 1}]
)
def test_with_other_schedules(schedule: dict[str, Any]) -> None:
    _, fast, steps = transformed(lc.Guard(bound=1e6), **schedule)
    _, unguarded, _ = transformed(None, **schedule)
    for got, expected in zip(generate(fast, steps), generate(unguarded, steps), strict=True):
        assert_bitwise(got, expected)
    assert fast._lightcache.runtime.watch.checked == 4


def test_not_a_number_is_too_far_off() -> None:
    _, fast, steps = transformed(lc.Guard(bound=1e6))
    steps[1] = {**steps[1], "sample": torch.full_like(steps[1]["sample"], float("nan"))}
    generate(fast, steps)
    assert "was off by nan" in lc.inspect(fast).guard


@pytest.mark.parametrize("more", [{"swap": lc.Swap()}, {"memory_budget": "1GiB"}])
def test_not_within_a_plan_for_memory(more: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="guard runs full steps beside reuse steps"):
        lc.Policy(cache=lc.Cache(cut=0, interval=2, guard=lc.Guard(bound=0.1)), **more)


@pytest.mark.parametrize("settings", [{"bound": 0.0}, {"bound": float("inf")}, {"bound": 0.1, "every": 0}, {}])
def test_bad_guards(settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"bound|every"):
        lc.Guard(**settings)
