"""Stages of a pipeline that hand over: the next one's first weights flow in behind the last call of the one before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import compiler
from lightcache_fx.caching import Cache
from lightcache_fx.compiled import LastCall
from lightcache_fx.costs import CPU
from lightcache_fx.handover import plan_hand_over, saved_seconds
from lightcache_fx.hardware import Hardware
from lightcache_fx.ledger import Ledger
from lightcache_fx.measure import measure_peak
from lightcache_fx.passes.insert_transfers import LocalStay
from lightcache_fx.policy import Policy, Swap
from lightcache_fx.runs import RunTracker
from lightcache_fx.swap_transfers import transfers_of
from lightcache_fx.transfers import PREFETCH, WAIT, recorded_copies
from lightcache_fx.workload import Residence, Stay
from pipelines import PIPELINES, SMALL
from pretend_device import DEVICE, pretended
from swap_cases import SLOW, interrupted_at, workload
from test_swapping import HARDWARE
from toys import Tower, latent

NUM_STEPS = 5


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: HARDWARE)


class Stage(nn.Module):
    """Layers in a row whose weights are large beside its activations; neither denoises nor has a decoder's methods.

    Shapes: sample (B, `first`) -> (B, `last`).
    """

    def __init__(self, first: int, last: int, seed: int, num_layers: int = 4, width: int = 96) -> None:
        super().__init__()
        sizes = [first, *[width] * num_layers, last]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            sample = torch.tanh(layer(sample))
        return sample


class Scheduler:
    def set_timesteps(self, num_steps: int) -> None:
        self.timesteps = torch.linspace(900, 100, num_steps)

    def step(self, noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample - noise / 8


class Pipeline:
    """An encoder, a denoiser and a decoder one after the other, and a refiner where it is asked for."""

    model_cpu_offload_seq = "encoder->denoiser->refiner->decoder"

    def __init__(self, width: int = 64) -> None:
        self.encoder, self.denoiser = Stage(3, 3, 1), Tower(width=width)
        self.refiner, self.decoder = Stage(4, 4, 2), Stage(4, 8, 3)
        self.scheduler = Scheduler()
        self.between: Callable[[], None] = lambda: None
        self.device = torch.device("cpu")

    @property
    def components(self) -> dict[str, Any]:
        names = ("encoder", "denoiser", "refiner", "decoder", "scheduler")
        return {name: getattr(self, name) for name in names}

    def __call__(
        self, seed: int = 0, num_steps: int = NUM_STEPS, *, refined: int = 0, decoded: int = 1, batch: int = 2
    ) -> torch.Tensor:
        with torch.no_grad():
            condition = self.encoder(latent(1000 + seed, batch)[:, :3].to(self.device))
            self.scheduler.set_timesteps(num_steps)
            sample = latent(seed, batch).to(self.device)
            for timestep in self.scheduler.timesteps.to(self.device):
                sample = self.scheduler.step(self.denoiser(sample, timestep, condition), sample)
            self.between()
            for _ in range(refined):
                sample = self.refiner(sample)
            return torch.cat([self.decoder(sample + number) for number in range(decoded)])


def policy(budget: str | int | None = "60%", interval: int = 2, **settings: Any) -> Policy:
    return Policy(cache=Cache(cut=0, interval=interval), swap=Swap(budget=budget), **settings)


def unswapped(asked: Policy) -> Policy:
    return asked.model_copy(update={"swap": None, "memory_budget": None})


def pipelines(asked: Policy, **settings: Any) -> tuple[Any, Any]:
    """One that swaps, and one that does not."""
    swapping = lc.transform_pipeline(Pipeline(**settings), asked)
    return swapping, lc.transform_pipeline(Pipeline(**settings), unswapped(asked))


def runtime_of(pipe: Any, name: str) -> Any:
    return getattr(pipe, name)._lightcache.runtime


def late(pipe: Any, name: str) -> int:
    made = runtime_of(pipe, name).repertoire.compiled.values()
    return sum(bound.late_copies for compiled in made for bound in compiled.bound.values())


def late_of(pipe: Any, name: str, **call: Any) -> int:
    before = late(pipe, name)
    pipe(**call)
    return late(pipe, name) - before


def last_calls(pipe: Any, name: str) -> list[LastCall]:
    return [last for compiled in runtime_of(pipe, name).repertoire.compiled.values() for last in compiled.last.values()]


def nothing_is_held(pipe: Any) -> bool:
    trackers = [runtime_of(pipe, name).tracker for name in pipe._lightcache.components]
    copies = [pipe._lightcache.ledger.handed, *(tracker.weight_copies for tracker in trackers[1:-1])]
    return all(not held.num_bytes() for held in copies)


def budgets_kept(pipe: Any) -> bool:
    lasts = [(name, last.plan) for name in STAGES for last in last_calls(pipe, name)]
    plans = {name: runtime_of(pipe, name).repertoire.latest().plan.swap.plan for name in STAGES}
    return all(last is None or last.peak_bytes <= plans[name].budget for name, last in lasts)


STAGES = ("encoder", "denoiser", "decoder")


# What is handed over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("budget", ["30%", "60%", "100%", None])
def test_the_next_stage_finds_its_first_weights(budget: str | None, interval: int) -> None:
    """From the second generation on, and the bits are those of everything resident."""
    swapping, plain = pipelines(policy(budget, interval))
    counts = []
    for seed in (0, 0, 1, 2):
        before = [late(swapping, name) for name in STAGES]
        assert torch.equal(swapping(seed), plain(seed))
        assert nothing_is_held(swapping)
        counts.append([late(swapping, name) - number for name, number in zip(STAGES, before, strict=True)])
    first, *later = counts
    assert first[2] == 5, "all of the decoder's weights"
    assert later == [[5, later[0][1], 0]] * 3
    assert later[0][1] < first[1] or first[1] == 0
    assert len(last_calls(swapping, "encoder")) == len(last_calls(swapping, "denoiser")) == 1
    (last,), denoiser = last_calls(swapping, "denoiser"), runtime_of(swapping, "denoiser").repertoire.latest()
    assert not denoiser.bound[last.name].resident, "what it does not read makes room"
    assert budgets_kept(swapping)


def test_copies_are_begun_behind_the_computing_of_the_last_step() -> None:
    """And each of the decoder's weights is copied once."""
    swapping, _ = pipelines(policy("30%"))
    swapping()
    swapping()
    begun: dict[str, list[list[str]]] = {name: [] for name in STAGES}
    original = {name: getattr(swapping, name).forward for name in STAGES}

    def recorded(name: str) -> Callable[..., torch.Tensor]:
        def forward(*args: torch.Tensor) -> torch.Tensor:
            with recorded_copies() as log:
                found: torch.Tensor = original[name](*args)
                WAIT(PREFETCH(torch.ones(1), torch.device("cpu"), "the end"))
            begun[name].append([copy.name for copy in log.copies if copy.way == "in"])
            return found

        return forward

    for name in STAGES:
        setattr(swapping, name, recorded(name))
    swapping()
    decoder = [f"layers.{number}.weight" for number in range(5)]
    assert begun["decoder"] == [["the end"]]
    assert [name for name in begun["denoiser"][-1] if name in decoder] == decoder
    assert not any(set(decoder) & set(copies) for copies in begun["denoiser"][:-1])


