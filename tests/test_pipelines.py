"""Whole diffusers pipelines through `transform_pipeline`, against the plain pipeline and its hooked denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from oracle import HookOracle, ResidualOracle, assert_bitwise, scheduled
from pipelines import NUM_STEPS, PIPELINES, SMALL, WIDE, PipelineCase

INTERVAL = 2


class StepFailedError(RuntimeError):
    """Raised by the tests in the middle of a run."""


def _denoiser(case: PipelineCase, pipe: Any) -> nn.Module:
    return getattr(pipe, case.component)


def _policy(case: PipelineCase) -> lc.Policy:
    if isinstance(case.kept, str):
        return lc.Policy.deepcache(INTERVAL, branch=0)
    first, last = case.kept
    return lc.Policy(cache=lc.Cache(cut=lc.Residual(first=first, last=last), interval=INTERVAL))


def _oracle(case: PipelineCase, denoiser: nn.Module) -> HookOracle | ResidualOracle:
    return HookOracle(denoiser, [case.kept]) if isinstance(case.kept, str) else ResidualOracle(denoiser, *case.kept)


def _expected(case: PipelineCase, pipe: Any, seed: int, size: tuple[int, int]) -> torch.Tensor:
    denoiser = _denoiser(case, pipe)
    with scheduled(denoiser, _oracle(case, denoiser), INTERVAL):
        return case.generate(pipe, seed, size)


SLOW = ("animatediff", "modelscope")
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PIPELINES]


@pytest.fixture(scope="module", params=CASES)
def cached(request: pytest.FixtureRequest) -> tuple[PipelineCase, Any, Any]:
    """A plain pipeline and the cached one made of it. Shared: a run must not depend on those before it."""
    case = PIPELINES[request.param]
    pipe = case.build()
    return case, pipe, lc.transform_pipeline(pipe, _policy(case))


def test_runs_equal_the_hooked_pipeline(cached: tuple[PipelineCase, Any, Any]) -> None:
    case, pipe, fast = cached
    expected = _expected(case, pipe, 0, SMALL)
    assert not torch.equal(expected, case.generate(pipe, 0, SMALL)), "caching changed nothing"
    assert_bitwise([case.generate(fast, 0, SMALL)], [expected], "first run")
    assert_bitwise([case.generate(fast, 1, WIDE)], [_expected(case, pipe, 1, WIDE)], "another seed and size")
    assert_bitwise([case.generate(fast, 0, SMALL)], [expected], "the first seed and size again")


def test_a_run_after_one_that_raised(cached: tuple[PipelineCase, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe, fast = cached
    expected = _expected(case, pipe, 3, SMALL)
    step, calls = fast.scheduler.step, []

    def fail_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # the denoiser ran for steps 0, 1, 2: the next one in line would have been a reuse step
            raise StepFailedError
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fast.scheduler, "step", fail_at_the_third)
        with pytest.raises(StepFailedError):
            case.generate(fast, 4, SMALL)
    assert_bitwise([case.generate(fast, 3, SMALL)], [expected])


def test_a_run_after_one_cut_short_by_its_callback() -> None:
    case = PIPELINES["sd"]
    pipe = case.build()
    fast = lc.transform_pipeline(pipe, _policy(case))
    expected = _expected(case, pipe, 0, SMALL)

    def fail_at_step_2(pipe: Any, step: int, timestep: torch.Tensor, tensors: Any) -> dict[str, Any]:
        if step == 2:  # as above
            raise StepFailedError
        return {}

    with pytest.raises(StepFailedError):
        fast(prompt="box", height=32, width=32, num_inference_steps=NUM_STEPS, callback_on_step_end=fail_at_step_2)
    assert_bitwise([case.generate(fast, 0, SMALL)], [expected])


@pytest.mark.parametrize("name", PIPELINES)
def test_the_original_pipeline_is_untouched(name: str) -> None:
    case = PIPELINES[name]
    pipe = case.build()
    components = dict(pipe.components)
    before = case.generate(pipe, 0, SMALL, num_steps=2)

    fast = lc.transform_pipeline(pipe, lc.Policy())
    assert isinstance(fast, type(pipe))
    assert fast is not pipe
    assert_bitwise([case.generate(fast, 0, SMALL, num_steps=2)], [before], "lossless policy")

    assert all(pipe.components[key] is component for key, component in components.items())
    assert_bitwise([case.generate(pipe, 0, SMALL, num_steps=2)], [before], "plain pipeline, afterwards")
    assert _denoiser(case, lc.restore(fast)) is _denoiser(case, pipe)


def test_the_cut_is_kept_during_a_run_and_nothing_after_it() -> None:
    case = PIPELINES["sd"]
    pipe = case.build()
    denoiser = _denoiser(case, pipe)
    oracle = _oracle(case, denoiser)
    with scheduled(denoiser, oracle, INTERVAL):
        case.generate(pipe, 0, SMALL, num_steps=2)

    fast = lc.transform_pipeline(pipe, _policy(case))
    held: list[int] = []

    def note_held(pipe: Any, step: int, timestep: torch.Tensor, tensors: Any) -> dict[str, Any]:
        held.append(lc.inspect(_denoiser(case, fast)).kept_bytes)
        return {}

    fast(prompt="box", height=32, width=32, num_inference_steps=3, callback_on_step_end=note_held)
    assert held == [oracle.kept_bytes] * 2 + [0], "held between steps, freed after the last one, before decoding"
    assert lc.inspect(_denoiser(case, fast)).kept_bytes == 0


@pytest.mark.parametrize("name", PIPELINES)
def test_the_autoencoder_is_transformed_where_the_policy_asks(name: str) -> None:
    case = PIPELINES[name]
    pipe = case.build()
    frames = None if name in ("svd", "easyanimate") else 1  # the frames of these two depend on each other
    policy = lc.Policy(decode=lc.Decode(frames=frames, budget="64MiB"))
    fast = lc.transform_pipeline(pipe, policy)
    assert lc.transform_pipeline(pipe, lc.Policy()).vae is pipe.vae
    found = case.generate(fast, 0, SMALL, num_steps=2)
    torch.testing.assert_close(found, case.generate(pipe, 0, SMALL, num_steps=2), rtol=0, atol=1e-4)
    plan = lc.inspect(fast.vae).plan
    assert plan.chunks["full"].fits
    assert bool(plan.chunks["full"].regions) == (name in ("animatediff", "modelscope"))
    assert lc.restore(fast).vae is pipe.vae
