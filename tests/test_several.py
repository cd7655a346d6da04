"""Several caches at once, each with a schedule of its own: against hooks written out here, and diffusers' own PAB."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightcache_fx as lc
from beside import OTHERS, check_beside
from elsewhere import run_elsewhere
from lightcache_fx.caching import Cache
from lightcache_fx.cuts import matching
from lightcache_fx.errors import CutError, PolicyError
from lightcache_fx.measure import measure_peak
from lightcache_fx.schedule import Schedules, fresh_of, program_name
from oracle import HookOracle, ResidualOracle, assert_bitwise, hooked_step, plain_step, storage_bytes
from swap_cases import least_budget, small_weights
from zoo import ZOO, run_inputs

NUM_STEPS = 9


class StepOracle(Protocol):
    """What an oracle of one cut does during a step."""

    def hooked(self, full: bool) -> AbstractContextManager[None]: ...


def check(
    model: nn.Module, oracles: Sequence[StepOracle], caches: list[lc.Cache], steps: Sequence[dict[str, Any]]
) -> nn.Module:
    """Each step is the eager model with every value replaced that its cache's schedule does not compute."""
    fast = lc.transform(model, lc.Policy(cache=caches))
    expected = []
    for step, inputs in enumerate(steps):
        fresh = [by_hand(cache, step) for cache in caches]
        expected.append("full" if all(fresh) else "reuse" if not any(fresh) else name_by_hand(fresh))
        with ExitStack() as stack:
            for oracle, full in zip(oracles, fresh, strict=True):
                stack.enter_context(oracle.hooked(full))
            outputs = plain_step(model, **inputs)
        assert_bitwise(plain_step(fast, **inputs), outputs, f"step {step}: {expected[-1]}")
    assert [run.program for run in lc.inspect(fast).timeline if run.program != "prologue"] == expected
    return fast


def by_hand(cache: lc.Cache, step: int) -> bool:
    """Whether a step computes what a cache keeps."""
    if cache.mask is not None:
        return cache.mask[step]
    if step < cache.first:
        return True
    return step in cache.steps if cache.steps is not None else step % (cache.interval or 1) == 0


def name_by_hand(fresh: Sequence[bool]) -> str:
    return "fresh" + "and".join(str(place) for place, one in enumerate(fresh) if one)


def paths_of(model: nn.Module, end: str, start: str = "") -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith("." + end) and path.startswith(start)]