@pytest.mark.parametrize("steps", [(5, 3, 7, 5), (1, 1, 1), (2, 1, 4)])
@pytest.mark.parametrize("interval", [1, 3])
def test_runs_of_other_lengths(steps: tuple[int, ...], interval: int) -> None:
    """The last step is known by the run's own number of steps."""
    swapping, plain = pipelines(policy("40%", interval))
    for number, num_steps in enumerate(steps):
        before = late(swapping, "decoder") if number else 0
        assert torch.equal(swapping(number, num_steps), plain(number, num_steps))
        assert late(swapping, "decoder") - before == (0 if number else 5)


def test_a_stage_that_is_called_several_times() -> None:
    """Only behind the last of its calls is the next stage expected, by the generation before."""
    swapping, plain = pipelines(policy("40%"))
    for number, decoded in enumerate((2, 2, 3, 1, 1)):
        before = late(swapping, "decoder") if number else 0
        assert torch.equal(swapping(number, decoded=decoded), plain(number, decoded=decoded))
        assert late(swapping, "decoder") - before == 5 * decoded - 5 * bool(number)


def test_a_stage_behind_the_denoiser_that_is_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a run of so many steps, which say nothing of its calls."""
    swapping, plain = pipelines(policy("40%"))
    handed: list[RunTracker] = []
    hand_to = Ledger.hand_to
    monkeypatch.setattr(Ledger, "hand_to", lambda self, tracker: (handed.append(tracker), hand_to(self, tracker))[1])
    for seed in range(3):
        handed.clear()
        assert torch.equal(swapping(seed, refined=2), plain(seed, refined=2))
    assert handed == [runtime_of(swapping, name).tracker for name in ("denoiser", "refiner", "decoder")]


# Where the guess is wrong ------------------------------------------------------------------------------------------


def test_another_stage_than_was_expected() -> None:
    """What was fetched for the one is dropped before the other begins, and the order is learned anew."""
    swapping, plain = pipelines(policy("40%"))
    refined = (False, False, True, True, False, False)
    expected = (5, 0, 5, 1, 5, 0)  # the refiner's budget has room for four of the decoder's five
    held: list[int] = []
    enter = Ledger.enter

    def entered(self: Ledger, tracker: RunTracker, num_steps: int | None = None) -> None:
        enter(self, tracker, num_steps)
        held.append(self.handed.num_bytes() if tracker is not self._handed_to else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "enter", entered)
        for number, (is_refined, count) in enumerate(zip(refined, expected, strict=True)):
            before = late(swapping, "decoder") if number else 0
            assert torch.equal(swapping(number, refined=is_refined), plain(number, refined=is_refined))
            assert late(swapping, "decoder") - before == count
            assert nothing_is_held(swapping)
    assert not any(held)


def test_other_sizes_than_were_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's weights are the same for all, its programs are not; nothing is held while these are captured."""
    swapping, plain = pipelines(policy("40%"))
    held, captured = [], compiler.capture

    def capturing(*args: Any, **kwargs: Any) -> Any:
        held.append(swapping._lightcache.ledger.handed.num_bytes())
        return captured(*args, **kwargs)

    monkeypatch.setattr(compiler, "capture", capturing)
    for number, batch in enumerate((2, 2, 4, 4, 2, 4)):
        assert torch.equal(swapping(number, batch=batch), plain(number, batch=batch))
        assert nothing_is_held(swapping)
    assert held
    assert not any(held)
    assert budgets_kept(swapping)


