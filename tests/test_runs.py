"""Which run, step and branch a call belongs to: never stale, full wherever the evidence fits two readings."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx.runs import MarkedRun, Position, RunTracker
from oracle import HookOracle, assert_bitwise, plain_step
from toys import Denoiser, Watched, latent, prompt
from zoo import randomize

TIMES = [981, 884, 787, 690, 593, 496, 399]
EVERY_3RD = ["full", "reuse", "reuse", "full", "reuse", "reuse", "full"]


def watched(interval: int = 3, **settings: Any) -> Watched:
    return Watched(Denoiser(), lc.Policy(cache=lc.Cache(cut=0, interval=interval), **settings))


def times(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


# MarkedRun and RunTracker alone -----------------------------------------------------------------------------------


def test_a_marked_run_counts_a_step_only_when_the_scheduler_has_stepped() -> None:
    run = MarkedRun()
    assert [run.enter_step(), run.enter_step()] == [0, 0]
    run.epoch += 1
    assert [run.enter_step(), run.enter_step()] == [1, 1]
    run.epoch += 2  # a scheduler that steps twice for one call of the denoiser
    assert run.enter_step() == 2


def test_beginning_again_makes_another_run() -> None:
    run = MarkedRun()
    run.enter_step()
    number = run.number
    run.begin(5)
    assert run.number != number
    assert (run.num_steps, run.enter_step()) == (5, 0)


def test_runs_nest_and_end() -> None:
    from lightcache_fx.runs import current_branch, current_run

    assert current_run() is None
    with lc.marked_run() as outer:
        with lc.marked_run(4) as inner:
            assert current_run() is inner
            lc.step_done()
        assert (outer.epoch, inner.epoch) == (0, 1)
        assert current_run() is outer
    lc.step_done()  # outside it does nothing
    assert current_run() is None
    with lc.branch_name("cond"):
        assert current_branch() == "cond"
    assert current_branch() is None


class Tracked:
    """A tracker whose calls are written as `(time, conditioning)`; equal numbers are equal tensors."""

    def __init__(self) -> None:
        self.tracker = RunTracker()
        self._tensors: dict[int, torch.Tensor] = {}

    def __call__(self, time: float, conditioning: int = 0, *, fresh: bool = False, group: str = "") -> Position:
        tensor = self._tensors.setdefault(conditioning, torch.tensor([conditioning]))
        inputs = (tensor.clone() if fresh else tensor,)
        return self.tracker.locate(time, group, inputs, lambda b: all(map(torch.equal, b.inputs, inputs)))


def test_falling_timesteps_are_one_run() -> None:
    track = Tracked()
    found = [track(time) for time in TIMES]
    assert [p.step for p in found] == list(range(len(TIMES)))
    assert [p.begins_run for p in found] == [True] + [False] * (len(TIMES) - 1)
    assert all(p.certain for p in found)
    assert len({id(p.branch) for p in found}) == 1


def test_a_rising_timestep_begins_a_run() -> None:
    track = Tracked()
    first = [track(time) for time in TIMES[:3]]
    again = [track(time) for time in TIMES[:3]]
    assert [p.step for p in again] == [0, 1, 2]
    assert again[0].begins_run
    assert again[0].branch is not first[0].branch


@pytest.mark.parametrize("fresh", [False, True], ids=["same tensors", "equal tensors"])
def test_two_passes_a_step_are_two_branches(fresh: bool) -> None:
    track = Tracked()
    found = [(track(time, 1, fresh=fresh), track(time, 2, fresh=fresh)) for time in TIMES]
    for conditional, unconditional in found:
        assert conditional.branch is found[0][0].branch
        assert unconditional.branch is found[0][1].branch
        assert conditional.step == unconditional.step
        assert conditional.certain
        assert unconditional.certain


def test_a_repeated_timestep_is_the_next_evaluation() -> None:
    track = Tracked()
    found = [track(time) for time in (981, 884, 884, 787, 787, 690)]
    assert [p.step for p in found] == [0, 1, 2, 3, 4, 5]
    assert all(p.certain for p in found)


def test_a_first_timestep_that_comes_twice_is_doubted_until_a_step_has_shown_which() -> None:
    track = Tracked()
    found = [track(time) for time in (981, 981, 884, 787, 690)]
    assert [p.certain for p in found] == [True, False, False, True, True]
    assert [p.step for p in found] == [0, 0, 1, 2, 3]


def test_named_branches_do_not_mix() -> None:
    track = Tracked()
    found = [(track(time, 1, group="cond"), track(time, 1, group="uncond")) for time in TIMES]
    assert all(c.branch is found[0][0].branch and u.branch is found[0][1].branch for c, u in found)
    assert all(c.branch is not u.branch for c, u in found)


def test_a_branch_that_sat_out_a_step_is_forgotten() -> None:
    track = Tracked()
    first = track(981, 1), track(981, 2)
    track(884, 1)
    track(787, 1)
    assert track(787, 2).branch is not first[1].branch


# One run ----------------------------------------------------------------------------------------------------------


def test_a_run_follows_its_schedule() -> None:
    model = watched()
    assert model.run(times(*TIMES), prompt(0)) == EVERY_3RD
    assert model.run(times(*TIMES), prompt(1), seed=1) == EVERY_3RD
    assert model.counts["prologue"] == 2


def test_reuse_steps_equal_the_hooked_model() -> None:
    model = watched()
    oracle = HookOracle(model.model, ["middle"])
    for step, time in enumerate(times(*TIMES)):
        inputs = {"sample": latent(step), "timestep": time, "encoder_hidden_states": prompt(0)}
        assert_bitwise(plain_step(model.transformed, **inputs), oracle.step(step % 3 == 0, **inputs), f"step {step}")


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda time: torch.tensor([float(time)] * 2)])
def test_timesteps_of_any_kind(kind: Callable[[int], Any]) -> None:
    """Numbers, a 0-d tensor, one a sample; a number is no constant of the signature."""
    model = watched()
    assert model.run([kind(time) for time in TIMES], prompt(0)) == EVERY_3RD
    assert len(model.transformed._lightcache.runtime.repertoire.compiled) == 1


def test_a_number_computes_what_a_number_computes_in_eager() -> None:
    """Not as an integer tensor does, whose arithmetic is float32: Python's is float64."""

    class Model(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
            return sample * (timestep * 0.1) ** 0.5

    model = Model().eval()
    transformed = lc.transform(model)
    for time in range(1, 40):
        assert torch.equal(transformed(latent(0), time), model(latent(0), time)), time


def test_a_whole_number_that_picks_a_row_stays_whole() -> None:
    """What a float64 tensor cannot do, an integer tensor does."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(50, 4)

        def forward(self, sample: torch.Tensor, timestep: int) -> torch.Tensor:
            row = self.rows(torch.as_tensor(timestep)) if timestep is not None else self.rows.weight[0]
            return sample * row.sum()

    model = Model().eval()
    transformed = lc.transform(model)
    for time in range(1, 40):
        assert torch.equal(transformed(latent(0), time), model(latent(0), time)), time


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_of_any_grad_mode(mode: Callable[[], Any]) -> None:
    model = watched()
    conditioning = prompt(0)
    for _ in range(2):
        with mode():
            kinds = [model(latent(step) * 1, time, conditioning) for step, time in enumerate(times(*TIMES))]
        assert kinds == EVERY_3RD


def test_a_run_in_inference_mode_and_one_outside() -> None:
    """State made inside belongs to that run; the next one, outside, makes its own."""
    model = watched()
    with torch.inference_mode():
        inside = prompt(0) * 1
        assert model.run(times(*TIMES), inside) == EVERY_3RD
    assert model.run(times(*TIMES), prompt(1)) == EVERY_3RD
    with torch.inference_mode():
        assert model.run(times(*TIMES[:2]), inside) == EVERY_3RD[:2]
    kinds = [model(latent(step), time, inside.clone()) for step, time in enumerate(times(*TIMES[2:5]))]
    assert len(kinds) == 3


# Schedulers -------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "Heun": diffusers.HeunDiscreteScheduler,
    "KDPM2": diffusers.KDPM2DiscreteScheduler,
    "KDPM2Ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "PNDM with Runge-Kutta": diffusers.PNDMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "EulerTrailing": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", use_karras_sigmas=True),
    "DPM++": diffusers.DPMSolverMultistepScheduler,
    "DPM++ SDE": diffusers.DPMSolverSinglestepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "LCM": diffusers.LCMScheduler,
    "FlowMatchHeun": diffusers.FlowMatchHeunDiscreteScheduler,
}


def _loop(
    denoise: Callable[..., Any], scheduler: Any, num_steps: int, conditionings: Sequence[torch.Tensor]
) -> list[list[str]]:
    """A diffusers denoising loop, with one pass a conditioning; returns the kinds of each pass."""
    scheduler.set_timesteps(num_steps)
    sample = latent(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    kinds: list[list[str]] = [[] for _ in conditionings]
    generator = torch.Generator().manual_seed(0)
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, time) if hasattr(scheduler, "scale_model_input") else sample
        outputs = []
        for own, conditioning in zip(kinds, conditionings, strict=True):
            own.append(denoise(scaled, time, conditioning))
            outputs.append(denoise.output)  # type: ignore[attr-defined]
        noise = torch.stack(outputs).mean(0)
        takes_generator = "generator" in scheduler.step.__code__.co_varnames
        arguments = {"generator": generator} if takes_generator else {}
        sample = scheduler.step(noise, time, sample, **arguments).prev_sample
    return kinds


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # KDPM2 of diffusers
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("passes", [1, 2])
def test_scheduler_loops(name: str, passes: int) -> None:
    """Every evaluation counts as a step; two runs in a row are alike."""
    model = watched()
    conditionings = [prompt(seed) for seed in range(passes)]
    for _ in range(2):
        scheduler = SCHEDULERS[name]()
        for kinds in _loop(model, scheduler, 8, conditionings):
            expected = ["full" if step % 3 == 0 else "reuse" for step in range(len(kinds))]
            if name == "KDPM2Ancestral" and scheduler.timesteps[-1] == scheduler.timesteps[-2]:
                # Rounded to 0, the last timestep alone comes twice: that might be anything, so it is full. Where the
                # CPU rounds otherwise, it comes after one of 1e-6, as any other does.
                expected[-1] = "full"
            assert kinds == expected


@pytest.mark.parametrize("name", ["Heun", "PNDM", "Euler"])
def test_a_marked_run_of_a_scheduler_reads_no_timestep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightcache_fx import runtime

    def refuse(*_: Any) -> None:
        raise AssertionError("a marked run must not read the timestep")

    monkeypatch.setattr(runtime.HostReader, "time", refuse)
    model = watched()
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(6)
    conditioning = prompt(0)
    with lc.marked_run(len(scheduler.timesteps)):
        sample, kinds = latent(0), []
        for time in scheduler.timesteps:
            kinds.append(model(sample, time, conditioning))
            sample = scheduler.step(model.output, time, sample).prev_sample
            lc.step_done()
    assert kinds == ["full" if step % 3 == 0 else "reuse" for step in range(len(kinds))]


def test_rising_timesteps_are_never_stale() -> None:
    """Inversion: unmarked, each call might begin a run, so each is full; marked, the schedule holds."""
    model = watched()
    conditioning = prompt(0)
    assert set(model.run(times(*TIMES[::-1]), conditioning)) == {"full"}
    with lc.marked_run():
        kinds = []
        for time in times(*TIMES[::-1]):
            kinds.append(model(latent(0), time, conditioning))
            lc.step_done()
    assert kinds == EVERY_3RD


def test_timesteps_that_rise_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Z-Image's and Lumina's pipelines pass 1 - t: outside of a marked run nothing is ever reused."""
    model, conditioning = watched(), prompt(0)
    with caplog.at_level(logging.WARNING, "lightcache_fx"):
        model.run(times(*TIMES), conditioning)
        model.run(times(*TIMES[::-1])[:3], conditioning)
        for time in (700, 300, 900, 800):  # runs that were begun and left
            model(latent(0), torch.tensor(time), conditioning)
        assert caplog.text == ""
        model.run(times(*TIMES[::-1]), conditioning)
    (record,) = caplog.records
    assert "timesteps rise from call to call" in record.message
    assert "marked_run" in record.message


class Timeless(nn.Module):
    """Denoises tokens of which some are masked, as UVit does: nothing tells it the time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + self.middle(self.inner(sample))


def test_a_model_without_a_timestep_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    fast = lc.transform(Timeless().eval(), lc.Policy(cache=lc.Cache(cut="middle", interval=3)))
    with caplog.at_level(logging.WARNING, "lightcache_fx"), torch.no_grad():
        for _ in range(2):
            with lc.marked_run(3):
                for step in range(3):
                    fast(latent(step))
                    lc.step_done()
        assert lc.inspect(fast).counts == {"full": 2, "reuse": 4}
        assert caplog.text == ""
        for step in range(3):
            fast(latent(step))
    assert lc.inspect(fast).counts == {"full": 5, "reuse": 4}
    (record,) = caplog.records
    assert "Timeless takes no timestep" in record.message


# Branches ---------------------------------------------------------------------------------------------------------


def test_conditional_and_unconditional_passes_keep_their_own() -> None:
    model = watched()
    oracles = [HookOracle(model.model, ["middle"]) for _ in range(2)]
    prompts = [prompt(1), prompt(2)]
    for step, time in enumerate(times(*TIMES)):
        for oracle, conditioning in zip(oracles, prompts, strict=True):
            inputs = {"sample": latent(step), "timestep": time, "encoder_hidden_states": conditioning}
            expected = oracle.step(step % 3 == 0, **inputs)
            assert_bitwise(plain_step(model.transformed, **inputs), expected, f"step {step}")


@pytest.mark.parametrize("marked", [False, True])
def test_cache_context_tells_passes_of_one_prompt_apart(marked: bool) -> None:
    model = watched()
    oracles = {name: HookOracle(model.model, ["middle"]) for name in ("cond", "uncond")}
    conditioning = prompt(0)

    def loop() -> None:
        for step, time in enumerate(times(*TIMES)):
            for seed, (name, oracle) in enumerate(oracles.items()):
                inputs = {"sample": latent(2 * step + seed), "timestep": time, "encoder_hidden_states": conditioning}
                with model.transformed.cache_context(name):
                    found = plain_step(model.transformed, **inputs)
                assert_bitwise(found, oracle.step(step % 3 == 0, **inputs), f"step {step} {name}")
            lc.step_done()

    if marked:
        with lc.marked_run():
            loop()
    else:
        loop()


def test_guidance_that_pauses_for_a_while_is_not_stale() -> None:
    """A branch that was not called for some steps begins with a full step."""
    model = watched(interval=10)
    first, second = prompt(1), prompt(2)
    seen = []
    for step, time in enumerate(times(*TIMES)):
        model(latent(step), time, first)
        if step not in (2, 3):
            seen.append(model(latent(step), time, second))
    assert seen == ["full", "reuse", "full", "reuse", "reuse"]


def test_a_marked_branch_that_sat_out_steps_is_not_stale() -> None:
    """Two denoisers take turns in one marked run (Wan 2.2 has two)."""
    one, other = watched(interval=5), watched(interval=5)
    conditioning = prompt(0)
    seen = []
    with lc.marked_run():
        for step, time in enumerate(times(*TIMES)):
            if step in (0, 1, 4):
                seen.append(one(latent(step), time, conditioning))
            else:
                other(latent(step), time, conditioning)
            lc.step_done()
    assert seen == ["full", "reuse", "full"]


# Runs cut short, and others beginning in their place --------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("same_prompt", [True, False])
@pytest.mark.parametrize("marked", [False, True])
def test_a_run_after_one_that_was_cut_short(length: int, same_prompt: bool, marked: bool) -> None:
    @contextmanager
    def maybe_marked() -> Iterator[None]:
        if marked:
            with lc.marked_run():
                yield
        else:
            yield

    model = watched()
    first = prompt(0)
    second = first if same_prompt else prompt(1)
    with maybe_marked():
        for step, time in enumerate(times(*TIMES[:length])):
            model(latent(step), time, first)
            lc.step_done()
    before = model.counts["full"]
    with maybe_marked():
        kinds = []
        for step, time in enumerate(times(*TIMES)):
            kinds.append(model(latent(50 + step), time, second))
            lc.step_done()
    assert kinds[0] == "full"
    assert kinds[2:] == EVERY_3RD[2:]
    assert model.counts["full"] > before


@pytest.mark.parametrize(
    "start",
    [pytest.param(787), pytest.param(700), pytest.param(600), 300, 20],
)
def test_another_prompt_in_mid_schedule_is_not_answered_with_the_old_ones_features(start: int) -> None:
    """A run cut short after two steps, then image to image, which begins in mid-schedule."""
    model = watched(interval=10)
    model.run(times(981, 884), prompt(0))
    assert model(latent(9), torch.tensor(start), prompt(1)) == "full"


@pytest.mark.parametrize("start", [pytest.param(700), pytest.param(600), 300], ids=["700", "600", "300"])
def test_equal_conditioning_made_anew_in_mid_schedule_may_be_a_new_run(start: int) -> None:
    """Within the run the prompt was one tensor; an equal one that is another tensor comes from elsewhere."""
    model = watched(interval=10)
    model.run(times(981, 884, 800), prompt(0))
    assert model(latent(9), torch.tensor(start), prompt(0)) == "full"


def test_a_prompt_changed_in_mid_run_is_computed_with() -> None:
    """Hoisted values are never the old prompt's."""
    model = watched(interval=1)
    assert [model(latent(i), t, prompt(i // 3)) for i, t in enumerate(times(*TIMES))] == ["full"] * len(TIMES)


def test_a_prompt_changed_in_mid_run_is_a_full_step() -> None:
    model = watched(interval=10)
    prompts = [prompt(0), prompt(1)]
    kinds = [model(latent(i), t, prompts[i >= 3]) for i, t in enumerate(times(*TIMES))]
    assert kinds[3] == "full"


def test_conditioning_recreated_each_step_with_equal_values() -> None:
    model = watched()
    kinds = [model(latent(step), time, prompt(0)) for step, time in enumerate(times(*TIMES))]
    assert kinds == EVERY_3RD
    assert model.counts["prologue"] == 1


def test_a_new_shape_in_mid_run() -> None:
    model = watched(interval=10)
    small, large = prompt(0), prompt(0, batch=3)
    assert [model(latent(i), t, small) for i, t in enumerate(times(*TIMES[:3]))] == ["full", "reuse", "reuse"]
    assert [model(latent(i, 3), t, large) for i, t in enumerate(times(*TIMES[3:]))] == ["full"] + ["reuse"] * 3


def test_another_constant_in_mid_run() -> None:
    """A Python number that is no timestep belongs to the signature: other programs, other state."""
    model = watched(interval=10)
    conditioning = prompt(0)
    kinds = [model(latent(i), t, conditioning, scale=1.0 + (i > 2)) for i, t in enumerate(times(*TIMES))]
    assert kinds[:4] == ["full", "reuse", "reuse", "full"]


# Sharing ----------------------------------------------------------------------------------------------------------


def test_two_pipelines_of_one_schedule_interleaved() -> None:
    model = watched()
    first, second = prompt(1), prompt(2)
    oracles = {1: HookOracle(model.model, ["middle"]), 2: HookOracle(model.model, ["middle"])}
    for step, time in enumerate(times(*TIMES)):
        for seed, conditioning in ((1, first), (2, second)):
            inputs = {"sample": latent(10 * seed + step), "timestep": time, "encoder_hidden_states": conditioning}
            found = plain_step(model.transformed, **inputs)
            assert_bitwise(found, oracles[seed].step(step % 3 == 0, **inputs), f"step {step}")


def test_two_pipelines_of_different_schedules_interleaved_do_not_mix() -> None:
    """Unmarked, that cannot be told from one pipeline whose conditioning changes: full programs are right for both."""
    model = watched(interval=10)
    first, second = prompt(1), prompt(2)
    kinds = []
    for step in range(4):
        kinds.append(model(latent(step), torch.tensor(981 - 97 * step), first))
        kinds.append(model(latent(step), torch.tensor(940 - 95 * step), second))
    assert kinds == ["full"] * 8


def test_two_marked_pipelines_interleaved_do_not_mix() -> None:
    """Each in a context of its own, step by step; full steps are compared with eager by `Watched`."""
    import contextvars

    model = watched(interval=10)

    def one_step(seed: int, step: int) -> str:
        kind = model(latent(step), torch.tensor(TIMES[step]), prompt(seed))
        lc.step_done()
        return kind

    contexts = [contextvars.copy_context() for _ in range(2)]
    managers = [lc.marked_run() for _ in contexts]
    runs = [context.run(manager.__enter__) for context, manager in zip(contexts, managers, strict=True)]
    assert runs[0].number != runs[1].number
    kinds = [context.run(one_step, seed, step) for step in range(4) for seed, context in enumerate(contexts)]
    for context, manager in zip(contexts, managers, strict=True):
        context.run(manager.__exit__, None, None, None)
    assert kinds == ["full"] * 8  # the tracker holds one marked run at a time


def test_more_signatures_than_are_kept() -> None:
    """Alternating shapes with room for one: state of a dropped signature is never taken for another's."""
    model = watched(interval=10, max_signatures=1)
    for step, time in enumerate(times(*TIMES)):
        batch = 1 + step % 3
        model(latent(step, batch), time, prompt(0, batch))
        assert len(model.transformed._lightcache.runtime.repertoire.compiled) == 1


def test_reset_forgets_the_run() -> None:
    model = watched(interval=10)
    conditioning = prompt(0)
    model.run(times(*TIMES[:3]), conditioning)
    lc.reset(model.transformed)
    assert lc.inspect(model.transformed).kept_bytes == 0
    assert model(latent(0), torch.tensor(500), conditioning) == "full"


# What changes under a run -----------------------------------------------------------------------------------------


def test_a_prompt_tensor_changed_in_place() -> None:
    model = watched(interval=1)
    conditioning = prompt(0)
    for step, time in enumerate(times(*TIMES)):
        conditioning.mul_(1.5)
        assert model(latent(step), time, conditioning) == "full"
    assert model.counts["prologue"] == len(TIMES)


def test_a_prompt_changed_in_place_within_a_cached_run_reaches_the_next_full_step() -> None:
    model = watched(interval=2)
    conditioning = prompt(0)
    for step, time in enumerate(times(*TIMES)):
        conditioning.add_(1)
        model(latent(step), time, conditioning)


def test_a_latent_written_to_after_the_step_does_not_reach_the_cache() -> None:
    model = watched(interval=10)
    conditioning, sample = prompt(0), latent(0)
    oracle = HookOracle(model.model, ["middle"])
    for step, time in enumerate(times(*TIMES)):
        inputs = {"sample": sample, "timestep": time, "encoder_hidden_states": conditioning}
        expected = oracle.step(step == 0, **inputs)
        (found,) = plain_step(model.transformed, **inputs)
        assert_bitwise([found], expected, f"step {step}")
        found.mul_(0.5)
        sample.sub_(found)  # as a scheduler that works in place would


def test_a_kept_view_of_the_latent_is_not_changed_by_writing_to_the_latent() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.layer(self.same(sample).sin()) * timestep + sample

    model = Model().eval().requires_grad_(False)
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut="same", interval=3)))
    oracle, sample = HookOracle(model, ["same"]), latent(0)
    for step in range(2):
        inputs = {"sample": sample, "timestep": torch.tensor(9 - step)}
        expected = oracle.step(step == 0, **inputs)
        assert_bitwise(plain_step(transformed, **inputs), expected, f"step {step}")
        sample.zero_()


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m.middle.embed[0].weight.mul_(2),
    "data": lambda m: setattr(m.middle.embed[0].weight, "data", m.middle.embed[0].weight.data * 2),
    "data in place": lambda m: m.middle.embed[0].weight.data.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict(Denoiser(seed=5).state_dict()),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(Denoiser(seed=5).state_dict(), assign=True),
    "another parameter": lambda m: setattr(m.middle.embed[0], "weight", nn.Parameter(torch.ones(32, 3))),
    "another module": lambda m: setattr(m, "inner", nn.Sequential(nn.Linear(4, 8), nn.Tanh()).eval()),
    "activation": lambda m: setattr(m.middle.embed, "1", nn.GELU()),
    "attribute": lambda m: setattr(m.outer, "forward", lambda x: nn.functional.linear(x, m.outer.weight)),
    "hook": lambda m: m.middle.register_forward_hook(lambda module, args, output: output * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits_between_runs(name: str) -> None:
    """Full steps equal the edited eager model, bitwise (checked by `Watched`)."""
    model = watched()
    conditioning = prompt(0)
    model.run(times(*TIMES), conditioning)
    before = model.model(latent(0), torch.tensor(981), conditioning)
    with torch.no_grad():
        EDITS[name](model.model)
    assert not torch.equal(before, model.model(latent(0), torch.tensor(981), conditioning)), "the edit did nothing"
    assert model.run(times(*TIMES), conditioning) == EVERY_3RD


def test_weights_edited_in_mid_run() -> None:
    """Hoisted values depend on weights too; torch counts the writes (except those through `.data`)."""
    model = watched(interval=1)
    conditioning = prompt(0)
    for step, time in enumerate(times(*TIMES)):
        with torch.no_grad():
            model.model.middle.embed[0].weight.mul_(1.1)
        model(latent(step), time, conditioning)


def test_tied_weights_that_are_untied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(sample).tanh()) * timestep

    model = Tied().eval().requires_grad_(False)
    transformed = lc.transform(model)
    plain_step(transformed, sample=latent(0), timestep=5)
    model.two.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    assert torch.equal(transformed(latent(0), 4), model(latent(0), torch.tensor(4)))


def test_a_tensor_that_is_no_buffer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.ones(4)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample * self.gain * timestep

    model = Model().eval()
    transformed = lc.transform(model)
    for edit in (lambda: None, lambda: model.gain.mul_(3), lambda: setattr(model, "gain", torch.full((4,), 7.0))):
        edit()
        assert torch.equal(transformed(latent(0), 5), model(latent(0), 5))


def test_hooks_on_the_root_run_once() -> None:
    model = Denoiser()
    model.register_forward_hook(lambda module, args, output: output * 2)
    transformed = lc.transform(model)
    inputs = (latent(0), torch.tensor(5), prompt(0))
    assert torch.equal(transformed(*inputs), model(*inputs))


def test_hooks_put_on_the_drop_in_are_those_of_the_original() -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    calls = []
    handle = transformed.middle.register_forward_hook(lambda *_: calls.append(1))
    model(latent(0), torch.tensor(5), prompt(0))
    assert calls
    handle.remove()


def test_to_another_dtype() -> None:
    model = watched()
    model.run(times(*TIMES), prompt(0))
    model.transformed.to(torch.bfloat16)
    conditioning = prompt(0).bfloat16()
    kinds = [model(latent(i).bfloat16(), t, conditioning) for i, t in enumerate(times(*TIMES))]
    assert kinds == EVERY_3RD
    assert model.output.dtype is torch.bfloat16
    model.transformed.to(torch.float32)
    assert model.run(times(*TIMES), prompt(0)) == EVERY_3RD


def test_deepcopy_is_transformed_and_apart() -> None:
    model = watched()
    twin = copy.deepcopy(model.transformed)
    conditioning = prompt(0)
    model.run(times(*TIMES[:2]), conditioning)
    with torch.no_grad():
        twin.inner.weight.zero_()
        expected = lc.restore(twin)(latent(0), torch.tensor(3), conditioning)
        assert torch.equal(twin(latent(0), torch.tensor(3), conditioning), expected)
    assert model(latent(5), torch.tensor(TIMES[2]), conditioning) == "reuse"


# A Stable Diffusion U-Net under adapters --------------------------------------------------------------------------


@pytest.fixture(params=[None, "aot_eager"], ids=["as it is", "compiled"])
def unet(request: pytest.FixtureRequest) -> tuple[Watched, dict[str, Any]]:
    """The smallest Stable Diffusion U-Net that has attention, a skip connection to keep and what FreeU changes."""
    model = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None, norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2,
    )  # fmt: skip
    randomize(model)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(1, 4, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 4, generator=generator),
        "timestep": torch.tensor(900),
        "return_dict": False,
    }
    policy = lc.Policy(cache=lc.Cache(cut=0, interval=2), compile=request.param)
    return Watched(model, policy), inputs