@pytest.mark.parametrize("name", ["wan", "sd", "animatediff"])
def test_attention_over_ranges_of_its_own(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    patterns = {"wan": ("blocks.*.attn1", "blocks.*.attn2")}.get(name, ("**.attn1", "**.attn2"))
    caches = [lc.Cache(cut=patterns[0], interval=2), lc.Cache(cut=patterns[1], interval=3, first=2)]
    oracles = [HookOracle(model, paths_of(model, end)) for end in ("attn1", "attn2")]
    fast = check(model, oracles, caches, run_inputs(make_inputs, 0, NUM_STEPS))
    programs = lc.inspect(fast).programs
    assert {"full", "reuse", "fresh0", "fresh1"} == programs.keys() - {"prologue"}
    flops = {program: programs[program].flops for program in programs}
    assert flops["reuse"] < min(flops["fresh0"], flops["fresh1"]) < max(flops["fresh0"], flops["fresh1"])
    assert flops["fresh0"] + flops["fresh1"] == flops["full"] + flops["reuse"]  # each is computed in one of them
    assert max(flops["fresh0"], flops["fresh1"]) < flops["full"]


def test_three_caches_of_three_kinds() -> None:
    """Values, a residual range whose input is not its own, and steps named one by one."""
    model, make_inputs = ZOO["cogvideox"].build()
    last = len(model.transformer_blocks) - 1
    caches = [
        lc.Cache(cut="transformer_blocks.0.attn1", interval=2),
        lc.Cache(cut=lc.Residual(first="transformer_blocks.1", last=f"transformer_blocks.{last}"), steps=[0, 3, 4, 8]),
        lc.Cache(cut="transformer_blocks.0.ff", mask=[True, True, False, False, False, True, False, True, False]),
    ]
    oracles = [
        HookOracle(model, ["transformer_blocks.0.attn1"]),
        ResidualOracle(model, "transformer_blocks.1", f"transformer_blocks.{last}"),
        HookOracle(model, ["transformer_blocks.0.ff"]),
    ]
    fast = check(model, oracles, caches, run_inputs(make_inputs, 0, NUM_STEPS))
    assert len({run.program for run in lc.inspect(fast).timeline} & lc.inspect(fast).plan.combined_flops.keys()) > 2


def test_a_u_nets_branch_beside_attention_outside_of_it() -> None:
    model, make_inputs = ZOO["sd"].build()
    outermost = "up_blocks.3.attentions.1"
    outside = paths_of(model, "attn1", "up_blocks.3.attentions.2")
    caches = [lc.Cache(cut=outermost, interval=3), lc.Cache(cut=outside, interval=2)]
    check(model, [HookOracle(model, [outermost]), HookOracle(model, outside)], caches, run_inputs(make_inputs, 0, 7))


def test_one_inside_of_the_other() -> None:
    """Each is computed by its own schedule, whatever the other does; a note says what that costs."""
    model, make_inputs = ZOO["wan"].build()
    caches = [lc.Cache(cut="blocks.1", interval=3), lc.Cache(cut="blocks.0.attn1", interval=2)]
    oracles = [HookOracle(model, ["blocks.1"]), HookOracle(model, ["blocks.0.attn1"])]
    fast = check(model, oracles, caches, run_inputs(make_inputs, 0, 7))
    (note,) = [note for note in lc.inspect(fast).plan.notes if "lies in" in note]
    assert note.startswith("what cache 1 keeps lies in what cache 0 saves")
    flops = {name: program.flops for name, program in lc.inspect(fast).programs.items()}
    assert flops["reuse"] < flops["fresh1"]
    assert flops == flops | lc.inspect(fast).plan.combined_flops


PAB: dict[str, dict[str, Any]] = {
    "wan": {"spatial": "blocks.*.attn1", "cross": "blocks.*.attn2"},
    "cogvideox": {"spatial": "transformer_blocks.*.attn1"},
    "flux": {"spatial": ["transformer_blocks.*.attn", "single_transformer_blocks.*.attn"]},
    "hunyuanvideo": {"spatial": ["transformer_blocks.*.attn", "single_transformer_blocks.*.attn"]},
    "latte": {
        "spatial": "transformer_blocks.*.attn1",
        "temporal": "temporal_transformer_blocks.*.attn1",
        "cross": "transformer_blocks.*.attn2",
    },
}  # fmt: skip
RANGES = {"spatial": 2, "temporal": 4, "cross": 3}


@pytest.mark.parametrize("name", PAB)
def test_pyramid_attention_broadcast_of_diffusers(name: str) -> None:
    """The same modules, ranges and steps: every output is the same, to the bit.

    Its range of timesteps is one of steps here: those before it and behind it are full.
    """
    model, make_inputs = ZOO[name].build()
    steps = run_inputs(make_inputs, 0, NUM_STEPS)
    times = [900 - 100 * step for step in range(NUM_STEPS)]
    now = [0]
    cuts = PAB[name]
    hooked = copy.deepcopy(model)
    # Without ^ its names of spatial blocks are found in those of temporal blocks and refiners too.
    ranges: dict[str, Any] = {
        "spatial_attention_block_identifiers": ("^blocks", "^transformer_blocks", "^single_transformer_blocks"),
        "cross_attention_block_identifiers": ("^blocks", "^transformer_blocks"),
    }
    ranges |= {f"{kind}_attention_block_skip_range": RANGES[kind] for kind in cuts}
    ranges |= {f"{kind}_attention_timestep_skip_range": (150, 750) for kind in cuts}  # steps 2 to 7
    diffusers.apply_pyramid_attention_broadcast(
        hooked, diffusers.PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: now[0])
    )
    caches = [
        lc.Cache(cut=cut, interval=RANGES[kind], first=2, last=1, num_steps=NUM_STEPS) for kind, cut in cuts.items()
    ]
    fast = lc.transform(model, lc.Policy(cache=caches))
    for step, inputs in enumerate(steps):
        now[0] = times[step]
        assert_bitwise(plain_step(fast, **inputs), hooked_step(hooked, **inputs), f"step {step}")
    ran = [run.program for run in lc.inspect(fast).timeline]
    alone = sum(step < 2 or step == NUM_STEPS - 1 or step % 2 == 0 for step in range(NUM_STEPS))
    assert ran.count("full") == {1: alone, 2: 4, 3: 3}[len(cuts)]
    assert ran.count("reuse") == {1: 3, 2: 2, 3: 2}[len(cuts)]