@pytest.mark.parametrize("how", ["in place", "replaced", "smaller", "cast"])
def test_weights_that_change_while_they_are_on_their_way(how: str) -> None:
    """Between the denoiser's last step and the decoder's call."""

    def change(decoder: Any) -> None:
        layer = decoder.layers[2]
        if how == "in place":
            layer.weight.mul_(2)
        elif how == "replaced":
            layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
        elif how == "smaller":
            layer.weight = nn.Parameter(layer.weight[:1].expand(96, 96) * 2, requires_grad=False)
        else:
            layer.weight.data = (layer.weight * 2).clone()

    found = []
    for pipe in pipelines(policy("40%")):
        pipe()
        pipe.between = lambda pipe=pipe: change(pipe.decoder)
        found.append(pipe())
    assert torch.equal(*found)


def test_weights_of_other_sizes_take_no_room() -> None:
    """The next stage's weights were replaced before the last step: what is not as it was planned for is left out."""
    swapping, plain = pipelines(policy("40%"))
    for pipe in (swapping, plain):
        pipe()
        pipe()
        wide = Stage(4, 8, 3, width=160)
        for layer, wider in zip(pipe.decoder.layers, wide.layers, strict=True):
            layer.weight, layer.bias = wider.weight, wider.bias
    held: list[int] = []
    swapping.between = lambda: held.append(swapping._lightcache.ledger.handed.num_bytes())
    for seed in (0, 1):
        assert torch.equal(swapping(seed), plain(seed))
    assert held[0] == 0 < held[1], "planned for the new weights once these have been called"
    assert budgets_kept(swapping)


@pytest.mark.parametrize("at", [0, 7, 19, 33])
def test_an_interrupted_generation(at: int) -> None:
    """Nothing is left on the device; the order is known from the generation before, and the next one is right."""
    swapping, plain = pipelines(policy("40%"))
    swapping()
    with interrupted_at(at):
        swapping()
    assert nothing_is_held(swapping)
    assert runtime_of(swapping, "decoder").tracker.weight_copies.num_bytes() == 0
    assert late_of(swapping, "decoder") == 0
    assert torch.equal(swapping(3), plain(3))


