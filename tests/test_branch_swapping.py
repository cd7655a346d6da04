"""Swapping where guidance calls the model several times a step, and where a run ends: the same bits, none in vain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import compiler as compiler_module
from lightcache_fx import runtime as runtime_module
from lightcache_fx import swap_periods
from lightcache_fx.caching import Cache
from lightcache_fx.compiled import Compiled
from lightcache_fx.costs import CPU
from lightcache_fx.hardware import Hardware
from lightcache_fx.measure import measure_peak
from lightcache_fx.passes.insert_transfers import LocalStay, MadeSlot, Transfers
from lightcache_fx.policy import Policy, Swap
from lightcache_fx.stores import SLOT, SlotPlace, Stores
from lightcache_fx.swap_checks import validate
from lightcache_fx.swap_transfers import places_of_slots, transfers_of
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.transfers import PREFETCH, WAIT, CopyLog, recorded_copies
from lightcache_fx.workload import Link, Movable, Residence, Stay
from pipelines import PIPELINES, SMALL
from swap_cases import interrupted_at, small_weights, workload
from toys import Tower, latent, prompt

HARDWARE = Hardware(CPU, Link(to_device=2e9, from_device=1e9))
NUM_STEPS = 7
"""The last step is full where every third is."""
PAIR = (0, 1)
"""Prompts of a conditional and an unconditional branch."""


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on how fast this machine is just now."""
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: HARDWARE)


def policy(budget: str | int | None, interval: int = 3, **settings: Any) -> Policy:
    return Policy(cache=Cache(cut=0, interval=interval), swap=Swap(budget=budget), **settings)


def unswapped(asked: Policy) -> Policy:
    return asked.model_copy(update={"swap": None, "memory_budget": None})


Prompts = Sequence[int] | Callable[[int], Sequence[int]]
Around = Callable[[int, int, Callable[[], torch.Tensor]], torch.Tensor]


