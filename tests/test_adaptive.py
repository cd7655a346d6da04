"""Steps that decide for themselves: against hooks and rules written out here, and against diffusers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.mag_cache import nearest_interp
from torch import nn

import lightcache_fx as lc
from beside import OTHERS, check_beside
from lightcache_fx.errors import CutError, PolicyError, ScheduleError
from lightcache_fx.magnitudes import MagnitudeRule, at_steps, full_steps
from lightcache_fx.measure import measure_peak
from oracle import HookOracle, Oracle, ResidualOracle, assert_bitwise, hooked_step, plain_step, tensors
from swap_cases import small_weights
from zoo import ZOO, run_inputs

NUM_STEPS = 10
TRANSFORMERS = {
    "wan": ("blocks", "blocks"),
    "cogvideox": ("transformer_blocks", "transformer_blocks"),
    "flux": ("transformer_blocks", "single_transformer_blocks"),
    "hunyuanvideo": ("transformer_blocks", "single_transformer_blocks"),
}


def residual(model: nn.Module, name: str, first: int) -> lc.Residual:
    one, other = TRANSFORMERS[name]
    return lc.Residual(first=f"{one}.{first}", last=f"{other}.{len(model.get_submodule(other)) - 1}")


def kinds(fast: nn.Module) -> list[bool]:
    """Whether each step of the last run was full."""
    return [run.program.startswith("full") for run in lc.inspect(fast).timeline if run.program[:4] in ("full", "reus")]


def gentle(make_inputs: Callable[..., dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """Steps whose latents drift, faster and faster, so that some of them may be reused and others not."""
    steps = run_inputs(make_inputs, 0, num_steps)
    latent = "hidden_states" if "hidden_states" in steps[0] else "sample"
    first, last = steps[0][latent], steps[-1][latent]
    for step, inputs in enumerate(steps):
        weight = (step / num_steps) ** 2
        inputs[latent] = (1 - weight) * first + weight * last
    return steps


def changes(model: nn.Module, steps: list[dict[str, Any]], look: Callable[[nn.Module], Any]) -> list[torch.Tensor]:
    """The indicator at each step, by a hook that `look` places on the eager model."""
    found: list[torch.Tensor] = []
    for inputs in steps:
        with ExitStack() as stack:
            seen: list[torch.Tensor] = []
            stack.callback(look(model)(seen).remove)
            plain_step(model, **inputs)
        found.append(seen[0])
    return found


def relative(now: torch.Tensor, before: torch.Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


def decide(rule: lc.Adaptive, indicators: list[torch.Tensor]) -> list[bool]:
    """The rule, written out: whether each step is full."""
    found: list[bool] = []
    reference, before, total, reused, late = None, None, 0.0, 0, 0.0
    for now in indicators:
        compared = before if rule.since == "step" else reference
        change = relative(now, compared) if compared is not None else 0.0
        used, late = (late, change) if rule.ahead else (change, change)
        power = len(rule.polynomial or []) - 1
        if rule.polynomial is not None:
            used = sum(c * used ** (power - i) for i, c in enumerate(rule.polynomial))
        total += used
        over = total >= rule.threshold if rule.since == "step" else used > rule.threshold
        full = reference is None or over or (rule.max_reuse is not None and reused >= rule.max_reuse)
        found.append(full)
        if full:
            reference, total, reused, late = now, 0.0, 0, 0.0
        else:
            reused += 1
        before = now
    return found


def check(fast: nn.Module, oracle: Oracle, full: list[bool], steps: list[dict[str, Any]]) -> None:
    assert full[0]
    assert not all(full)
    assert any(full[1:])
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(fast, **inputs), oracle.step(full[step], **inputs), f"step {step}")
    assert kinds(fast) == full


def output_of(path: str) -> Callable[[nn.Module], Any]:
    def look(model: nn.Module) -> Any:
        def place(seen: list[torch.Tensor]) -> Any:
            return model.get_submodule(path).register_forward_hook(
                lambda module, args, output: seen.append(tensors(output)[0].clone())
            )

        return place

    return look


def residual_of(path: str) -> Callable[[nn.Module], Any]:
    def look(model: nn.Module) -> Any:
        def place(seen: list[torch.Tensor]) -> Any:
            return model.get_submodule(path).register_forward_hook(
                lambda module, args, output: seen.append(tensors(output)[0] - args[0])
            )

        return place

    return look


RULES = {
    "first block": lc.Adaptive(threshold=0.3, indicator="blocks.0"),
    "at most one reused": lc.Adaptive(threshold=0.3, indicator="blocks.0", max_reuse=1),
    "one step late": lc.Adaptive(threshold=0.3, indicator="blocks.0", ahead=True),
    "summed": lc.Adaptive(threshold=0.5, indicator="blocks.0", since="step"),
    "summed, one step late": lc.Adaptive(threshold=0.5, indicator="blocks.0", since="step", ahead=True),
    "polynomial": lc.Adaptive(threshold=0.5, indicator="blocks.0", since="step", polynomial=[0.5, 2.0, 0.01]),
    "modulated input": lc.Adaptive(threshold=0.3, indicator="blocks.0.norm1", of="output", since="step"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules(rule: lc.Adaptive) -> None:
    model, make_inputs = ZOO["wan"].build()
    steps = gentle(make_inputs, NUM_STEPS)
    assert rule.indicator is not None
    look = output_of(rule.indicator) if rule.of == "output" else residual_of(rule.indicator)
    full = decide(rule, changes(model, steps, look))
    cut = residual(model, "wan", 1)
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, adaptive=rule)))
    check(fast, ResidualOracle(model, cut.first, cut.last), full, steps)
    counts = lc.inspect(fast).counts
    assert counts["probe"] == NUM_STEPS


@pytest.mark.parametrize(
    ("name", "depth", "path", "entry", "threshold"),
    [
        ("sd", 0, "up_blocks.3.attentions.1", "conv_in", 0.2),
        ("svd", 0, "up_blocks.2.attentions.1", "conv_in", 0.2),
    ],
)  # fmt: skip
def test_u_nets_decide_by_what_enters_what_is_left_out(
    name: str, depth: int, path: str, entry: str, threshold: float
) -> None:
    model, make_inputs = ZOO[name].build()
    steps = gentle(make_inputs, NUM_STEPS)
    rule = lc.Adaptive(threshold=threshold)
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=depth, adaptive=rule)))
    full = decide(rule, changes(model, steps, output_of(entry)))
    check(fast, HookOracle(model, [path]), full, steps)
    full_graph, probe = (lc.inspect(fast).programs[kind] for kind in ("full", "probe"))
    whole = lc.transform(copy.deepcopy(model))
    plain_step(whole, **steps[0])
    assert full_graph.flops + probe.flops == lc.inspect(whole).programs["full"].flops  # nothing is computed twice


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_first_block_cache_of_diffusers(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    steps = gentle(make_inputs, NUM_STEPS)
    threshold = 0.2 if name == "wan" else 0.8
    hooked = copy.deepcopy(model)
    hooked.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    one, _ = TRANSFORMERS[name]
    rule = lc.Adaptive(threshold=threshold, indicator=f"{one}.0")
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=residual(model, name, 1), adaptive=rule)))
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(fast, **inputs), hooked_step(hooked, **inputs), f"step {step}")
    assert 0 < kinds(fast).count(False) < NUM_STEPS - 1


def test_guidance_branches_decide_by_themselves() -> None:
    """Two branches in turn, of which one changes more: each as in a run of its own."""
    model, make_inputs = ZOO["wan"].build()
    cut = residual(model, "wan", 1)
    rule = lc.Adaptive(threshold=0.3, indicator="blocks.0")
    policy = lc.Policy(cache=lc.Cache(cut=cut, adaptive=rule))
    runs = [gentle(make_inputs, NUM_STEPS), run_inputs(make_inputs, 0, NUM_STEPS)]
    other = run_inputs(make_inputs, 7, 1)[0]["encoder_hidden_states"]
    runs[1] = [{**inputs, "encoder_hidden_states": other} for inputs in runs[1]]
    alone, decisions = [], []
    for steps in runs:
        fast = lc.transform(model, policy)
        alone.append([plain_step(fast, **inputs) for inputs in steps])
        decisions.append(kinds(fast))
    assert decisions[0] != decisions[1]
    fast = lc.transform(model, policy)
    with lc.marked_run(NUM_STEPS):
        for step, calls in enumerate(zip(*runs, strict=True)):
            for branch, inputs in enumerate(calls):
                with lc.branch_name(str(branch)):
                    assert_bitwise(plain_step(fast, **inputs), alone[branch][step], f"step {step}, branch {branch}")
            lc.step_done()


RATIOS = [1.0, 1.2, 1.05, 0.99, 1.01, 0.97, 0.95, 0.98, 0.9, 0.8]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_magcache_of_diffusers(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    steps = run_inputs(make_inputs, 0, NUM_STEPS)
    hooked = copy.deepcopy(model)
    hooked.enable_cache(diffusers.MagCacheConfig(num_inference_steps=NUM_STEPS, mag_ratios=RATIOS, threshold=0.08))
    magnitude = lc.Magnitude(ratios=RATIOS, threshold=0.08)
    cache = lc.Cache(cut=residual(model, name, 0), magnitude=magnitude, num_steps=NUM_STEPS)
    fast = lc.transform(model, lc.Policy(cache=cache))
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(fast, **inputs), hooked_step(hooked, **inputs), f"step {step}")
    assert 0 < kinds(fast).count(False) < NUM_STEPS - 1


def test_magnitudes_by_hand() -> None:
    rule = MagnitudeRule((1, 1, 1.05, 1.0, 0.5, 1.0), threshold=0.11, max_reuse=3, retention=0.2)
    # step 2: 0.05; 3: 0.05 + 0.05; 4: 0.525, 0.575; 5: anew, 0
    assert full_steps(rule, 6) == (True, False, False, False, True, False)
    assert full_steps(rule._replace(max_reuse=1), 6) == (True, False, True, False, True, False)
    assert full_steps(rule, 6, first=3) == (True, True, True, False, True, False)
    assert full_steps(rule, 6, last=1) == (True, False, False, False, True, True)
    grown = rule._replace(ratios=(1, 1, 1.1, 1.1, 1, 1), threshold=0.25)  # 0.1; 0.1 + 0.21; anew
    assert full_steps(grown, 6) == (True, False, False, True, False, False)
    assert full_steps(rule._replace(ratios=(1.0, 3.0), retention=0), 4) == (True, False, True, True)  # 1, 1, 3, 3


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 14, 31])
def test_ratios_of_another_number_of_steps_are_the_nearest(num_steps: int) -> None:
    expected = nearest_interp(torch.tensor(RATIOS, dtype=torch.float64), num_steps)
    assert at_steps(RATIOS, num_steps) == expected.tolist()


@pytest.mark.parametrize("others", OTHERS)
def test_beside_the_other_passes(others: dict[str, Any]) -> None:
    model, make_inputs = ZOO["sd"].build()
    cache = lc.Cache(cut=0, adaptive=lc.Adaptive(threshold=0.2), order=1)
    ran = check_beside(model, cache, others, gentle(make_inputs, NUM_STEPS))
    assert 0 < ran.count("reuse") < NUM_STEPS - 1


def test_two_runs_and_an_exception_between() -> None:
    model, make_inputs = ZOO["wan"].build()
    cut = residual(model, "wan", 1)
    rule = lc.Adaptive(threshold=0.5, indicator="blocks.0", since="step")
    fast = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, adaptive=rule)))
    steps = gentle(make_inputs, NUM_STEPS)
    first = [plain_step(fast, **inputs) for inputs in steps]
    found = kinds(fast)
    for inputs in steps[:4]:
        plain_step(fast, **inputs)
    broken = {**steps[4], "hidden_states": torch.full_like(steps[4]["hidden_states"], float("nan"))}
    with pytest.raises(ScheduleError, match=r"adaptive: at step 4 the change of what blocks\.0 adds is nan"):
        plain_step(fast, **broken)
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(fast, **inputs), first[step], f"step {step}")
    assert kinds(fast) == found


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threshold": 0}, "threshold"),
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 0.1, "max_reuse": 0}, "max_reuse"),
        ({"threshold": 0.1, "of": "output"}, "indicator"),
        ({"threshold": 0.1, "polynomial": []}, "polynomial"),
        ({"threshold": 0.1, "polynomial": [float("inf")]}, "polynomial"),
        ({"threshold": 0.1, "since": "always"}, "since"),
    ],
)
def test_bad_rules(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        lc.Adaptive(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ratios": []}, "ratios"),
        ({"ratios": [1.0, -1.0]}, "ratios"),
        ({"ratios": [1.0, float("nan")]}, "ratios"),
        ({"ratios": [1.0], "threshold": 0}, "threshold"),
        ({"ratios": [1.0], "retention": 1.5}, "retention"),
    ],
)
def test_bad_magnitudes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        lc.Magnitude(**settings)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"adaptive": 0.1}, "adaptive: expected an Adaptive, or a mapping with the keys threshold, indicator, of"),
        ({"magnitude": [1.0, 0.9]}, "magnitude: expected a Magnitude, or a mapping with the keys ratios, threshold"),
        ({"interval": 2, "guard": 0.1}, "guard: expected a Guard, or a mapping with the keys bound, every, got 0.1"),
    ],
)
def test_numbers_instead_of_rules(rule: dict[str, Any], expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        lc.Cache(cut=0, **rule)


def test_two_schedules_are_refused() -> None:
    with pytest.raises(PolicyError, match="exactly one of interval, steps, mask, magnitude, adaptive"):
        lc.Cache(cut=0, interval=2, adaptive=lc.Adaptive(threshold=0.1))


@pytest.mark.parametrize(
    ("indicator", "match"),
    [("blocks.9", "no such module"), ("blocks.2", "cannot be known before that")],
)
def test_indicators_that_cannot_be(indicator: str, match: str) -> None:
    model, make_inputs = ZOO["wan"].build()
    rule = lc.Adaptive(threshold=0.1, indicator=indicator)
    cut = lc.Residual(first="blocks.1", last="blocks.2")
    with pytest.raises(CutError, match=match):
        plain_step(lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, adaptive=rule))), **make_inputs(0))


def test_magnitudes_need_the_number_of_steps() -> None:
    model, make_inputs = ZOO["wan"].build()
    cache = lc.Cache(cut=residual(model, "wan", 0), magnitude=lc.Magnitude(ratios=RATIOS))
    with pytest.raises(ScheduleError, match="magnitude: the number of steps is not known"):
        plain_step(lc.transform(model, lc.Policy(cache=cache)), **make_inputs(0))


def test_yaml() -> None:
    for schedule in ({"adaptive": RULES["polynomial"]}, {"magnitude": lc.Magnitude(ratios=RATIOS)}):
        policy = lc.Policy(cache=lc.Cache(cut=0, order=2, **schedule))
        assert lc.Policy.from_yaml(policy.to_yaml()) == policy


def test_behind_torch_compile() -> None:
    model, make_inputs = ZOO["dit"].build()
    steps = gentle(make_inputs, NUM_STEPS)
    rule = lc.Adaptive(threshold=1.5, indicator="transformer_blocks.0", max_reuse=2)
    policy = lc.Policy(cache=lc.Cache(cut="transformer_blocks.1", adaptive=rule), compile="eager")
    fast = lc.transform(copy.deepcopy(model), policy)
    compiled = torch.compile(model, backend="lightcache", fullgraph=True, options={"policy": policy})
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(compiled, **inputs), plain_step(fast, **inputs), f"step {step}")
    assert lc.inspect(compiled).counts == lc.inspect(fast).counts
    assert 0 < kinds(fast).count(False) < NUM_STEPS - 1


@pytest.mark.parametrize("adaptive", [True, False])
def test_saved_and_loaded(adaptive: bool, tmp_path: Path) -> None:
    model, make_inputs = ZOO["wan"].build()
    steps = gentle(make_inputs, NUM_STEPS)
    schedule: dict[str, Any] = {"adaptive": RULES["first block"]} if adaptive else {"interval": 3}
    cache = lc.Cache(cut=residual(model, "wan", 1), order=2, **schedule)
    fast = lc.transform(model, lc.Policy(cache=cache))
    expected = [plain_step(fast, **inputs) for inputs in steps]
    lc.save(fast, tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    for step, inputs in enumerate(steps):
        assert_bitwise(plain_step(loaded, **inputs), expected[step], f"step {step}")
    assert kinds(loaded) == kinds(fast)


class WideFront(nn.Module):
    """What a step decides by takes more memory to compute than all that comes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(4, 2048), nn.GELU(), nn.Linear(2048, 64))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))
        self.outer = nn.Linear(128, 4)
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        skip = self.front(sample)
        up = skip * torch.sin(timestep.to(sample.dtype).reshape(-1, 1) / 100)
        for block in self.blocks:
            up = up + block(up)
        return self.outer(torch.cat([up, skip], dim=-1))


@pytest.mark.parametrize("budget", ["70%", "85%", "100%"])
def test_the_peak_of_a_probe_is_planned(budget: str) -> None:
    """Allocation by allocation, over a run that decides for full and for reuse steps."""
    model = WideFront()
    cache = lc.Cache(cut=0, adaptive=lc.Adaptive(threshold=0.5, max_reuse=2))
    fast = lc.transform(model, lc.Policy(cache=cache, swap=lc.Swap(budget=budget)))
    torch.manual_seed(0)
    steps = [(torch.randn(64, 4), torch.tensor(900.0 - 50 * step)) for step in range(NUM_STEPS)]

    def run() -> None:
        with torch.no_grad(), lc.marked_run(NUM_STEPS):
            for inputs in steps:
                fast(*inputs)
                lc.step_done()

    run()
    lc.reset(fast)
    swap = lc.inspect(fast).plan.swap
    measured = measure_peak(run).peak_bytes + small_weights(model, swap)
    assert 0.95 * swap.plan.peak_bytes <= measured <= swap.plan.peak_bytes
    lc.restore(fast)