@pytest.mark.parametrize("others", OTHERS)
def test_beside_the_other_passes(others: dict[str, Any]) -> None:
    model, make_inputs = ZOO["sd"].build()
    caches = [lc.Cache(cut="**.attn1", interval=2, order=1), lc.Cache(cut="**.attn2", interval=3)]
    ran = check_beside(model, caches, others, run_inputs(make_inputs, 0, 7))
    assert [name for name in ran if name != "prologue"] == [
        "full", "reuse", "fresh0", "fresh1", "fresh0", "reuse", "full"
    ]  # fmt: skip


def test_each_with_an_order_of_its_own() -> None:
    """Two caches, extrapolated by orders 1 and 0: against the values that either keeps alone."""
    model, make_inputs = ZOO["wan"].build()
    steps = run_inputs(make_inputs, 0, 6)
    first = lc.Cache(cut="blocks.0.attn1", interval=2, order=1)
    other = lc.Cache(cut="blocks.0.attn2", interval=3, order=2)
    fast = lc.transform(model, lc.Policy(cache=[first, other]))
    kept: dict[str, list[tuple[int, torch.Tensor]]] = {"attn1": [], "attn2": []}

    def hook(name: str, order: int, full: bool, step: int) -> Any:
        def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if full:
                kept[name] = [(step, output.clone()), *kept[name]][: order + 1]
                return output
            return expanded(kept[name], step)

        return model.get_submodule(f"blocks.0.{name}").register_forward_hook(replace)

    for step, inputs in enumerate(steps):
        hooks = [hook("attn1", 1, step % 2 == 0, step), hook("attn2", 2, step % 3 == 0, step)]
        expected = plain_step(model, **inputs)
        for one in hooks:
            one.remove()
        assert_bitwise(plain_step(fast, **inputs), expected, f"step {step}")
    assert lc.inspect(fast).plan.history_bytes == 3 * kept["attn1"][0][1].nbytes


