"""Random small models, random cuts, random schedules: programs equal the eager model with values replaced by hooks.

`LIGHTCACHE_EXAMPLES=2000` draws so many models; each is run under several schedules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn

import lightcache_fx as lc
from lightcache_fx.errors import CutError
from lightcache_fx.graphs import module_path
from lightcache_fx.module import runtime_of
from lightcache_fx.schedule import Schedules
from oracle import HookOracle, assert_bitwise, plain_step

EXAMPLES = int(os.environ.get("LIGHTCACHE_EXAMPLES", "40"))
SCHEDULES_PER_MODEL = 4
NUM_STEPS = 6
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="LIGHTCACHE_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# Operations; x is (B, 4, H, W) and so is every result --------------------------------------------------------------


class Conv(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)


class Norm(nn.GroupNorm):
    def __init__(self) -> None:
        super().__init__(2, 4)


class Turn(nn.Module):
    """A view of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(2, 3)


class Time(nn.Module):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x * torch.cos(timestep / 300)


class Prompt(nn.Module):
    """Its linear layers depend on the prompt alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return x + self.embed(prompt)[:, :, None, None]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.conv = Conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class Pair(nn.Module):
    """Two results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x), x.sin()


class Add(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Join(nn.Module):
    """A skip connection as U-Nets join it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([x, y], dim=1))


ONE_STREAM: dict[str, type[nn.Module]] = {
    "conv": Conv, "norm": Norm, "act": nn.SiLU, "turn": Turn, "same": nn.Identity, "block": Block, "pair": Pair,
    "time": Time, "prompt": Prompt,
}  # fmt: skip
TWO_STREAMS: dict[str, type[nn.Module]] = {"add": Add, "join": Join}


@dataclass(frozen=True)
class Spec:
    """A model: operations in order, and the numbers of the values that each reads (0 is the sample)."""

    operations: tuple[tuple[str, tuple[int, ...]], ...]
    seed: int


class Model(nn.Module):
    """What a `Spec` describes; it returns the sum of every value that nobody else reads, so nothing is dead."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            for number, (kind, _) in enumerate(spec.operations):
                self.add_module(f"n{number}", (ONE_STREAM | TWO_STREAMS)[kind]())
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        values, read = [sample], set[int]()
        for number, (kind, sources) in enumerate(self.spec.operations):
            arguments = [values[source] for source in sources]
            arguments += {"time": [timestep], "prompt": [prompt]}.get(kind, [])
            read.update(sources)
            result = self.get_submodule(f"n{number}")(*arguments)
            values += result if isinstance(result, tuple) else (result,)
        total = torch.zeros_like(sample)
        for index, value in enumerate(values):
            if index not in read:
                total = total + value
        return total


@st.composite
def specs(draw: st.DrawFn, ending: tuple[str, ...] = ()) -> Spec:
    operations: list[tuple[str, tuple[int, ...]]] = []
    num_values = 1
    kinds = [draw(st.sampled_from([*ONE_STREAM, *TWO_STREAMS, "join"])) for _ in range(draw(st.integers(3, 9)))]
    for kind in (*kinds, *ending):
        recent = st.integers(max(0, num_values - 2), num_values - 1)
        sources = (draw(recent),) if kind in ONE_STREAM else (draw(recent), draw(st.integers(0, num_values - 1)))
        operations.append((kind, sources))
        num_values += 2 if kind == "pair" else 1
    return Spec(tuple(operations), draw(st.integers(0, 99)))


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    first = {"first": draw(st.integers(1, 3))}
    match draw(st.sampled_from(["interval", "steps", "mask", "last"])):
        case "interval":
            return {"interval": draw(st.integers(1, 7)), **first}
        case "steps":
            return {"steps": sorted({0, *draw(st.sets(st.integers(1, NUM_STEPS - 1)))}), **first}
        case "mask":
            return {"mask": [True, *draw(st.lists(st.booleans(), min_size=5, max_size=5))], **first}
        case _:
            return {"interval": draw(st.integers(2, 7)), "last": draw(st.integers(1, 3)), "num_steps": NUM_STEPS}


def is_full(schedule: dict[str, Any], step: int) -> bool:
    """The schedule's meaning, said once more and independently."""
    if step < schedule.get("first", 1) or step >= NUM_STEPS - schedule.get("last", 0):
        return True
    if "interval" in schedule:
        return step % schedule["interval"] == 0
    return step in schedule["steps"] if "steps" in schedule else schedule["mask"][step]


def steps_of(run: int, shape: tuple[int, ...] = (1, 4, 4, 4)) -> list[dict[str, torch.Tensor]]:
    """The calls of one generation."""
    generator = torch.Generator().manual_seed(run)
    prompt = torch.randn(shape[0], 3, generator=generator)
    return [
        {"sample": torch.randn(shape, generator=generator), "timestep": torch.tensor(900 - 100 * i), "prompt": prompt}
        for i in range(NUM_STEPS)
    ]


def prepare(model: nn.Module, cut: Any) -> nn.Module:
    """The transformed model, captured.

    Raises:
        CutError: this cut cannot be made.
    """
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, interval=2)))
    plain_step(transformed, **steps_of(0)[0])
    return transformed


