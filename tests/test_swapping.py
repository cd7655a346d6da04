"""Swapped programs: the same bits as unswapped ones, within the budget, and right again after whatever went wrong."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import lightcache_fx as lc
from lightcache_fx import compiler, graphs, module_state, transfers
from lightcache_fx.caching import Cache
from lightcache_fx.capture import capture
from lightcache_fx.costs import CPU
from lightcache_fx.errors import ArgumentError, BudgetError, PolicyError, SwapError
from lightcache_fx.hardware import Hardware
from lightcache_fx.measure import measure_peak
from lightcache_fx.policy import Chunk, Policy, Swap
from lightcache_fx.schedule import Schedule
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.transfers import copy_bytes, engine_of, recorded_copies
from lightcache_fx.workload import Link
from oracle import plain_step
from pipelines import PIPELINES, SMALL
from swap_cases import interrupted_at, small_weights
from toys import Tower, latent, prompt
from zoo import ZOO, run_inputs

HARDWARE = Hardware(CPU, Link(to_device=2e9, from_device=1e9))
INTERVAL = 3
NUM_STEPS = 8


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on how fast this machine is just now."""
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: HARDWARE)


def policy(budget: str | int | None = "60%", interval: int = INTERVAL, **settings: Any) -> Policy:
    return Policy(cache=Cache(cut=0, interval=interval), swap=Swap(budget=budget), **settings)


def generate(
    model: nn.Module, seed: int = 0, num_steps: int = NUM_STEPS, prompts: Sequence[int] = (0,)
) -> list[torch.Tensor]:
    """One generation: every step's predictions, one for each guidance branch."""
    conditions = [prompt(number) for number in prompts]
    outputs = []
    with torch.no_grad(), lc.marked_run(num_steps):
        for step in range(num_steps):
            timestep = torch.tensor(900.0 - 100 * step)
            outputs += [model(latent(seed + step), timestep, condition) for condition in conditions]
            lc.step_done()
    return outputs


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def unswapped(asked: Policy) -> Policy:
    return asked.model_copy(update={"swap": None, "memory_budget": None})


def wait_for_copies() -> None:
    transfers.WAIT(transfers.PREFETCH(torch.ones(1), torch.device("cpu"), "behind all that is under way"))


def swap_of(model: nn.Module) -> SwapSchedule:
    swap = lc.inspect(model).plan.swap
    assert swap is not None
    return swap


# Bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["25%", "40%", "60%", "80%", "100%", None])
def test_bits_do_not_change(budget: str | None) -> None:
    """Cold, warm, and a third time; with another seed, and after another number of steps."""
    model = Tower()
    asked = policy(budget)
    swapped, plain = lc.transform(copy.deepcopy(model), asked), lc.transform(model, unswapped(asked))
    for seed, num_steps in ((0, 8), (0, 8), (0, 8), (5, 8), (5, 4)):
        assert_same(generate(swapped, seed, num_steps), generate(plain, seed, num_steps))
    counts = lc.inspect(swapped).counts
    assert counts["full"] < counts["reuse"], "caching went on"
    assert swap_of(swapped).moves == (budget != "100%")


@pytest.mark.parametrize("interval", [1, 2, 5, 12])
def test_any_interval(interval: int) -> None:
    asked = policy(interval=interval)
    expected = generate(lc.transform(Tower(), unswapped(asked)), num_steps=14)
    assert_same(generate(lc.transform(Tower(), asked), num_steps=14), expected)


@pytest.mark.parametrize("steps", [[0, 1, 5], [0, 4, 5, 6], [0]])
def test_schedules_without_an_interval(steps: list[int]) -> None:
    asked = Policy(cache=Cache(cut=0, steps=steps), swap=Swap(budget="50%"))
    assert_same(generate(lc.transform(Tower(), asked)), generate(lc.transform(Tower(), unswapped(asked))))


def test_guidance_branches_have_slots_of_their_own() -> None:
    asked = policy("40%")
    expected = generate(lc.transform(Tower(), unswapped(asked)), prompts=(0, 1, 2))
    swapped = lc.transform(Tower(), asked)
    for _ in range(2):
        assert_same(generate(swapped, prompts=(0, 1, 2)), expected)