def expanded(values: Sequence[tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
    """The Taylor expansion by what is kept, of order 1 at most in six steps, written out."""
    (at, newest), *older = values
    if not older:
        return newest
    slope = (newest - older[0][1]) / torch.tensor(float(at - older[0][0]))
    return newest + slope * torch.tensor(float(step - at))


def test_saved_and_loaded_elsewhere(tmp_path: Path) -> None:
    model, make_inputs = ZOO["dit"].build()
    caches = [
        lc.Cache(cut="transformer_blocks.*.attn1", interval=2, order=1),
        lc.Cache(cut="transformer_blocks.*.ff", interval=3),
    ]
    fast = lc.transform(model, lc.Policy(cache=caches))
    steps = run_inputs(make_inputs, 0, 7)
    outputs = [plain_step(fast, **inputs) for inputs in steps]
    lc.save(fast, tmp_path / "saved")
    found, counts = run_elsewhere(tmp_path / "saved", tmp_path, [[((), inputs) for inputs in steps]])
    for step, (one, other) in enumerate(zip(found, outputs, strict=True)):
        assert_bitwise(one, other, f"step {step}")
    assert counts["fresh0"] == 2
    assert counts["fresh1"] == 1


def test_behind_torch_compile() -> None:
    model, make_inputs = ZOO["dit"].build()
    caches = [
        lc.Cache(cut="transformer_blocks.*.attn1", interval=2),
        lc.Cache(cut="transformer_blocks.*.ff", interval=3),
    ]
    steps = run_inputs(make_inputs, 0, 7)
    fast = lc.transform(model, lc.Policy(cache=caches))
    policy = lc.Policy(cache=caches, compile="eager")
    compiled = torch.compile(copy.deepcopy(model), backend="lightcache", fullgraph=True, options={"policy": policy})
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(compiled, **inputs), plain_step(fast, **inputs), f"step {step}")
    ran = [[run.program for run in lc.inspect(one).timeline] for one in (fast, compiled)]
    assert ran[0] == ran[1]
    assert {"fresh0", "fresh1"} < set(ran[0])


def test_other_sizes() -> None:
    """Sizes that vary share one capture; another size begins a run."""
    model, make_inputs = ZOO["dit"].build()
    caches = [
        lc.Cache(cut="transformer_blocks.*.attn1", interval=2),
        lc.Cache(cut="transformer_blocks.*.ff", interval=3),
    ]
    fast = lc.transform(model, lc.Policy(cache=caches))
    for batch in (2, 3, 4):
        steps = run_inputs(make_inputs, 0, 5)
        steps = [{key: resized(value, batch) for key, value in inputs.items()} for inputs in steps]
        fixed = lc.transform(copy.deepcopy(model), lc.Policy(cache=caches, dynamic=False))
        for step, inputs in enumerate(steps):
            assert_bitwise(plain_step(fast, **inputs), plain_step(fixed, **inputs), f"batch {batch}, step {step}")


def resized(value: Any, batch: int) -> Any:
    return value[:1].expand(batch, *value.shape[1:]).contiguous() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("swap", [lc.Swap(budget="75%"), pytest.param(lc.Swap(weights=False), marks=pytest.mark.slow)])
def test_the_peak_is_as_planned(swap: lc.Swap) -> None:
    """What stays between steps, and what each program takes beside it."""
    model, make_inputs = ZOO["svd"].build()
    caches = [lc.Cache(cut="**.attn1", interval=2, order=1), lc.Cache(cut="**.attn2", interval=3)]
    fast = lc.transform(model, lc.Policy(cache=caches, swap=swap))
    steps = run_inputs(make_inputs, 0, 7)

    def run() -> None:
        lc.reset(fast)
        for inputs in steps:
            plain_step(fast, **inputs)

    run()
    report = lc.inspect(fast)
    plan, (branch,) = report.plan, fast._lightcache.runtime.tracker.branches
    assert storage_bytes((branch.stores.slots, branch.stores.history)) == plan.slot_bytes + plan.history_bytes
    assert plan.swap is not None
    lc.reset(fast)  # or what is freed during the run would count
    measured = measure_peak(run).peak_bytes + small_weights(model, plan.swap)
    assert 0.95 * plan.swap.plan.peak_bytes <= measured <= plan.swap.plan.peak_bytes
    lc.restore(fast)


SHORT = [lc.Cache(cut="blocks.*.attn1", interval=2), lc.Cache(cut="blocks.*.attn2", interval=3, order=1)]
LONG = [lc.Cache(cut="blocks.*.attn1", interval=11, first=3), lc.Cache(cut="blocks.*.ffn", steps=[0, 3, 4, 9])]


@pytest.mark.parametrize("caches", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("share", [1.0, pytest.param(1.3, marks=pytest.mark.slow)])
def test_slots_leave_the_device(caches: list[lc.Cache], share: float) -> None:
    """Of two guidance branches, also over more steps than are planned; behind a run broken off; as high as planned."""
    model, make_inputs = ZOO["wan"].build()
    runs = [run_inputs(make_inputs, 0, 13), run_inputs(make_inputs, 1, 13)]

    def generate(fast: Any, last: int = 13, *, keep: bool = True) -> list[torch.Tensor]:
        found = []
        with lc.marked_run(13):
            for calls in list(zip(*runs, strict=True))[:last]:
                for branch, inputs in enumerate(calls):
                    with lc.branch_name(str(branch)):
                        found += plain_step(fast, **inputs)[: 1 if keep else 0]
                lc.step_done()
        return found

    stays = lc.transform(copy.deepcopy(model), lc.Policy(cache=caches))
    expected = generate(stays)
    swap = lc.Swap(budget=int(share * least_budget(model, runs[0][0], cache=caches, calls_per_step=2)))
    fast = lc.transform(copy.deepcopy(model), lc.Policy(cache=caches, calls_per_step=2, swap=swap))
    generate(fast, 5)
    assert_bitwise(generate(fast), expected, "behind a run that was broken off")
    programs = [[run.program.partition("_")[0] for run in lc.inspect(one).timeline] for one in (fast, stays)]
    assert programs[0] == programs[1]
    planned = lc.inspect(fast).plan.swap
    left = {stay.name.partition("@")[0] for stay in planned.plan.residence.stays if stay.offloaded}
    assert {slot.cache for slot in lc.inspect(fast).plan.slots if slot.name in left} == {0, 1}
    lc.reset(fast)
    measured = measure_peak(lambda: generate(fast, keep=False)).peak_bytes + small_weights(model, planned)
    assert 0.95 * planned.plan.peak_bytes <= measured <= planned.plan.peak_bytes
    lc.restore(fast)


def test_a_slot_that_a_program_does_not_read_has_no_history_there() -> None:
    """The last block's attention over the text ends in its own feed-forward layer, which another cache saves."""
    model, make_inputs = ZOO["cogvideox"].build()
    caches = [
        lc.Cache(cut="transformer_blocks.*.attn1", interval=4, order=1),
        lc.Cache(cut="transformer_blocks.*.ff", interval=3, order=1),
    ]
    steps = run_inputs(make_inputs, 0, 7)
    stays = lc.transform(copy.deepcopy(model), lc.Policy(cache=caches))
    expected = [plain_step(stays, **inputs) for inputs in steps]
    inputs = lc.inspect(stays).programs["reuse"].inputs
    slots, older = ({given.name for given in inputs if given.kind == kind} for kind in ("slot", "history"))
    assert len(older) < len(slots), "one is not read"
    assert older < {f"{name}_before_1" for name in slots}
    swap = lc.Swap(budget=least_budget(model, steps[0], cache=caches))
    fast = lc.transform(model, lc.Policy(cache=caches, swap=swap))
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(fast, **inputs), expected[step], f"step {step}")
    assert lc.inspect(fast).plan.swap.history_away
    lc.restore(fast)


def test_a_period_is_the_longest_stretch_between_full_steps() -> None:
    """Three full steps at first and one at the end: the steps between them, as far as they are told apart."""
    model, make_inputs = ZOO["wan"].build()
    ends = {"first": 3, "last": 1, "num_steps": 14}
    caches = [lc.Cache(cut="blocks.*.attn1", interval=2, **ends), lc.Cache(cut="blocks.*.attn2", interval=5, **ends)]
    swap = lc.plan(model, kwargs=make_inputs(0), policy=lc.Policy(cache=caches, swap=lc.Swap())).swap
    assert swap is not None
    between = ("reuse", "fresh0", "fresh1", "fresh0", "reuse", "fresh0", "reuse")
    assert swap.names == ("full", *between)  # steps 2 to 9; 10, a multiple of both, is full again
    assert [swap.step_for("fresh1", ["full", *before], None) for before in ([], ["fresh0"])] == [3, 3]
    again = replace(swap, names=("full", "reuse", "fresh0", "reuse", "fresh1", "reuse", "fresh0"))
    before = ["full", "reuse", "fresh0", "reuse", "fresh1", "reuse"]
    assert [again.step_for(before[step], before[:step], None) for step in range(1, 6)] == [1, 2, 3, 4, 5]
    assert again.step_for("fresh0", before, None) == 6
    assert again.step_for("reuse", ["full", "fresh1", "fresh1"], None) == 5, "as far back as they are alike"
    assert again.step_for("reuse", ["fresh0"], None) == 3


def test_guidance_branches_and_runs() -> None:
    """Each branch by itself; an exception in the midst of a run, and the run after it is as the first."""
    model, make_inputs = ZOO["wan"].build()
    caches = [lc.Cache(cut="blocks.*.attn1", interval=2), lc.Cache(cut="blocks.*.attn2", interval=3)]
    runs = [run_inputs(make_inputs, 0, 5), run_inputs(make_inputs, 1, 5)]
    alone = []
    for steps in runs:
        fast = lc.transform(model, lc.Policy(cache=caches))
        alone.append([plain_step(fast, **inputs) for inputs in steps])
    fast = lc.transform(model, lc.Policy(cache=caches))
    for last in (3, 5):
        with lc.marked_run(5):
            for step, calls in enumerate(zip(*runs, strict=True)):
                if step == last:
                    break
                for branch, inputs in enumerate(calls):
                    with lc.branch_name(str(branch)):
                        assert_bitwise(plain_step(fast, **inputs), alone[branch][step], f"step {step}, branch {branch}")
                lc.step_done()
        if last == 3:
            with pytest.raises(AttributeError):  # the model's own
                plain_step(fast, **{**runs[0][3], "hidden_states": None})


@settings(max_examples=60, deadline=None)
@given(
    rules=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3)), min_size=2, max_size=4),
    num_steps=st.integers(8, 60),
    known=st.booleans(),
)
def test_every_step_has_a_program(rules: list[tuple[int, int, int]], num_steps: int, known: bool) -> None:
    """What steps combine is known before, whether or not the number of steps is."""
    caches = [
        Cache(cut="a", interval=interval, first=first, last=last, num_steps=num_steps if known else None)
        for interval, first, last in rules
    ]
    schedules = Schedules.of(caches)
    planned = set(schedules.combinations())
    for step in range(num_steps):
        fresh = schedules.fresh(step, num_steps)
        assert fresh in planned
        assert fresh == tuple(
            place
            for place, (interval, first, last) in enumerate(rules)
            if step < first or step >= num_steps - last or step % interval == 0
        )
        assert fresh_of(program_name(fresh, len(rules)), len(rules)) == fresh