def check(transformed: nn.Module, oracle: Any, cut: Any, found: list[dict[str, Any]]) -> lc.Report:
    """Two generations under each schedule, step by step. One capture serves all schedules."""
    runtime = runtime_of(transformed)
    for schedule in found:
        ((key, compiled),) = runtime.repertoire.compiled.items()
        plan = replace(compiled.plan, schedule=Schedules.of([lc.Cache(cut=cut, **schedule)]))
        runtime.repertoire.compiled[key] = replace(compiled, plan=plan)
        lc.reset(transformed)
        for run in range(2):
            for step, inputs in enumerate(steps_of(run)):
                expected = oracle.step(is_full(schedule, step), **inputs)
                where = f"{schedule}, run {run}, step {step}"
                assert_bitwise(plain_step(transformed, **inputs), expected, where)
    return lc.inspect(transformed)


several = st.lists(schedules(), min_size=SCHEDULES_PER_MODEL, max_size=SCHEDULES_PER_MODEL)


@many
@given(spec=specs(), found=several, data=st.data())
def test_module_cuts(spec: Spec, found: list[dict[str, Any]], data: st.DataObject) -> None:
    model = Model(spec)
    known = [path for path, child in model.named_modules() if path and "embed" not in path]
    paths = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True), label="cut")
    oracle = HookOracle(model, paths)
    cut = paths if len(paths) > 1 else paths[0]
    report = check(prepare(model, cut), oracle, cut, found)
    with oracle.hooked(full=True):
        plain_step(model, **steps_of(0)[0])
    kept = [t for output in oracle._kept.values() for t in (output if isinstance(output, tuple) else (output,))]
    assert report.plan.kept_bytes == sum(t.nbytes for t in kept)
    assert report.programs["reuse"].flops == report.plan.reuse_flops()


@many
@given(spec=specs(ending=("conv", "join")), found=several, data=st.data())
def test_depth_cuts(spec: Spec, found: list[dict[str, Any]], data: st.DataObject) -> None:
    """The kept value is found by the package; here it is told by the module that made it."""
    model = Model(spec)
    depth = data.draw(st.integers(0, 1), label="depth")
    try:
        transformed = prepare(model, depth)
    except CutError:
        event("no join at this depth")
        return
    report = lc.inspect(transformed)
    assert report.plan.cut is not None
    (slot,) = report.plan.cut.slots
    nodes = {node.name: node for node in report.programs["full"].graph_module.graph.nodes}
    path = module_path(nodes[slot.node])
    if not path or type(model.get_submodule(path)) is Pair:
        return  # made by the model itself, or beside another result: no hook replaces that alone
    event("cut")
    check(transformed, HookOracle(model, [path]), depth, found)


class RangeOracle:
    """`out - in` of a range of modules with one stream, by hooks."""

    def __init__(self, model: nn.Module, first: str, last: str) -> None:
        self.model, self.first, self.last = model, model.get_submodule(first), model.get_submodule(last)

    def step(self, full: bool, /, **inputs: Any) -> list[torch.Tensor]:
        with self._hooked(full):
            return plain_step(self.model, **inputs)

    @contextmanager
    def _hooked(self, full: bool) -> Iterator[None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.entered = args[0].clone()

        def leave(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if full:
                self.residual = output - self.entered
                return None
            return self.entered + self.residual

        handles = [self.first.register_forward_pre_hook(enter), self.last.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@many
@given(spec=specs(), found=several, data=st.data())
def test_residual_ranges(spec: Spec, found: list[dict[str, Any]], data: st.DataObject) -> None:
    model = Model(spec)
    single = [f"n{i}" for i, (kind, _) in enumerate(spec.operations) if kind in ONE_STREAM and kind != "pair"]
    assume(single)
    first = data.draw(st.sampled_from(single), label="first")
    last = data.draw(st.sampled_from(single), label="last")
    cut = lc.Residual(first=first, last=last)
    try:
        transformed = prepare(model, cut)
    except CutError:
        event("refused")
        return
    event("cut")
    check(transformed, RangeOracle(model, first, last), cut, found)


@many
@given(
    spec=specs(), sizes=st.lists(st.sampled_from([(1, 4, 4, 4), (2, 4, 4, 4), (1, 4, 6, 6)]), min_size=1, max_size=2)
)
def test_lossless(spec: Spec, sizes: list[tuple[int, ...]]) -> None:
    model = Model(spec)
    transformed = lc.transform(model)
    for run, shape in enumerate(sizes):
        for inputs in steps_of(run, shape):
            assert_bitwise(plain_step(transformed, **inputs), plain_step(model, **inputs))