def as_it_is(_step: int, _branch: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    return call()


def generate(
    model: nn.Module,
    prompts: Prompts = PAIR,
    num_steps: int = NUM_STEPS,
    around: Around = as_it_is,
    batch: int = 2,
) -> list[torch.Tensor]:
    """One marked generation: every step's predictions, one for each prompt; `prompts` may differ by step."""
    conditions = [prompt(number) for number in range(4)]
    if batch != 2:
        conditions = [condition[:1] for condition in conditions]
    outputs = []
    with torch.no_grad(), lc.marked_run(num_steps):
        for step in range(num_steps):
            call = latent(step, batch), torch.tensor(900.0 - 100 * step)
            for branch, number in enumerate(prompts(step) if callable(prompts) else prompts):
                outputs.append(around(step, branch, lambda c=(*call, conditions[number]): model(*c)))  # type: ignore[misc]
            lc.step_done()
    return outputs


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def made_of(model: Any) -> dict[int, Compiled]:
    """What was made of the only signature, by the number of branches."""
    (found,) = model._lightcache.runtime.repertoire.compiled.values()
    return dict(found.signature.compiled)


def late_copies(model: Any) -> int:
    return sum(bound.late_copies for made in made_of(model).values() for bound in made.bound.values())


def swap_of(model: nn.Module) -> SwapSchedule:
    swap = lc.inspect(model).plan.swap
    assert swap is not None
    return swap


def begun_copies(model: nn.Module, **settings: Any) -> list[list[tuple[str, str]]]:
    """For each call of a generation, the copies that were begun in it: what, and which way."""
    found: list[list[tuple[str, str]]] = []

    def around(_step: int, _branch: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with recorded_copies() as log:
            output = call()
            _finish(log)
        found.append([(record.name, record.way) for record in log.copies if record.name != "the end"])
        return output

    generate(model, around=around, **settings)
    return found


def _finish(log: CopyLog) -> None:
    """Copies are made in order: behind this one, all that were begun to the device have ended."""
    WAIT(PREFETCH(torch.ones(1), torch.device("cpu"), "the end"))
    assert log.copies


# Bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("budget", ["25%", "40%", "60%", "80%", "100%", None])
def test_bits_do_not_change(budget: str | None, interval: int) -> None:
    """Runs of other branches than the one before, and branches that come and go or change their order in a run."""
    model, asked = Tower(), policy(budget, interval)
    swapped, plain = lc.transform(copy.deepcopy(model), asked), lc.transform(model, unswapped(asked))
    runs: list[Prompts] = [
        PAIR,
        PAIR,
        (0,),
        (0, 1, 2),
        lambda step: PAIR if step in (2, 3, 4) else (0,),
        lambda step: PAIR if step < 4 else (1, 0),
        PAIR,
    ]
    for prompts in runs:
        assert_same(generate(swapped, prompts), generate(plain, prompts))


def test_named_branches_of_unmarked_runs() -> None:
    """Timesteps alone tell steps apart, `cache_context` the branches; nothing says how many of either there will be."""
    swapped, plain = (lc.transform(Tower(), asked) for asked in (policy("40%"), unswapped(policy("40%"))))
    for time in (900, 800, 700, 600, 900, 800, 700, 600):
        for name, number in (("cond", 0), ("uncond", 1)):
            found = []
            for model in (swapped, plain):
                with torch.no_grad(), model.cache_context(name):
                    found.append(model(latent(time), torch.tensor(float(time)), prompt(number)))
            assert torch.equal(*found)
    assert lc.inspect(swapped).plan.branches == 2


def test_a_pipeline_with_two_calls_a_step() -> None:
    """Its transformer is called for the prompt and for the negative one; the same frames, and no late copies."""
    case = PIPELINES["easyanimate"]
    pipe = case.build()
    asked = Policy(cache=Cache(cut=lc.Residual(first=case.kept[0], last=case.kept[1]), interval=2))
    expected = case.generate(lc.transform_pipeline(pipe, asked), 0, SMALL, num_steps=4)
    swapping = lc.transform_pipeline(pipe, asked.model_copy(update={"swap": Swap(budget="70%")}))
    for _ in range(2):
        assert torch.equal(case.generate(swapping, 0, SMALL, num_steps=4), expected)
    assert swap_of(swapping.transformer).moves


# What is handed over -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [(0,), PAIR, (0, 1, 2)])
@pytest.mark.parametrize("interval", [1, 3])
def test_no_copy_is_late_but_those_of_the_first_step(prompts: Sequence[int], interval: int) -> None:
    """A run begins with nothing on the device, and every branch's prologue takes the room; later all are in time."""
    swapped = lc.transform(Tower(), policy("40%", interval))
    late = late_by_call(swapped, prompts)
    assert late[0] > 0
    assert late[len(prompts) :] == [0] * (len(late) - len(prompts))


def late_by_call(model: nn.Module, prompts: Prompts, **settings: Any) -> list[int]:
    """For each call of a generation that another one came before, how many copies were late."""
    generate(model, prompts, **settings)
    late: list[int] = []

    def around(_step: int, _branch: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        before = late_copies(model)
        output = call()
        late.append(late_copies(model) - before)
        return output

    generate(model, prompts, around=around, **settings)
    return late


@pytest.mark.parametrize("budget", ["40%", "60%", None])
def test_branches_that_change_their_order_are_late_once(budget: str | None) -> None:
    """The order of a step is expected of the next one; only what was on its way meanwhile is lost, to the next full."""
    swapped = lc.transform(Tower(), policy(budget))
    late = late_by_call(swapped, lambda step: PAIR if step < 3 else (1, 0), num_steps=11)
    assert late[14:] == [0] * 8


def test_a_plan_for_one_branch_is_late_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the plan for two is for."""
    monkeypatch.setattr(runtime_module.Runtime, "_for_branches", lambda _self, compiled, _position: compiled)
    swapped = lc.transform(Tower(), policy("40%"))
    assert sum(late_by_call(swapped, PAIR)[2:]) > 0


def test_each_weight_is_copied_once_for_each_call_that_fetches_it() -> None:
    """Of a steady period: so many bytes as the plan says."""
    swapped = lc.transform(Tower(), policy("40%", interval=1))
    generate(swapped)
    calls = begun_copies(swapped)
    sizes = {name: weight.nbytes for name, weight in swapped.named_parameters()}
    steady = [sum(sizes[name] for name, _ in call) for call in calls[4:12]]
    period = swap_of(swapped).plan.simulation.steady.to_device_bytes
    assert [a + b for a, b in zip(steady[::2], steady[1::2], strict=True)] == [period] * 4


# How many branches there are ---------------------------------------------------------------------------------------


def test_branches_are_learned_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    captures = []
    original = compiler_module.capture
    monkeypatch.setattr(
        compiler_module, "capture", lambda *args, **kwargs: captures.append(1) or original(*args, **kwargs)
    )
    swapped = lc.transform(Tower(), policy("40%"))
    generate(swapped)
    plan = lc.inspect(swapped).plan
    assert (plan.branches, len(captures), list(made_of(swapped))) == (2, 1, [1, 2])
    note = "a step has 2 calls of Tower, as seen: planned anew with what each of them keeps"
    assert note in plan.notes
    assert note in caplog.messages
    assert "in a period of 3 steps, each with a call for each of 2 guidance branches" in str(plan)
    made = made_of(swapped)
    for prompts in (PAIR, (0,), PAIR, (0,)):
        generate(swapped, prompts)
        assert lc.inspect(swapped).plan.branches == len(prompts)
    generate(swapped)
    with torch.no_grad(), lc.marked_run(NUM_STEPS):
        swapped(latent(0), torch.tensor(900.0), prompt(0))
        assert lc.inspect(swapped).plan.branches == 2, "as in the run before"
    assert made_of(swapped) == made
    assert caplog.messages.count(note) == 1


def test_branches_that_the_policy_tells() -> None:
    asked = policy("40%", calls_per_step=2)
    swapped = lc.transform(Tower(), asked)
    generate(swapped)
    assert list(made_of(swapped)) == [2]
    assert not any("planned anew" in note for note in lc.inspect(swapped).plan.notes)
    call = latent(0), torch.tensor(900.0), prompt(0)
    planned = lc.plan(Tower(), call, policy=asked, hardware=HARDWARE)
    assert planned.swap is not None
    assert planned.swap.plan == swap_of(swapped).plan
    generate(swapped, (0, 1, 2))
    assert lc.inspect(swapped).plan.branches == 3


def test_a_plan_counts_what_every_branch_keeps() -> None:
    call = latent(0), torch.tensor(900.0), prompt(0)
    one, two = (lc.plan(Tower(), call, policy=policy("100%", calls_per_step=n), hardware=HARDWARE) for n in (1, 2))
    assert one.swap is not None
    assert two.swap is not None
    more = two.swap.plan.peak_bytes - one.swap.plan.peak_bytes
    assert more == one.hoist.num_bytes + one.kept_bytes > 0


def test_a_memory_budget_that_one_branch_fits_and_two_do_not() -> None:
    """Everything resident for one; for the second the weights make room, and go back when it is gone."""
    call = latent(0), torch.tensor(900.0), prompt(0)
    one = lc.plan(Tower(), call, policy=policy("100%", calls_per_step=1), hardware=HARDWARE).swap
    assert one is not None
    asked = Policy(cache=Cache(cut=0, interval=3), memory_budget=one.plan.budget)
    model = Tower()
    swapped, plain = lc.transform(model, asked), lc.transform(Tower(), unswapped(asked))
    for prompts, moves in ((0,), False), (PAIR, True), ((0,), False), (PAIR, True):
        assert_same(generate(swapped, prompts), generate(plain, prompts))
        swap = lc.inspect(swapped).plan.swap
        assert (swap is not None) == moves
        assert swapped._lightcache.runtime.homes.is_home(model.blocks[0][0].weight) == moves


# Memory ------------------------------------------------------------------------------------------------------------


def generation(model: nn.Module, batch: int, conditions: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A marked generation that keeps no output, its inputs made before: to be measured."""
    inputs = [(latent(step, batch), torch.tensor(900.0 - 100 * step)) for step in range(NUM_STEPS)]

    def run() -> None:
        with torch.no_grad(), lc.marked_run(NUM_STEPS):
            for call in inputs:
                for condition in conditions:
                    model(*call, condition)
                lc.step_done()

    return run


@pytest.mark.parametrize("share", ["30%", "50%", "75%"])
@pytest.mark.parametrize("told", [None, 2])
def test_the_budget_is_kept_and_the_peak_is_as_planned(share: str, told: int | None) -> None:
    """Measured by allocation events; also in the very first run, in whose middle the second branch appears."""
    model = Tower(num_blocks=8, width=128)
    swapped = lc.transform(model, policy(share, calls_per_step=told))
    generate(swapped, (0,), num_steps=1)
    run = generation(swapped, 2, [prompt(number) for number in PAIR])
    learning = measure_peak(run).peak_bytes
    measured = measure_peak(run).peak_bytes + small_weights(model, swap_of(swapped))
    plan = swap_of(swapped).plan
    assert lc.inspect(swapped).plan.branches == 2
    assert swap_of(swapped).prologue.stays
    assert measured <= plan.peak_bytes <= plan.budget
    assert measured == pytest.approx(plan.peak_bytes, rel=0.05)
    assert learning + small_weights(model, swap_of(swapped)) <= plan.budget


BATCH = 512


@pytest.mark.parametrize(("cut", "slots_that_stay"), [(0, 1), ("blocks.0", 0)])
def test_a_later_branch_s_prologue_has_room_beside_what_earlier_ones_keep(
    cut: int | str, slots_that_stay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hoisted values in any case, and the slot where it does not leave the device meanwhile."""
    original, seen = swap_periods._planned, []
    monkeypatch.setattr(swap_periods, "_planned", lambda *args: seen.append(args[1]) or original(*args))
    call = latent(0, BATCH), torch.tensor(900.0), prompt(0)[:1]
    asked = Policy(cache=Cache(cut=cut, interval=3), swap=Swap(budget="65%"))

    def held(branches: int) -> tuple[lc.Plan, int]:
        seen.clear()
        told = asked.model_copy(update={"calls_per_step": branches})
        plan = lc.plan(Tower(num_blocks=8), call, policy=told, hardware=HARDWARE)
        prologue = next(found for found in seen if not found.cyclic)
        assert plan.swap is not None
        return plan, prologue.ops[0].live_bytes - plan.swap.plan.resident_bytes

    (plan, one), (_, two) = held(1), held(2)
    assert two - one == plan.hoist.num_bytes + slots_that_stay * plan.kept_bytes
    assert plan.kept_bytes > plan.hoist.num_bytes > 0


def two_sizes(model: nn.Module, keep: Callable[[torch.Tensor], object] = id) -> Callable[[], None]:
    """As `generation`, with two calls a step of different sizes; `keep` gets their outputs."""
    inputs = [
        [(latent(step, batch), torch.tensor(900.0 - 100 * step)) for batch in (BATCH, BATCH // 2)]
        for step in range(NUM_STEPS)
    ]
    conditions = [prompt(number)[:1] for number in PAIR]

    def run() -> None:
        with torch.no_grad(), lc.marked_run(NUM_STEPS):
            for calls in inputs:
                for call, condition in zip(calls, conditions, strict=True):
                    keep(model(*call, condition))
                lc.step_done()

    return run


@pytest.mark.parametrize("counts", [True, False])
def test_calls_of_different_sizes_keep_one_budget(counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size has a plan of its own, beside what the other keeps; not counted, they would exceed it together."""
    if not counts:
        monkeypatch.setattr(runtime_module.Runtime, "_others", lambda *_: [])
    model = Tower(num_blocks=8)
    call = latent(0, BATCH), torch.tensor(900.0), prompt(0)[:1]
    whole = lc.plan(model, call, policy=policy("100%"), hardware=HARDWARE).swap
    assert whole is not None
    budget = int(0.8 * whole.plan.peak_bytes)
    swapped, plain = lc.transform(model, policy(budget)), lc.transform(Tower(num_blocks=8), unswapped(policy(budget)))
    found: dict[nn.Module, list[torch.Tensor]] = {swapped: [], plain: []}
    for module, outputs in found.items():
        for _ in range(2):
            two_sizes(module, outputs.append)()
    assert_same(found[swapped], found[plain])
    first = measure_peak(two_sizes(swapped)).peak_bytes + small_weights(model, swap_of(swapped))
    assert (first <= budget) == counts
    plans = [made.plan for made in swapped._lightcache.runtime.repertoire.compiled.values()]
    assert len(plans) == 2
    kept = [plan.kept_bytes + plan.hoist.num_bytes for plan in plans]
    assert [plan.beside for plan in plans] == (kept[::-1] if counts else [0, 0])


class Spread(nn.Module):
    """What takes so much room for each value that nothing else has any."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.unsqueeze(1).repeat(1, self.times, 1).sin().mean(1)


@pytest.mark.parametrize(("times", "keeps"), [(1, True), (6000, False)])
def test_resident_weights_stay_while_a_prologue_has_room_beside_them(times: int, keeps: bool) -> None:
    model = Tower(num_blocks=8, width=128)
    model.prompt = nn.Sequential(nn.Linear(3, 8), Spread(times), nn.Linear(8, 128))
    asked = policy("75%")
    swapped = lc.transform(model, asked)
    expected = generate(lc.transform(model, unswapped(asked)))
    generate(swapped)
    swap = swap_of(swapped)
    assert swap.resident
    assert swap.keeps_residents == keeps
    first, second, *later = [{name for name, _ in call} & swap.resident for call in begun_copies(swapped)]
    assert first == swap.resident, "the run before gave its memory back"
    assert second == (set() if keeps else swap.resident), "fetched anew behind the other branch's prologue"
    assert not any(later)
    assert_same(generate(swapped), expected)
    run = generation(swapped, 2, [prompt(number) for number in PAIR])
    measured = measure_peak(run).peak_bytes + small_weights(model, swap)
    assert measured <= swap.plan.budget
    assert not keeps or measured <= swap.plan.peak_bytes


@pytest.mark.parametrize("interval", [2, 3])
def test_slots_of_each_branch_leave_and_come_back(interval: int) -> None:
    """Where two of them have no room beside later blocks: each is fetched again, also while the other branch runs."""
    model, cache = Tower(num_blocks=8), Cache(cut="blocks.0", interval=interval)
    call = latent(0, BATCH), torch.tensor(900.0), prompt(0)[:1]
    expected = generate(lc.transform(model, Policy(cache=cache)), batch=BATCH)
    asked = Policy(cache=cache, swap=Swap(budget=2**40), calls_per_step=2)
    swap = lc.plan(model, call, policy=asked, hardware=HARDWARE).swap
    assert swap is not None
    ways, crossing = set(), 0
    for room in (0, 2**16):
        budget = swap.plan.floor_bytes + room
        swapped = lc.transform(model, Policy(cache=cache, swap=Swap(budget=budget)))
        generate(swapped, (0,), num_steps=3, batch=BATCH)
        assert swap_of(swapped).branches == 1
        run = generation(swapped, BATCH, [prompt(number)[:1] for number in PAIR])
        learning = measure_peak(run).peak_bytes
        for _ in range(2):
            assert_same(generate(swapped, batch=BATCH), expected)
        found = swap_of(swapped)
        assert found.branches == 2
        assert learning + small_weights(model, found) <= budget, "while the second branch appears as well"
        assert late_by_call(swapped, PAIR, batch=BATCH)[2:] == [0] * (2 * NUM_STEPS - 2)
        measured = measure_peak(run).peak_bytes + small_weights(model, found)
        assert measured <= found.plan.peak_bytes <= budget
        ways |= {slot.release is not None for transfers in found.transfers[:2] for slot in transfers.made}
        crossing += sum(stay.branch is not None for transfers in found.transfers for stay in transfers.stays)
        lc.restore(swapped)
    assert True in ways
    assert crossing > 0


# Where a run ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [(0,), PAIR, (0, 1, 2)])
@pytest.mark.parametrize(("num_steps", "interval"), [(6, 3), (7, 3), (8, 3), (4, 1)])
@pytest.mark.parametrize("budget", ["30%", "60%"])
def test_nothing_is_fetched_for_a_step_behind_the_last(
    prompts: Sequence[int], num_steps: int, interval: int, budget: str
) -> None:
    """Whether the last step is full or reuses: every copy is of what that call, or one behind it in the run, reads."""
    asked, swapped = policy(budget, interval), lc.transform(Tower(), policy(budget, interval))
    late = late_by_call(swapped, prompts, num_steps=num_steps)
    assert late[len(prompts) :] == [0] * (len(late) - len(prompts)), "what is wanted is fetched to the end"
    calls = begun_copies(swapped, prompts=prompts, num_steps=num_steps)
    kinds = ["reuse" if step % interval else "full" for step in range(num_steps) for _ in prompts]
    assert len(calls) == len(kinds)
    for number, begun in enumerate(calls[1:], 1):
        wanted = {name for kind in kinds[number:] for name in read_by(swapped, kind)}
        prologue = {stay.name for stay in swap_of(swapped).prologue.stays} if number < len(prompts) else set()
        assert {name.partition("@")[0] for name, way in begun if way == "in"} <= wanted | prologue
    reads = [stay.name for stay in swap_of(swapped).transfers[len(prompts) - 1].stays if stay.prefetch and stay.reads]
    if kinds[-1] == "full":
        assert sorted(name for name, _ in calls[-1]) == sorted(reads), "only what this very call reads"
    expected = generate(lc.transform(Tower(), unswapped(asked)), prompts, num_steps)
    assert_same(generate(swapped, prompts, num_steps), expected)


def read_by(model: nn.Module, kind: str) -> set[str]:
    """The weights and slots that a program reads."""
    steps = [step for step in swap_of(model).workload.steps if step.program == kind]
    return {name.partition("@")[0] for op in steps[0].ops for name in op.reads}


def test_the_last_step_sends_no_slot_away() -> None:
    """It is full where every third of seven is; the slots that it makes are for nobody."""
    model, cache = Tower(num_blocks=8), Cache(cut="blocks.0", interval=3)
    call = latent(0, BATCH), torch.tensor(900.0), prompt(0)[:1]
    asked = Policy(cache=cache, swap=Swap(budget=2**40), calls_per_step=2)
    floor = lc.plan(model, call, policy=asked, hardware=HARDWARE).swap
    assert floor is not None
    swapped = lc.transform(model, Policy(cache=cache, swap=Swap(budget=floor.plan.floor_bytes), calls_per_step=2))
    expected = generate(lc.transform(model, Policy(cache=cache)), batch=BATCH)
    generate(swapped, batch=BATCH)
    calls = begun_copies(swapped, batch=BATCH)
    ways = [[way for _, way in call].count("out") for call in calls]
    assert ways == [1, 1, 0, 0, 0, 0] * 2 + [0, 0]
    assert_same(generate(swapped, batch=BATCH), expected)


def test_a_run_that_goes_on_beyond_its_end() -> None:
    """More steps than were told: a new run begins, as without swapping."""
    swapped, plain = (lc.transform(Tower(), asked) for asked in (policy("40%"), unswapped(policy("40%"))))
    found = []
    for model in (swapped, plain):
        outputs = []
        with torch.no_grad(), lc.marked_run(2):
            for step in range(5):
                outputs += [model(latent(step), torch.tensor(900.0 - step), prompt(number)) for number in PAIR]
                lc.step_done()
        found.append(outputs)
    assert_same(*found)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 8])
def test_an_interrupted_run(at: int) -> None:
    """Ctrl-C within a program of one of two branches; the next run is right, and no later in its copies."""
    swapped, plain = (lc.transform(Tower(), asked) for asked in (policy("40%"), unswapped(policy("40%"))))
    generate(swapped)
    before = late_copies(swapped)
    generate(swapped)
    usual = late_copies(swapped) - before
    with interrupted_at(7 * at + 2):
        generate(swapped)
    assert swapped._lightcache.runtime.tracker.weight_copies.num_bytes() == 0
    before = late_copies(swapped)
    assert_same(generate(swapped), generate(plain))
    assert late_copies(swapped) - before == usual


# Where slots are -----------------------------------------------------------------------------------------------------


def _stores(state: str) -> Stores:
    """With a slot `s`, kept as a program may have left it."""
    value, home = torch.arange(4.0), torch.arange(4.0)
    stores = Stores(buffer=lambda size: torch.empty(size, dtype=torch.uint8))
    if state != "a copy alone":
        stores.put_slot("s", value if state == "on the device" else home, at_home=state != "on the device")
    if state in ("a copy alone", "both"):
        stores.slot_copies.put("s", value, SLOT)
    return stores


@pytest.mark.parametrize("state", ["on the device", "at home", "a copy alone", "both"])
@pytest.mark.parametrize(
    ("place", "home", "copy"),
    [
        (SlotPlace(is_resident=True, is_sent_away=False, is_present=True), False, False),
        (SlotPlace(is_resident=False, is_sent_away=True, is_present=True), True, True),
        (SlotPlace(is_resident=False, is_sent_away=True, is_present=False), True, False),
        (SlotPlace(is_resident=False, is_sent_away=False, is_present=True), False, True),
        (SlotPlace(is_resident=False, is_sent_away=False, is_present=False), True, False),
    ],
)
def test_a_slot_is_brought_to_where_a_plan_has_it(state: str, place: SlotPlace, home: bool, copy: bool) -> None:
    """Never fetched for that: where it should be on the device and is not, the program that reads it fetches it."""
    stores = _stores(state)
    stores.arrange("s", place)
    stores.arrange("other", place)
    was_here = state != "at home"
    assert ("s" in stores.slot_copies) == (copy and was_here)
    assert ("s" in stores.at_home) == (home or (not was_here) or (state == "both" and not place.is_resident))
    assert ("s" in stores.slots) == (place.is_resident or "s" in stores.at_home)
    assert torch.equal(stores.slot_on_device("s", torch.device("cpu")), torch.arange(4.0))
    assert "s" not in stores.slot_copies
    assert "other" not in stores
    stores.make_room(["s"], 0, 0, torch.device("cpu"))
    assert "s" not in stores


def test_places_and_transfers_of_two_branches_by_hand() -> None:
    """Each branch makes a slot in its first call and reads it in its second; `s@0` leaves during the other's call."""
    step = "a{0} 1 1 - s@{0}\nb{0} 1 1 - -", "c{0} 1 1 - -\nd{0} 1 1 s@{0} -"
    work = workload(*(text.format(branch) for text in step for branch in (0, 1)), sizes={"s@0": 2, "s@1": 2})
    movables = {f"s@{branch}": Movable("s", 2, "slot").of_branch(branch) for branch in (0, 1)}
    work = replace(work, movables=movables)
    stays = [
        Stay("s@0", 0, 0, 2, made=True, offloaded=True),
        Stay("s@1", 2, 2, 7, made=True),
        Stay("s@0", 3, 5, 5),
    ]
    residence = Residence(frozenset(), tuple(stays))
    validate(work, residence)
    kept, sent = SlotPlace(False, False, True), SlotPlace(False, True, False)
    places = [places_of_slots(residence, work, call, 2) for call in range(4)]
    assert [found[0]["s"] for found in places] == [sent, sent, sent._replace(is_present=True), sent]
    assert [found[1]["s"].is_present for found in places] == [False, False, True, True]
    assert places[3][1]["s"] == kept
    full, other, reuse, last = transfers_of(residence, work, 2)
    assert full == Transfers((), (MadeSlot("s", "b0", handed_on=True),))
    assert other == Transfers(
        (LocalStay("s@0", "slot", "b1", (), handed_on=True, ahead=1, branch=0),),
        (MadeSlot("s", None, handed_on=True),),
    )
    assert reuse == Transfers((LocalStay("s", "slot", None, ("d0",)),))
    assert last == Transfers((LocalStay("s", "slot", None, ("d1",)),))