def _two_steps(model: Watched, inputs: dict[str, Any]) -> torch.Tensor:
    """A full step, which must equal eager, and a reuse step; returns what the full one did."""
    before = model.counts
    found = plain_step(model.transformed, **inputs)
    assert_bitwise(found, plain_step(model.model, **inputs))
    plain_step(model.transformed, **{**inputs, "timestep": torch.tensor(800)})
    assert [model.counts.get(k, 0) - before.get(k, 0) for k in ("full", "reuse")] == [1, 1]
    return found[0]


def test_lora_injected_rescaled_switched_off_and_fused(unet: tuple[Watched, dict[str, Any]]) -> None:
    from peft import LoraConfig

    model, inputs = unet
    seen = [_two_steps(model, inputs)]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.transformed.add_adapter(config, adapter_name="style")
    seen.append(_two_steps(model, inputs))
    model.transformed.set_adapters(["style"], weights=[0.25])
    seen.append(_two_steps(model, inputs))
    model.transformed.disable_adapters()
    assert torch.equal(_two_steps(model, inputs), seen[0])
    model.transformed.enable_adapters()
    model.transformed.fuse_lora(lora_scale=0.5)
    seen.append(_two_steps(model, inputs))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen)), "an edit did nothing"


def test_attention_processors_and_freeu(unet: tuple[Watched, dict[str, Any]]) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    class Doubling(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().__call__(*args, **kwargs) * 2

    model, inputs = unet
    seen = [_two_steps(model, inputs)]
    model.transformed.set_attn_processor(Doubling())
    seen.append(_two_steps(model, inputs))
    model.transformed.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    seen.append(_two_steps(model, inputs))
    model.transformed.enable_freeu(s1=0.5, s2=0.2, b1=1.3, b2=1.4)
    seen.append(_two_steps(model, inputs))
    model.transformed.disable_freeu()
    assert torch.equal(_two_steps(model, inputs), seen[1])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen)), "an edit did nothing"