def test_unmarked_runs() -> None:
    """Timesteps alone tell steps apart; nothing says how many there will be."""
    swapped, plain = (lc.transform(Tower(), asked) for asked in (policy("50%"), unswapped(policy())))
    condition = prompt(0)
    for step in (900, 800, 700, 600, 900, 800, 700):
        call = latent(step), torch.tensor(float(step)), condition
        with torch.no_grad():
            assert torch.equal(swapped(*call), plain(*call))


def test_slots_leave_and_come_back() -> None:
    """A slot that there is no room for beside later blocks is sent away, and fetched again."""
    model, generator = Tower(num_blocks=8), torch.Generator().manual_seed(0)
    calls = [(torch.randn(512, 4, generator=generator), torch.tensor(900.0 - 100 * step)) for step in range(8)]
    condition = torch.randn(1, 3, generator=generator)

    def run(module: nn.Module) -> list[torch.Tensor]:
        outputs = []
        with torch.no_grad(), lc.marked_run(len(calls)):
            for sample, time in calls:
                outputs.append(module(sample, time, condition))
                lc.step_done()
        return outputs

    cache = Cache(cut="blocks.0", interval=INTERVAL)
    expected, ways = run(lc.transform(model, Policy(cache=cache))), set()
    asked = Policy(cache=cache, swap=Swap(budget=2**40))
    floor = swap_of_call(model, asked, (*calls[0], condition)).plan.floor_bytes
    for budget in (floor, floor + 2**14, floor + 2**16):
        swapped = lc.transform(model, Policy(cache=cache, swap=Swap(budget=budget)))
        for _ in range(2):
            assert_same(run(swapped), expected)
        kept = sum(output.nbytes for output in expected[1:])  # by `run`, beside the last step's
        measured = measure_peak(lambda module=swapped: run(module)).peak_bytes + small_weights(model, swap_of(swapped))
        assert measured - kept <= swap_of(swapped).plan.peak_bytes
        full = swap_of(swapped).transfers[0]
        ways |= {slot.release is not None for slot in full.made}
        lc.restore(swapped)
    assert True in ways


def swap_of_call(model: nn.Module, asked: Policy, call: tuple[torch.Tensor, ...]) -> SwapSchedule:
    swap = lc.plan(model, call, policy=asked, hardware=HARDWARE).swap
    assert swap is not None
    return swap


def _zoo_runs_equal(name: str, budgets: Sequence[str]) -> None:
    model, make_inputs = ZOO[name].build(torch.float32)
    cache = Cache(cut=list(ZOO[name].cuts), interval=2)
    inputs = run_inputs(make_inputs, 0, 5)

    def run(module: nn.Module) -> list[torch.Tensor]:
        outputs = []
        with torch.no_grad(), lc.marked_run(len(inputs)):
            for call in inputs:
                found = module(**call)
                outputs.append(found[0] if isinstance(found, tuple) else found["sample"])
                lc.step_done()
        return outputs

    expected = run(lc.transform(model, Policy(cache=cache)))
    for budget in budgets:
        swapped = lc.transform(model, Policy(cache=cache, swap=Swap(budget=budget)))
        for _ in range(2):
            assert_same(run(swapped), expected)
        assert swap_of(swapped).moves
        lc.restore(swapped)


FEW = ("sd", "flux", "wan")


@pytest.mark.parametrize("name", FEW)
def test_models(name: str) -> None:
    _zoo_runs_equal(name, ["90%"])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_every_model_at_two_budgets(name: str) -> None:
    _zoo_runs_equal(name, ["95%", "85%"])


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["30%", "50%", "75%"])
def test_the_budget_is_kept_and_the_peak_is_as_planned(share: str) -> None:
    """Measured by allocation events over a whole generation that begins with nothing on the device."""
    model = Tower(num_blocks=8, width=128)
    swapped = lc.transform(model, policy(share))
    generate(swapped)
    lc.reset(swapped)
    swap = swap_of(swapped)
    assert swap.prologue.stays
    inputs = [(latent(s), torch.tensor(900.0 - 100 * s), prompt(0)) for s in range(NUM_STEPS)]

    def run() -> None:
        with torch.no_grad(), lc.marked_run(NUM_STEPS):
            for call in inputs:
                swapped(*call)
                lc.step_done()

    measured = measure_peak(run).peak_bytes + small_weights(model, swap)
    assert measured <= swap.plan.peak_bytes
    assert measured == pytest.approx(swap.plan.peak_bytes, rel=0.05)
    assert swap.plan.peak_bytes <= swap.plan.budget