def test_yaml(tmp_path: Path) -> None:
    policy = lc.Policy(
        cache=[lc.Cache(cut="**.attn1", interval=2), lc.Cache(cut=lc.Residual(first="a", last="b"), steps=[0, 3])]
    )
    policy.to_yaml(tmp_path / "policy.yaml")
    assert lc.Policy.from_yaml(tmp_path / "policy.yaml") == policy
    assert lc.Policy(cache=[{"cut": 0, "interval": 2}]) == lc.Policy(cache=lc.Cache(cut=0, interval=2))


AUTO: dict[str, Any] = {"cut": "auto", "interval": 2}
TWO: dict[str, Any] = {"cut": 1, "interval": 2}


@pytest.mark.parametrize(
    ("caches", "match"),
    [
        ([], "cache: an empty list of caches; leave `cache` out"),
        ([AUTO, TWO], "cache: cache 0 of 2 has cut='auto'; of several caches each names its cut"),
        ([TWO, {"cut": 0, "adaptive": {"threshold": 0.1}}], "cache: cache 1 of 2 has adaptive; of several caches each"),
        (
            [TWO, {"cut": 0, "magnitude": {"ratios": [1.0]}}],
            "cache: cache 1 of 2 has magnitude; of several",
        ),
        ([{**TWO, "guard": {"bound": 0.1}}] * 2, "cache: guard is about all caches; give it with one of them"),
        ([{**TWO, "num_steps": 5}, {"cut": 0, "mask": [True]}], r"runs of different lengths, \[1, 5\] steps"),
        ([TWO, 3], "expected a Cache, or a mapping with the keys cut"),
    ],
)
def test_caches_that_cannot_be_beside_each_other(caches: list[Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        lc.Policy(cache=caches)


@pytest.mark.parametrize(
    ("cuts", "match"),
    [
        (
            ["blocks.*.attn1", "blocks.0.attn1"],
            r"cache 1 keeps %.* of cut blocks\.0\.attn1, and so does cache 0; name each module in one of them",
        ),
        (
            ["blocks.*.attn3", "blocks.0"],
            r"cut='blocks\.\*\.attn3': Wan\w+ has no modules of such paths;",
        ),
        (["blocks.*.attn1.norm_added*", "blocks.0"], "no modules of such paths|nothing that these"),
    ],
)
def test_cuts_that_cannot_be_beside_each_other(cuts: list[str], match: str) -> None:
    model, make_inputs = ZOO["wan"].build()
    with pytest.raises(CutError, match=match):
        plain_step(
            lc.transform(model, lc.Policy(cache=[lc.Cache(cut=cut, interval=2) for cut in cuts])),
            **run_inputs(make_inputs, 0, 1)[0],
        )


def test_a_module_that_two_patterns_name_is_kept_once() -> None:
    model, make_inputs = ZOO["wan"].build()
    cache = lc.Cache(cut=["blocks.*.attn1", "blocks.0.attn1"], interval=2)
    fast = lc.transform(model, lc.Policy(cache=cache))
    oracle = HookOracle(model, paths_of(model, "attn1"))
    for step, inputs in enumerate(run_inputs(make_inputs, 0, 3)):
        assert_bitwise(plain_step(fast, **inputs), oracle.step(step % 2 == 0, **inputs), f"step {step}")
    assert len(lc.inspect(fast).plan.slots) == len(model.blocks)


def test_patterns() -> None:
    model, _ = ZOO["sd"].build()
    every = [path for path, _ in model.named_modules() if path.endswith(".attn1")]
    assert matching("**.attn1", model) == every
    assert matching("up_blocks.*", model) == [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    assert matching("up_blocks.3.attentions.?", model) == []
    assert matching("mid_b*k.attentions.*", model) == ["mid_block.attentions.0"]
