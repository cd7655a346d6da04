"""Saved modules where guidance calls the model several times a step: what was planned for each number of calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lightcache_fx as lc
from lightcache_fx import Cache, Chunk, Policy, compiler
from lightcache_fx.compiled import Compiled
from lightcache_fx.costs import CPU
from lightcache_fx.errors import BudgetError, LoadError, SaveError
from lightcache_fx.hardware import Hardware
from lightcache_fx.liveness import timeline
from lightcache_fx.workload import Link
from test_saved_damage import edit
from toys import Tower, latent, prompt

BATCH = 256
SLOT_BYTES = BATCH * 64 * 4
"""What a branch of `Tower` keeps; so much again is hoisted for it."""
NUM_STEPS = 5


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on how fast this machine is just now."""
    hardware = Hardware(CPU, Link(to_device=2e9, from_device=1e9))
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: hardware)


def whole_bytes(branches: int) -> int:
    """What a step of so many calls takes with nothing cut and nothing away, at most: while a prologue runs."""
    fast = lc.transform(Tower(), Policy(cache=Cache(cut=0, interval=2)))
    generate(fast, 1)
    peak = timeline(lc.inspect(fast).programs["prologue"].graph_module.graph).peak_bytes  # its results included
    weights = sum(weight.nbytes for weight in Tower().parameters())
    return weights + peak + branches * SLOT_BYTES + (branches - 1) * SLOT_BYTES


def room_for(branches: int) -> int:
    """A budget that so many branches keep without swapping: planning counts a prologue's results twice."""
    return whole_bytes(branches) + SLOT_BYTES


def policy(budget: int = 2**30, **settings: Any) -> Policy:
    return Policy(cache=Cache(cut=0, interval=2), memory_budget=budget, **settings)


def generate(model: Any, branches: int) -> list[torch.Tensor]:
    found = []
    with torch.no_grad(), lc.marked_run(NUM_STEPS):
        for step in range(NUM_STEPS):
            for branch in range(branches):
                given = latent(10 * step + branch, BATCH), torch.tensor(900.0 - step), prompt(branch, BATCH)
                found.append(model(*given))
            lc.step_done()
    return found


def made_of(model: Any) -> dict[int, Compiled]:
    """What was made of the only signature, by the number of branches."""
    (found,) = model._lightcache.runtime.repertoire.compiled.values()
    return dict(found.signature.compiled)