def test_the_peak_where_everything_stays_counts_what_the_prologue_reads() -> None:
    """With room for everything, weights that only the prologue reads are on the device during the steps as well."""
    model, make_inputs = ZOO["wan"].build()
    cache = lc.Cache(cut="blocks.1", interval=3)
    swapped = lc.transform(copy.deepcopy(model), Policy(cache=cache, swap=Swap(budget=2**30)))
    steps = run_inputs(make_inputs, 0, 4)

    def run() -> None:
        lc.reset(swapped)
        for inputs in steps:
            plain_step(swapped, **inputs)

    run()
    swap = swap_of(swapped)
    assert not swap.moves
    assert swap.once.movables.keys() - swap.workload.movables.keys(), "what only the prologue reads"
    lc.reset(swapped)
    measured = measure_peak(run).peak_bytes + small_weights(model, swap)
    assert 0.95 * swap.plan.peak_bytes <= measured <= swap.plan.peak_bytes


def test_nothing_is_on_the_device_after_a_run() -> None:
    swapped = lc.transform(Tower(), policy("50%"))
    generate(swapped)
    tracker = swapped._lightcache.runtime.tracker
    assert not tracker.branches
    assert tracker.weight_copies.num_bytes() == 0


def test_two_models_have_the_device_in_turns() -> None:
    """The copies of one are gone when the other begins; both go on right."""
    from lightcache_fx.ledger import Ledger
    from lightcache_fx.module import transform_component

    ledger = Ledger(is_shared=True)
    first, second = (transform_component(Tower(), policy("60%"), ledger) for _ in range(2))
    expected = generate(lc.transform(Tower(), unswapped(policy())))
    found: list[list[torch.Tensor]] = [[], []]
    copies = [module._lightcache.runtime.tracker for module in (first, second)]
    with torch.no_grad():
        for step in range(NUM_STEPS):
            for index, module in enumerate((first, second)):
                found[index].append(module(latent(step), torch.tensor(900.0 - 100 * step), CONDITION))
                assert copies[index].weight_copies.num_bytes() > 0
                assert copies[1 - index].weight_copies.num_bytes() == 0
    for outputs in found:
        assert_same(outputs, expected)


CONDITION = prompt(0)


def test_two_drop_ins_of_one_model_share_its_arena() -> None:
    """Called in turns, step by step, within other budgets; the weights are moved home once."""
    model = Tower()
    first, second = lc.transform(model, policy("40%")), lc.transform(model, policy("70%", interval=2))
    expected = [generate(lc.transform(Tower(), unswapped(asked))) for asked in (policy(), policy(interval=2))]
    generate(first)
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters() if weight.nbytes > 2**13}
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(2):
        found = [[], []]
        with torch.no_grad():
            for step in range(NUM_STEPS):
                for outputs, module in zip(found, (first, second), strict=True):
                    outputs.append(module(latent(step), torch.tensor(900.0 - 100 * step), CONDITION))
        for outputs, wanted in zip(found, expected, strict=True):
            assert_same(outputs, wanted)
    assert {name: model.get_parameter(name).data_ptr() for name in addresses} == addresses


def test_copies_that_a_program_does_not_want_make_room() -> None:
    """As another guidance branch leaves them, or another program than the one that was expected."""
    swapped = lc.transform(Tower(), policy("30%"))
    with torch.no_grad():
        swapped(latent(0), torch.tensor(900.0), CONDITION)
        copies = swapped._lightcache.runtime.tracker.weight_copies
        copies.put("of another", torch.ones(4), 1)
        swapped(latent(1), torch.tensor(800.0), CONDITION)
    assert "of another" not in copies


def test_reuse_steps_fetch_only_what_they_read() -> None:
    swapped = lc.transform(Tower(), policy("30%", interval=4))
    generate(swapped)
    with torch.no_grad(), lc.marked_run(4):
        swapped(latent(0), torch.tensor(900.0), CONDITION)
        lc.step_done()
        with recorded_copies() as log:
            swapped(latent(1), torch.tensor(800.0), CONDITION)
    assert not {copy.name for copy in log.copies if copy.name.startswith("blocks")}


# Weights change ----------------------------------------------------------------------------------------------------