def test_a_pipeline_that_raises_behind_the_denoiser() -> None:
    swapping, plain = pipelines(policy("40%"))
    swapping()

    def broken() -> None:
        assert swapping._lightcache.ledger.handed.num_bytes()
        raise ValueError("broken")

    swapping.between = broken
    with pytest.raises(ValueError, match="broken"):
        swapping()
    swapping.between = lambda: None
    assert nothing_is_held(swapping)
    assert late_of(swapping, "decoder") == 0
    assert torch.equal(swapping(2), plain(2))


def test_stages_outside_a_generation_hand_nothing_over() -> None:
    swapping, plain = pipelines(policy("40%"))
    swapping()
    call = latent(0), torch.tensor(300.0), latent(1)[:, :3]
    with torch.no_grad():
        assert torch.equal(swapping.denoiser(*call), plain.denoiser(*call))
        assert torch.equal(swapping.decoder(call[0]), plain.decoder(call[0]))
    assert not swapping._lightcache.ledger.handed.held


def test_copies_that_begin_when_they_are_needed_are_not_handed_over() -> None:
    asked = Policy(cache=Cache(cut=0, interval=2), swap=Swap(budget="40%", prefetch=False))
    swapping, plain = pipelines(asked)
    for seed in range(3):
        assert torch.equal(swapping(seed), plain(seed))
    assert not last_calls(swapping, "denoiser")


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["40%", "50%", "70%"])
def test_the_budget_is_kept_and_the_peak_is_as_planned(budget: str) -> None:
    """Measured by allocation events; what is handed over takes room that the steps' plan leaves."""
    swapping = lc.transform_pipeline(Pipeline(width=128), policy(budget, interval=1))
    swapping()
    swapping()
    (last,) = last_calls(swapping, "denoiser")
    plan = runtime_of(swapping, "denoiser").repertoire.latest().plan.swap
    assert last.plan is not None
    measured = measure_peak(swapping).peak_bytes
    small = sum(weight.nbytes for name, weight in swapping.denoiser.named_parameters() if name not in plan.weights)
    assert 1.02 * plan.plan.peak_bytes < last.plan.peak_bytes <= plan.plan.budget
    assert measured + small <= last.plan.peak_bytes
    assert measured + small == pytest.approx(last.plan.peak_bytes, rel=0.01)