def saved(folder: Path, asked: Policy, branches: Sequence[int]) -> Any:
    """A tower that has made a generation with each number of branches, and was saved behind the last."""
    fast = lc.transform(Tower(), asked)
    for number in branches:
        generate(fast, number)
    lc.save(fast, folder)
    return fast


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing may be planned or captured from now on once a name is put into this list."""
    forbidden: list[str] = []

    def refuse(name: str) -> Any:
        original = getattr(compiler, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            assert not forbidden, f"{name} was called by a loaded module"
            return original(*args, **kwargs)

        return call

    for name in ("capture", "make_plan", "with_memory", "for_branches", "build_programs"):
        monkeypatch.setattr(compiler, name, refuse(name))
    return forbidden


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_what_was_planned_for_each_number_is_saved(tmp_path: Path, order: Sequence[int], unplanned: list[str]) -> None:
    fast = saved(tmp_path / "saved", policy(), order)
    expected = {number: generate(fast, number) for number in order}
    generate(fast, order[-1])
    loaded = lc.load(tmp_path / "saved")
    unplanned.append("all")
    mine, its = made_of(fast), made_of(loaded)
    assert mine.keys() == its.keys() == {1, 2}
    for number, made in mine.items():
        assert its[number].plan == made.plan
        assert its[number].plan.branches == number
        assert all(lc.diff(made.programs[name], its[number].programs[name]) == "" for name in made.programs)
    assert lc.inspect(loaded).plan.branches == order[-1]
    for number in order:
        lc.reset(loaded)
        assert_same(generate(loaded, number), expected[number])
        assert lc.inspect(loaded).plan.branches == number
    counts = lc.inspect(loaded).counts
    assert counts["full"] == 3 * 3
    assert counts["reuse"] == 2 * 3


def test_calls_per_step_are_planned_for_from_the_first(tmp_path: Path, unplanned: list[str]) -> None:
    fast = saved(tmp_path / "saved", policy(calls_per_step=3), [3])
    loaded = lc.load(tmp_path / "saved")
    unplanned.append("all")
    assert made_of(fast).keys() == made_of(loaded).keys() == {3}
    for branches in (2, 3):
        assert_same(generate(loaded, branches), generate(fast, branches))
    assert made_of(loaded).keys() == {3}


def test_more_branches_than_saved_within_the_budget(tmp_path: Path, unplanned: list[str]) -> None:
    fast = saved(tmp_path / "saved", policy(), [1])
    expected = generate(fast, 3)
    loaded = lc.load(tmp_path / "saved")
    unplanned.append("all")
    assert_same(generate(loaded, 3), expected)
    assert lc.inspect(loaded).plan.branches == 3
    assert lc.inspect(loaded).programs["full"] is made_of(loaded)[1].programs["full"]


def test_more_branches_than_the_budget_has_room_for(tmp_path: Path, unplanned: list[str]) -> None:
    budget = room_for(2)
    fast = saved(tmp_path / "saved", policy(budget), [2])
    assert lc.inspect(fast).plan.swap is None
    expected = generate(fast, 2)
    loaded = lc.load(tmp_path / "saved")
    unplanned.append("all")
    with pytest.raises(BudgetError) as raised:
        generate(loaded, 4)
    assert str(raised.value).startswith("memory_budget: a step of 3 calls of Tower takes ")
    assert "for 2 calls a step at most; the budget is" in str(raised.value)
    assert "calls_per_step=3, and save that" in str(raised.value)
    assert raised.value.reached is not None
    assert raised.value.reached == budget + SLOT_BYTES  # two more of them are kept, and planning counted one twice
    assert_same(generate(loaded, 2), expected)


def test_what_is_swapped_for_more_branches_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = policy(room_for(2))
    fast = lc.transform(Tower(), asked)
    generate(fast, 4)
    assert lc.inspect(fast).plan.swap is not None
    with pytest.raises(SaveError, match=r"save: Tower\.forward swaps weights or features"):
        lc.save(fast, tmp_path / "swapped")
    generate(fast, 2)
    assert lc.inspect(fast).plan.branches == 2
    with caplog.at_level("INFO"):
        lc.save(fast, tmp_path / "saved")
    assert [r.message for r in caplog.records if r.name == "lightcache_fx.saving"] == [
        "what is swapped for 3 calls a step is not saved",
        "what is swapped for 4 calls a step is not saved",
    ]
    loaded = lc.load(tmp_path / "saved")
    assert sorted(made_of(loaded)) == [1, 2]
    assert_same(generate(loaded, 2), generate(fast, 2))


def test_chunks_of_each_number(tmp_path: Path) -> None:
    asked = policy(chunk=Chunk(budget="70%"))
    fast = saved(tmp_path / "saved", asked, [1, 2])
    loaded = lc.load(tmp_path / "saved")
    assert made_of(loaded)[2].plan.chunks == made_of(fast)[2].plan.chunks
    assert any(chunk.regions for chunk in made_of(loaded)[2].plan.chunks.values())
    assert_same(generate(loaded, 2), generate(fast, 2))


# Edited on purpose --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["plan"].update(branches=1), r"this signature is there twice, with 1 calls a step$"),
        (lambda d: d["plan"].update(branches=0), r"plan\.branches: Input should be greater than or equal to 1$"),
        (lambda d: d["plan"].update(branches=65), r"plan\.branches: Input should be less than or equal to 64$"),
        (lambda d: d["plan"].pop("branches"), r"plan\.branches: Field required$"),
        (lambda d: d["plan"].update(full_flops=1), r"this signature has another plan where a step has other calls$"),
        (lambda d: d.update(route="guess"), r"this signature has another output where a step has other calls$"),
        (lambda d: d["call"].update(has_generator=True), None),
    ],
)
def test_edited(tmp_path: Path, change: Any, expected: str | None) -> None:
    saved(tmp_path / "saved", policy(), [1, 2])
    edit(tmp_path / "saved", change, "signature_1.json")
    if expected is None:  # another call, so another signature
        assert len(lc.load(tmp_path / "saved")._lightcache.runtime.repertoire.compiled) == 2
        return
    with pytest.raises(LoadError, match=rf"^signature_1\.json.*{expected}"):
        lc.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("asked", "branches", "expected"),
    [
        (Policy.deepcache(3, 0), 2, "its plan is for 2 calls a step, unlike the policy's 1"),
        (policy(calls_per_step=3), 2, "its plan is for 2 calls a step, unlike the policy's 3"),
    ],
)
def test_unlike_the_policy(tmp_path: Path, asked: Policy, branches: int, expected: str) -> None:
    saved(tmp_path / "saved", asked, [1])
    lc.load(tmp_path / "saved")
    edit(tmp_path / "saved", lambda d: d["plan"].update(branches=branches), "signature_0.json")
    with pytest.raises(LoadError, match=rf"^signature_0\.json: {expected}$"):
        lc.load(tmp_path / "saved")