def _doubled(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(2)


def _replaced(model: Any) -> None:
    model.blocks[2][0].weight = nn.Parameter(model.blocks[2][0].weight.clone() + 1, requires_grad=False)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({name: weight.flip(0) for name, weight in model.state_dict().items()})


def _rebound(model: Any) -> None:
    model.outer.weight.data = model.outer.weight.data.clone() * 3


@pytest.mark.parametrize("change", [_doubled, _replaced, _loaded, _rebound])
def test_changed_weights_are_fetched_anew(change: Any) -> None:
    """Within a run too: copies on the device hold for the version that they were made of."""
    swapped, plain = (lc.transform(Tower(), asked) for asked in (policy("60%"), unswapped(policy())))
    assert_same(generate(swapped), generate(plain))
    calls = [(latent(step), torch.tensor(900.0 - 100 * step), CONDITION) for step in range(NUM_STEPS)]
    found: list[list[torch.Tensor]] = []
    for model in (swapped, plain):
        outputs = []
        with torch.no_grad(), lc.marked_run(NUM_STEPS):
            for step, call in enumerate(calls):
                if step == 3:
                    change(model)
                outputs.append(model(*call))
                lc.step_done()
        found.append(outputs)
    assert_same(*found)


def test_restore_brings_the_weights_back() -> None:
    model = Tower()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    swapped = lc.transform(model, policy("50%"))
    generate(swapped)
    homes = swapped._lightcache.runtime.homes
    assert homes.is_home(model.blocks[0][0].weight)
    assert lc.restore(swapped) is model
    assert not any(map(homes.is_home, model.parameters()))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_original_works_while_its_weights_are_away() -> None:
    model = Tower()
    call = latent(0), torch.tensor(900.0), CONDITION
    expected = model(*call)
    generate(lc.transform(model, policy("50%")))
    assert torch.equal(model(*call), expected)


def test_weights_that_go_home_are_no_change_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where home is another device, as on CUDA, their device changes; nothing is captured again for that."""
    swapped = lc.transform(Tower(), policy("60%"))
    homes, captures = swapped._lightcache.runtime.homes, []
    elsewhere = {True: "home", False: "device"}
    monkeypatch.setattr(
        module_state, "_weight_type", lambda weight: (weight.dtype, elsewhere[homes.is_home(weight)], weight.shape)
    )
    monkeypatch.setattr(compiler, "capture", lambda *args, **kwargs: captures.append(1) or capture(*args, **kwargs))
    for batch in (2, 4, 2, 4):
        with torch.no_grad():
            swapped(latent(0, batch), torch.tensor(900.0), prompt(0, batch))
    assert len(captures) == 2
    assert homes.is_home(swapped.blocks[0][0].weight)


def test_arenas_go_with_the_weights_in_them() -> None:
    """Casts bind weights elsewhere; what they leave is given back."""
    model = Tower()
    swapped = lc.transform(model, policy("60%"))
    sizes = []
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64, torch.float32):
        wait_for_copies()  # one that is under way holds the memory that it reads
        swapped.to(dtype)
        with torch.no_grad():
            swapped(latent(0).to(dtype), torch.tensor(900.0), prompt(0).to(dtype))
        sizes.append(swapped._lightcache.runtime.homes.num_bytes)
    assert sizes[0] == sizes[2] == sizes[4]


def test_a_pipeline_with_everything_swapped() -> None:
    """The same frames; restored, every weight is on the device again."""
    case = PIPELINES["svd"]
    pipe = case.build()
    asked = Policy.deepcache(2, 0)
    expected = case.generate(lc.transform_pipeline(pipe, asked), 0, SMALL)
    swapping = lc.transform_pipeline(pipe, asked.model_copy(update={"swap": Swap(budget="80%")}))
    assert set(swapping._lightcache.components) == {"unet", "vae", "image_encoder"}
    for _ in range(2):
        assert torch.equal(case.generate(swapping, 0, SMALL), expected)
    homes = {name: getattr(swapping, name)._lightcache.runtime.homes for name in swapping._lightcache.components}
    assert all(any(map(home.is_home, getattr(pipe, name).parameters())) for name, home in homes.items())
    assert swapping.device == pipe.unet.device
    assert lc.restore(swapping) is pipe
    assert not any(any(map(home.is_home, getattr(pipe, name).parameters())) for name, home in homes.items())


# What goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def failing() -> Iterator[dict[str, int]]:
    """Copies that fail once so many have been made; set `left`."""
    state = {"left": 10**9}

    def copy_or_fail(into: torch.Tensor, source: torch.Tensor) -> None:
        state["left"] -= 1
        if state["left"] == 0:
            raise OSError("input/output error")
        copy_bytes(into, source)

    engine_of.cache_clear()
    original = transfers.ThreadEngine
    transfers.ThreadEngine = lambda: original(copy_or_fail)  # type: ignore[assignment,misc]
    yield state
    transfers.ThreadEngine = original  # type: ignore[misc]
    engine_of.cache_clear()


@pytest.mark.parametrize("at", [1, 7, 30])
def test_a_copy_that_fails(failing: dict[str, int], at: int) -> None:
    """A clear error; weights are intact, and the next run is right."""
    model = Tower()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    swapped, plain = (lc.transform(module, asked) for module, asked in
                      ((model, policy("40%")), (Tower(), unswapped(policy()))))  # fmt: skip
    generate(swapped)
    wait_for_copies()
    failing["left"] = at
    with pytest.raises(
        SwapError, match=r"cannot copy \S+ \(.*B\) (to|from) the device: input/output error; it is intact"
    ):
        generate(swapped)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert_same(generate(swapped), generate(plain))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_an_interrupted_run(at: int) -> None:
    """Ctrl-C within a program, between offload and prefetch say, and the next run is right."""
    swapped, plain = (lc.transform(Tower(), asked) for asked in (policy("40%"), unswapped(policy())))
    generate(swapped)
    with interrupted_at(5 * at + 2):
        generate(swapped)
    assert_same(generate(swapped), generate(plain))


def test_a_budget_below_the_floor() -> None:
    with pytest.raises(BudgetError, match=r"Tower: budget: 1000 B is less than the .* that call \d+ \(\w+\).*needs"):
        generate(lc.transform(Tower(), policy(1000)))


def test_no_room_for_a_swap_file(tmp_path: Any) -> None:
    model = Tower()
    asked = Policy(swap=Swap(budget="50%", folder=str(tmp_path / "missing")))
    with pytest.raises(SwapError, match=r"cannot make a swap file of .*no folder .*Swap\(folder=\.\.\.\)"):
        generate(lc.transform(model, asked))
    assert_same(generate(lc.transform(model, Policy())), generate(lc.transform(Tower(), Policy())))


def test_nothing_is_left_in_the_folder(tmp_path: Any) -> None:
    swapped = lc.transform(
        Tower(), Policy(cache=Cache(cut=0, interval=3), swap=Swap(budget="40%", folder=str(tmp_path)))
    )
    generate(swapped)
    assert swapped._lightcache.runtime.homes.num_bytes > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "0%"}, "budget: expected a share of the peak above 0%"),
        ({"budget": -3}, "budget: expected bytes such as"),
        ({"weights": False, "features": False}, "leave nothing to swap"),
        ({"to": "host", "folder": "/x"}, "folder is for files"),
        ({"to": "cloud"}, "to: .*'host' or 'disk'"),
        ({"bugdet": 1}, "unknown key 'bugdet'; did you mean 'budget'"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Swap(**settings)


def test_settings_as_yaml() -> None:
    asked = Policy(swap=Swap(budget="1.5GiB", features=False, to="disk", folder="/somewhere"))
    assert Policy.from_yaml(asked.to_yaml()) == asked


# Plans -------------------------------------------------------------------------------------------------------------


def planned(asked: Policy, hardware: Hardware = HARDWARE) -> lc.Plan:
    return lc.plan(Tower(), (latent(0), torch.tensor(900.0), prompt(0)), policy=asked, hardware=hardware)


def test_a_plan_says_what_is_copied() -> None:
    text = str(planned(policy("50%")))
    assert "swapped to disk, in a period of 3 steps" in text
    assert "the least possible" in text
    assert "2.0 and 1.0 GB/s" in text


def test_a_slow_link_is_warned_of() -> None:
    slow = replace(HARDWARE, link=Link(to_device=1e6, from_device=1e6))
    notes = planned(policy("50%"), slow).notes
    assert any("swapping does not pay within" in note and "ms of a period" in note for note in notes)
    assert not planned(policy("100%"), slow).notes


def test_no_budget_takes_as_little_as_costs_no_time() -> None:
    fast = replace(HARDWARE, link=Link(to_device=1e12, from_device=1e12, latency=0.0))
    least, everything = (planned(policy(budget), fast).swap for budget in (None, "100%"))
    assert least is not None
    assert everything is not None
    assert least.plan.peak_bytes < 0.6 * everything.plan.peak_bytes
    assert least.plan.slowdown <= 0.01


def test_a_memory_budget_swaps_only_where_it_must() -> None:
    weights = sum(weight.nbytes for weight in Tower().parameters())
    assert planned(Policy(memory_budget=2 * weights)).swap is None
    tight = planned(Policy(memory_budget=weights // 2)).swap
    assert tight is not None
    assert tight.plan.peak_bytes <= weights // 2
    asked = Policy(cache=Cache(cut=0, interval=3), memory_budget=weights // 2)
    assert_same(generate(lc.transform(Tower(), asked)), generate(lc.transform(Tower(), unswapped(asked))))


def test_a_pipeline_is_planned_stage_by_stage() -> None:
    call = latent(0), torch.tensor(900.0), prompt(0)
    encoder = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64)).eval()
    stages = [lc.Stage("encode", encoder, (latent(0),)), lc.Stage("denoise", Tower(), call, calls=9)]
    weights = sum(weight.nbytes for weight in Tower().parameters())
    plan = lc.plan_pipeline(stages, Policy(memory_budget=weights // 2), hardware=HARDWARE)
    assert plan.fits
    assert plan.peak_bytes <= weights // 2
    assert "denoise" in str(plan)
    assert "slower than all resident" in str(plan)
    refused = lc.plan_pipeline(stages, Policy(memory_budget=20_000), hardware=HARDWARE)
    assert not refused.fits
    assert "denoise does not fit: memory_budget: 19.5 KiB is less than" in str(refused)


def test_pipelines_that_cannot_be_planned() -> None:
    with pytest.raises(ArgumentError, match="expected at least one Stage"):
        lc.plan_pipeline([], policy())
    with pytest.raises(ArgumentError, match="expected a policy with memory_budget"):
        lc.plan_pipeline([lc.Stage("denoise", Tower())], Policy())


def test_a_reuse_step_takes_the_program_of_a_step_as_far_from_the_next_full_one() -> None:
    swap = planned(policy("40%", interval=5)).swap
    assert swap is not None
    assert [swap.step_for("reuse", ["full"] * since, 5 - since) for since in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert [swap.step_for("reuse", ["full"], ahead) for ahead in (9, 5, 4, 1)] == [1, 1, 1, 4]
    later = [swap.step_for("reuse", ["full"] * since, None) for since in (1, 3, 4, 9)]
    assert later == [1, 3, 3, 3], "the last drops the slots"


def test_longest_intervals() -> None:
    assert Schedule.of(Cache(cut=0, interval=4)).longest_interval(8) == 4
    assert Schedule.of(Cache(cut=0, interval=40)).longest_interval(8) == 8
    assert Schedule.of(Cache(cut=0, steps=[0, 1, 2, 5, 8], num_steps=12)).longest_interval(8) == 4
    assert Schedule.of(Cache(cut=0, steps=[0, 1])).longest_interval(8) == 8
    assert Schedule.of(Cache(cut=0, mask=[True, False, True, False])).longest_interval(8) == 2
    assert Schedule().longest_interval(8) == 1


def test_how_far_the_next_full_step_is() -> None:
    schedule = Schedule.of(Cache(cut=0, interval=3, last=1))
    assert [schedule.steps_to_full(step, 6) for step in range(6)] == [3, 2, 1, 2, 1, None]
    assert Schedule.of(Cache(cut=0, steps=[0])).steps_to_full(0) is None


def test_a_slot_that_a_region_makes() -> None:
    """It is known as a slot behind the chunks too, or its reuse step would read what nothing makes."""
    asked = Policy(cache=Cache(cut=0, interval=INTERVAL), chunk=Chunk(budget="70%"))
    whole = lc.transform(Tower(), asked)
    swapped = lc.transform(Tower(), asked.model_copy(update={"swap": Swap(budget="70%")}))
    for step in range(4):
        call = latent(step, 256), torch.tensor(900.0 - step), prompt(0, 256)
        assert torch.equal(whole(*call), swapped(*call))
    report = lc.inspect(swapped)
    slot = graphs.outputs(report.programs["full"].graph_module.graph)[1]
    assert isinstance(slot, fx.Node)
    assert slot.target is operator.getitem
    assert [made.name for made in report.programs["full"].transfers.made] == ["slot_0"]
    assert report.counts["reuse"] == 2