def test_models_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that would not fit the device together, nor the denoiser alone, hand over within the budget there."""
    asked = Policy(cache=Cache(cut=0, interval=2), memory_budget=200_000)
    expected = lc.transform_pipeline(Pipeline(), unswapped(asked))(1)
    with pretended(monkeypatch, 250_000) as device:
        swapping = lc.transform_pipeline(Pipeline(), asked)
        swapping.device = DEVICE
        for seed in (0, 0):
            swapping(seed)
        assert device.num_bytes < 1024
        before, device.peak_bytes = late(swapping, "decoder"), device.num_bytes
        found = swapping(1)
        assert late(swapping, "decoder") == before
        assert found.cpu().tolist() == expected.tolist()
        (last,) = last_calls(swapping, "denoiser")
        assert last.plan is not None
        assert last.plan.num_bytes > 100_000
        assert device.peak_bytes <= 200_000 + 1024


@pytest.mark.parametrize("budget", ["40%", "100%"])
@pytest.mark.parametrize(("interval", "num_steps"), [(1, 3), (3, 1), (3, 5), (3, 6), (4, 7)])
def test_a_pipeline_plan_says_what_is_handed_over(budget: str, interval: int, num_steps: int) -> None:
    """The very transfers of the programs that run."""
    pipe, asked = Pipeline(), policy(budget, interval)
    calls = {"encoder": (latent(0)[:, :3],), "denoiser": (latent(0), torch.tensor(900.0), latent(1)[:, :3])}
    calls["decoder"] = (latent(0),)
    counts = {"encoder": 1, "denoiser": num_steps, "decoder": 1}
    stages = [lc.Stage(name, getattr(pipe, name), calls[name], calls=counts[name]) for name in STAGES]
    plan = lc.plan_pipeline(stages, asked)
    swapping = lc.transform_pipeline(pipe, asked)
    swapping(num_steps=num_steps)
    swapping(num_steps=num_steps)
    for planned in plan.stages[:2]:
        (last,) = last_calls(swapping, planned.stage.name)
        assert planned.hands_over == last.plan
        assert planned.swap is not None
        assert planned.peak_bytes <= planned.swap.plan.budget
    assert plan.stages[2].hands_over is None
    assert (plan.stages[2].saved_seconds > 0) == bool(plan.stages[1].hands_over.in_time)
    assert plan.stages[2].saved_seconds > 0 or interval > 1, "a full step is long enough"
    assert plan.as_dict()["stages"]["denoiser"]["handed_over_bytes"] > 100_000
    assert "stages hand over their first weights" in str(plan)


def test_a_last_call_by_hand() -> None:
    """Room for 7 bytes; `w` is handed in for `a` and fetched again for `d` and the next `a`; `r` is resident."""
    step = "a 1 0 w -\nb 1 0 r -\nc 1 0 v -\nd 1 0 w -\ne 1 0 - -"
    period = workload(step, sizes={"w": 4, "r": 2, "v": 3})
    residence = Residence(frozenset("r"), (Stay("v", 1, 2, 2), Stay("w", 3, 3, 5)))
    swap = SimpleNamespace(
        workload=period,
        plan=SimpleNamespace(residence=residence, budget=7),
        transfers=transfers_of(residence, period),
        hardware=Hardware(CPU, SLOW),
    )
    found = plan_hand_over(swap, 0, {"x": 2, "y": 2, "z": 3, "too large": 9})
    assert found.sizes == {"x": 2, "y": 2, "z": 3}
    assert found.peak_bytes == 7
    assert found.in_time == {"x"}, "from `b` to `d`; the others begin at `e`"
    assert set(found.transfers.stays) == {
        LocalStay("r", "weight", None, ("b",)),
        LocalStay("w", "weight", None, ("a",)),
        LocalStay("v", "weight", "b", ("c",)),
        LocalStay("w", "weight", "d", ("d",)),
        LocalStay("x", "next", "b", (), handed_on=True),
        LocalStay("y", "next", "e", (), handed_on=True),
        LocalStay("z", "next", "e", (), handed_on=True),
    }
    assert [stay.name for stay in found.transfers.stays if stay.kind == "next"] == ["x", "y", "z"]
    late = plan_hand_over(swap, 0, {"x": 1})
    assert [stay.prefetch for stay in late.transfers.stays if stay.kind == "next"] == ["e"], "no earlier than it must"


def test_time_that_is_saved_by_hand() -> None:
    """A byte a second: of 2 + 3 + 4 bytes that are loaded as the stage begins, what is there is not waited for."""
    steps = workload("a 1 0 u -\nb 1 0 v -\nc 1 0 w -", sizes={"u": 2, "v": 3, "w": 4}, cyclic=False)
    stays = tuple(Stay(name, 0, place, place) for place, name in enumerate("uvw"))
    found = SimpleNamespace(
        workload=steps, plan=SimpleNamespace(residence=Residence(frozenset(), stays)), hardware=Hardware(CPU, SLOW)
    )
    cold = 9 + 1
    for there, seconds in (("", cold), ("u", 7 + 1), ("uv", 4 + 1), ("uvw", 3), ("w", 5 + 2)):
        assert saved_seconds(found, set(there)) == cold - seconds


# A real pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("svd", marks=pytest.mark.slow), "sd", "easyanimate"])
def test_pipelines(name: str) -> None:
    case = PIPELINES[name]
    pipe, asked = case.build(), Policy(swap=Swap(budget="70%"))
    expected = case.generate(lc.transform_pipeline(pipe, Policy()), 0, SMALL, num_steps=3)
    swapping = lc.transform_pipeline(pipe, asked)
    counts = []
    for _ in range(3):
        before = late(swapping, "vae")
        assert torch.equal(case.generate(swapping, 0, SMALL, num_steps=3), expected)
        counts.append(late(swapping, "vae") - before)
        assert not swapping._lightcache.ledger.handed.held
    assert counts[1] == counts[2] < counts[0]
