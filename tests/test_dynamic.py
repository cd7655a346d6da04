"""Sizes that vary: one capture for several of them where export proves it, and one for each where it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import Cache, Chunk, Policy, Swap
from lightcache_fx import compiler as compiler_module
from lightcache_fx import dynamic as dynamic_module
from lightcache_fx import repertoire as repertoire_module
from lightcache_fx.calls import Call, CallReader
from lightcache_fx.resizing import resized
from oracle import HookOracle, assert_bitwise, plain_step
from sizes_cases import TIMES, at_batch, batched, check, entries, is_dynamic, of_toy, of_video, told, toy, video
from toys import Denoiser, Tower, Watched, latent, prompt
from zoo import ZOO


class Captures:
    """How often a size was captured by itself, and how often sizes that vary were; failures count too."""

    def __init__(self) -> None:
        self.static, self.dynamic = 0, 0

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return (self.static, self.dynamic) == other

    def __repr__(self) -> str:
        return f"static={self.static}, dynamic={self.dynamic}"


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()

    def counted(name: str, capture: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            setattr(found, name, getattr(found, name) + 1)
            return capture(*args, **kwargs)

        return run

    monkeypatch.setattr(compiler_module, "capture", counted("static", compiler_module.capture))
    monkeypatch.setattr(dynamic_module, "capture", counted("dynamic", dynamic_module.capture))
    return found


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="lightcache_fx"):
        yield


# Batches and frames -----------------------------------------------------------------------------------------------


def test_a_third_size_is_captured_no_more(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    for batch in (2, 3, 5, 9, 2, 4, 3):
        check(model, transformed, **at_batch(batch, seed=batch))
    assert captures == (1, 1)
    assert is_dynamic(transformed) == [True, True, False, True, True]
    (text,) = told(caplog, "one capture")
    assert "Denoiser: one capture for sizes that vary: sample.shape[0] = s" in text
    assert "encoder_hidden_states.shape[0] = s" in text


def test_views_share_a_capture(captures: Captures) -> None:
    """Export has symbols for the tensor behind a view too, of which nothing here is a size."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, hidden_states: torch.Tensor, txt_ids: torch.Tensor) -> torch.Tensor:
            return self.layer(hidden_states) + txt_ids[0].sum(dim=0)

    model = Model().eval().requires_grad_(False)
    transformed, txt_ids = lc.transform(model), torch.randn(6, 4)[None]
    for tokens in (16, 24, 20):
        check(model, transformed, hidden_states=torch.randn(1, tokens, 4), txt_ids=txt_ids)
    assert captures == (1, 1)


def test_the_first_size_keeps_the_programs_that_it_has() -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    for batch in (2, 3):
        check(model, transformed, **at_batch(batch))
    first = lc.inspect(transformed)
    assert first.route.startswith("export, sample.shape[0] = s")
    check(model, transformed, **at_batch(2))
    assert lc.inspect(transformed).route == "export"


def test_frames(captures: Captures) -> None:
    model = video()
    transformed = lc.transform(model)
    for frames in (4, 6, 7, 3, 16):
        check(model, transformed, **of_video(2, frames))
    assert captures == (1, 1)
    with pytest.raises(RuntimeError, match="size"):  # there are 16 places
        model(**of_video(2, 17))
    with pytest.raises(RuntimeError, match="size"):
        transformed(**of_video(2, 17))


def test_what_varied_before_stays_open(captures: Captures) -> None:
    """Frames vary, then the batch: one more capture, for both, and then none for any pair."""
    model = video()
    transformed = lc.transform(model)
    for given in ((2, 4), (2, 6), (3, 6), (4, 8), (3, 4), (5, 5)):
        check(model, transformed, **of_video(*given))
    assert captures == (1, 2)
    check(model, transformed, **of_video(2, 4, words=7))
    assert captures == (1, 3)
    check(model, transformed, **of_video(6, 3, words=8))
    assert captures == (1, 3)


def test_reuse_steps_equal_the_oracle_at_each_size(captures: Captures) -> None:
    model = video()
    transformed = lc.transform(model, Policy(cache=Cache(cut="between", interval=3)))
    for frames in (4, 6, 9, 5):
        oracle = HookOracle(model, ["between"])
        for step in range(7):
            inputs = of_video(2, frames, step=step, seed=frames)
            assert_bitwise(plain_step(transformed, **inputs), oracle.step(step % 3 == 0, **inputs), f"{frames}, {step}")
    assert captures == (1, 1)
    assert lc.inspect(transformed).counts["reuse"] == 16


@pytest.mark.parametrize("cut", [0, "middle", "auto"])
def test_cuts_are_those_of_the_first_size(cut: Any, captures: Captures) -> None:
    model = Denoiser()
    transformed = lc.transform(model, Policy(cache=Cache(cut=cut, interval=2)))
    for batch in (2, 3, 6):
        oracle = HookOracle(model, ["middle"])
        for step, time in enumerate(TIMES):
            inputs = {**at_batch(batch, seed=step), "timestep": time, "encoder_hidden_states": prompt(0, batch)}
            found = plain_step(transformed, **inputs)
            if cut != "auto":
                assert_bitwise(found, oracle.step(step % 2 == 0, **inputs))
    assert captures == (1, 1)
    first, *_, last = entries(transformed)
    assert first.plan.cut.label == last.plan.cut.label
    assert first.plan.cut.kept_bytes == last.plan.cut.kept_bytes
    assert first.plan.full_flops == last.plan.full_flops
    assert first.plan.cut.reuse_flops == last.plan.cut.reuse_flops


def test_another_cut_than_that_of_the_first_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What `auto` finds may depend on sizes; here another cut is planned outright."""
    other, plan = Policy(cache=Cache(cut="inner", interval=2)), dynamic_module.make_plan
    monkeypatch.setattr(dynamic_module, "make_plan", lambda captured, _, module: plan(captured, other, module))
    model = Denoiser()
    transformed = lc.transform(model, Policy(cache=Cache(cut=["middle", "inner"], interval=2)))
    for batch in (2, 3):
        check(model, transformed, **at_batch(batch))
    assert is_dynamic(transformed) == [False, False]
    assert told(caplog, "sizes stay fixed: CaptureError: the cut would be [[")


def test_a_reuse_step_computes_nothing_for_the_sake_of_a_size() -> None:
    """The toy's last layer asks a value inside the cut for its size."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.middle, self.outer = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            hidden = self.inner(x)
            inside = torch.cat([hidden, hidden], dim=0)
            up = self.middle(inside)
            return self.outer(up[: x.shape[0]] + hidden) * torch.ones(inside.shape[0], 1).sum() * timestep

    model = Model().eval().requires_grad_(False)
    transformed = lc.transform(model, Policy(cache=Cache(cut="middle", interval=2)))
    for batch in (2, 3, 5):
        oracle = HookOracle(model, ["middle"])
        for step in range(4):
            inputs = {"x": latent(step, batch), "timestep": torch.tensor(9.0 - step)}
            assert_bitwise(plain_step(transformed, **inputs), oracle.step(step % 2 == 0, **inputs))
    assert is_dynamic(transformed)[-1]
    static, dynamic = (made.programs["reuse"] for made in (entries(transformed)[0], entries(transformed)[-1]))
    assert [i.name for i in static.inputs if i.kind == "weight"] == [
        i.name for i in dynamic.inputs if i.kind == "weight"
    ]
    assert static.flops == dynamic.flops


def test_hoisted_values_are_computed_once_a_run() -> None:
    """The prologue takes the batch from the latent, which is another tensor at every step."""
    model = Watched(Denoiser(), Policy.deepcache(3))
    for batch in (2, 3, 5):
        assert model.run([torch.tensor(time) for time in TIMES], prompt(0, batch)) == ["full", "reuse", "reuse"] * 2
    assert model.counts["prologue"] == 3
    assert is_dynamic(model.transformed)[-1]


class Expanded(nn.Module):
    """What is hoisted has the size of the latent, and reads nothing else of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return sample * timestep + self.embed(c.expand(sample.shape[0], 2, 3).contiguous()).sum(1)


def test_a_prologue_that_needs_a_size_alone_runs_once_a_run(captures: Captures) -> None:
    model = Expanded().eval().requires_grad_(False)
    transformed = lc.transform(model)
    for batch in (3, 4, 6):
        c = torch.randn(1, 2, 3)
        for step in range(4):
            check(model, transformed, sample=latent(step, batch), timestep=torch.tensor(9.0 - step), c=c)
    assert captures == (1, 1)
    assert lc.inspect(transformed).counts["prologue"] == 3
    prologue = entries(transformed)[-1].programs["prologue"]
    assert [i.name for i in prologue.inputs if i.kind == "user"] == ["sample", "c"]


# What the trace took for granted ----------------------------------------------------------------------------------


def test_a_branch_on_the_size(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    model = toy(lambda x, c: x * 2 if x.shape[0] > 4 else x.sin())
    transformed = lc.transform(model)
    for batch in (2, 3):
        check(model, transformed, **of_toy(batch, 4))
    for batch in (7, 4, 5, 8):
        check(model, transformed, **of_toy(batch, 4))
    assert is_dynamic(transformed) == [False, True, False, True, False, False]
    assert captures.static == 4
    (text,) = told(caplog, "captured by itself: s")[:1]
    assert "does not hold" in text or "<= 4" in text


def test_a_branch_between_two_sizes_is_no_reason_to_go_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """The graph begins at one side of the branch, and the second size is on the other."""
    model = toy(lambda x, c: x * 2 if x.shape[0] > 4 else x.sin())
    transformed = lc.transform(model)
    for batch in (3, 6, 7, 2, 8):
        check(model, transformed, **of_toy(batch, 4))
    assert told(caplog, "sizes stay fixed: ")


def test_unrolled_frames_stay_fixed(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    def unrolled(x: torch.Tensor, c: Any) -> torch.Tensor:
        return torch.stack([x[:, frame] * (frame + 1) for frame in range(x.shape[1])], dim=1)

    model = toy(unrolled)
    transformed = lc.transform(model)
    for frames in (3, 5, 6, 4):
        check(model, transformed, **of_toy(2, frames, 4))
    assert captures == (4, 1)  # tried once
    assert told(
        caplog, "sizes stay fixed: CaptureError: the trace has made numbers of sizes that vary: x.shape[1] is 3"
    )


def test_a_size_of_one_is_a_size_of_its_own(captures: Captures) -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    for batch in (3, 4, 1, 5, 1):
        check(model, transformed, **at_batch(batch))
    assert captures == (2, 1)
    assert is_dynamic(transformed) == [False, True, True, False]


def test_one_is_not_the_first_of_two_sizes(captures: Captures) -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    check(model, transformed, **at_batch(1))
    check(model, transformed, **at_batch(2))
    assert captures == (2, 0)
    check(model, transformed, **at_batch(3))
    assert captures == (2, 1)


def equal_or_not(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return x + c if c.shape[0] == x.shape[0] else x + c.mean(0)


def test_sizes_that_were_equal_must_be_equal(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    model = toy(equal_or_not)
    transformed = lc.transform(model)
    for batch in (2, 3, 6):
        check(model, transformed, **of_toy(batch, 4, c=(batch, 4)))
    assert captures == (1, 1)
    check(model, transformed, **of_toy(5, 4, c=(4, 4)))
    assert not is_dynamic(transformed)[-1]
    (text,) = told(caplog, "captured by itself")
    assert "c.shape[0] is 4, where s" in text
    assert text.endswith("= 5 is expected")
    check(model, transformed, **of_toy(7, 4, c=(7, 4)))
    assert is_dynamic(transformed)[-1]


def test_sizes_that_were_equal_by_chance_need_not_be(captures: Captures) -> None:
    model = toy(lambda x, c: x + c.mean(0))
    transformed = lc.transform(model)
    for batch, rows in ((2, 2), (3, 3), (5, 7), (4, 2), (6, 6)):
        check(model, transformed, **of_toy(batch, 4, c=(rows, 4)))
    assert captures == (1, 1)


def test_a_size_computed_from_another(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    model = toy(lambda x, c: torch.cat([x, -x]) + c)
    transformed = lc.transform(model)
    for batch in (2, 3, 5):
        check(model, transformed, **of_toy(batch, 4, c=(2 * batch, 4)))
    assert captures == (1, 1)
    assert "c.shape[0] = 2*s" in told(caplog, "one capture")[0]
    with pytest.raises(RuntimeError, match="must match the size"):
        transformed(**of_toy(5, 4, c=(9, 4)))


def test_a_size_that_must_be_even() -> None:
    model = toy(lambda x, c: x.reshape(-1, 2, 4).flip(1).reshape(-1, 4) if x.shape[0] % 2 == 0 else -x)
    transformed = lc.transform(model)
    for batch in (4, 6, 8, 7, 10, 9):
        check(model, transformed, **of_toy(batch, 4))
    assert is_dynamic(transformed) == [False, True, True, False, True, False]


def test_layouts_are_part_of_what_is_checked(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels take strides into account; contiguous tensors and others have captures of their own."""
    model = toy(lambda x, c: x.flatten().sin().reshape(x.shape))
    transformed = lc.transform(model)
    for batch in (2, 3, 4):
        check(model, transformed, **of_toy(batch, 4))
    assert captures == (1, 1)
    for batch in (2, 3, 4):
        given = of_toy(4, batch)
        check(model, transformed, **{**given, "x": given["x"].t()})
    assert captures == (2, 2)
    wide = torch.randn(9, 5, 4)[:, 0]  # rows further apart
    check(model, transformed, x=wide, t=torch.tensor(2.0))
    assert captures == (3, 2)
    assert not is_dynamic(transformed)[-1]
    assert told(caplog, "captured by itself: x.stride(0) is 20, where")


def test_channels_last(captures: Captures) -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.conv(x).sin() * timestep

    model = Image().eval().requires_grad_(False)
    transformed = lc.transform(model)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 6, 6).to(memory_format=torch.channels_last)
        check(model, transformed, x=x, timestep=torch.tensor(2.0))
    assert captures == (1, 1)
    check(model, transformed, x=torch.randn(5, 3, 6, 6), timestep=torch.tensor(2.0))
    assert captures.static == 2


# What no trace sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd_one", [2, 3])
def test_a_hidden_decision_at_a_known_size_is_refused(odd_one: int, caplog: pytest.LogCaptureFixture) -> None:
    """A symbol's name is no number, and no guard says that it was asked for."""
    model = toy(lambda x, c: -x if str(x.shape[0]) == str(odd_one) else x)
    transformed = lc.transform(model)
    for batch in (2, 3, 5, 2):
        check(model, transformed, **of_toy(batch, 4))
    assert not is_dynamic(transformed)[0]
    (text,) = told(caplog, "sizes stay fixed: ")[:1]
    assert "CaptureMismatchError" in text
    assert "differs from eager" in text


def test_a_hidden_decision_at_a_later_size_is_refused_there(
    captures: Captures, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy(lambda x, c: -x if str(x.shape[0]) == "7" else x)
    transformed = lc.transform(model)
    for batch in (2, 3, 5, 7, 6, 7):
        check(model, transformed, **of_toy(batch, 4))
    assert captures == (2, 1)
    assert is_dynamic(transformed) == [False, True, True, True, False]
    (text,) = told(caplog, "captured by itself")
    assert "CaptureMismatchError" in text


def test_a_number_in_the_output_stays_fixed(caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x * timestep, x.shape[0]

    model = Model().eval()
    transformed = lc.transform(model)
    for batch in (2, 3, 4):
        found, number = transformed(latent(0, batch), torch.tensor(2.0))
        assert (number, found.shape[0]) == (batch, batch)
    assert told(caplog, "sizes stay fixed: ArgumentError: Model returns a SymInt")


def test_sizes_that_depend_on_data_stay_fixed(caplog: pytest.LogCaptureFixture) -> None:
    model = toy(lambda x, c: x + x.flatten()[(x > 0).flatten().nonzero()].sum())
    transformed = lc.transform(model)
    for batch in (2, 3, 4):
        check(model, transformed, **of_toy(batch, 4))
    assert is_dynamic(transformed) == [False] * 3
    assert told(caplog, "is not the size of an input")


class Lazy(nn.Module):
    """Fills a table of its own as far as the largest size that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(64.0).sin()
        self.seen.append(x.shape[1])
        return x * self.table[: x.shape[1], None] * timestep


def test_the_model_is_left_as_it_was(captures: Captures) -> None:
    model = Lazy().eval()
    transformed = lc.transform(model)
    for frames in (3, 4, 6):
        x = torch.randn(2, frames, 4)
        found = plain_step(transformed, x=x, timestep=torch.tensor(2.0))
        assert (model.table, model.seen) == (None, [])
        assert_bitwise(found, plain_step(Lazy(), x=x, timestep=torch.tensor(2.0)))
    assert captures == (1, 1)


# Settings ---------------------------------------------------------------------------------------------------------


def test_never(captures: Captures) -> None:
    model = Denoiser()
    transformed = lc.transform(model, Policy(dynamic=False))
    for batch in (2, 3, 5):
        check(model, transformed, **at_batch(batch))
    assert captures == (3, 0)


def test_from_the_first_call_on(captures: Captures) -> None:
    model = video()
    transformed = lc.transform(model, Policy(dynamic=True, cache=Cache(cut="between", interval=2)))
    for given in ((2, 4, 3), (3, 6, 3), (2, 7, 5)):
        oracle = HookOracle(model, ["between"])
        for step in range(4):
            inputs = of_video(*given, step=step)
            assert_bitwise(plain_step(transformed, **inputs), oracle.step(step % 2 == 0, **inputs))
    assert captures == (0, 1)
    assert is_dynamic(transformed) == [True] * 3


@pytest.mark.parametrize(
    "policy",
    [Policy(chunk=Chunk(budget="90%")), Policy(swap=Swap(budget="90%")), Policy(memory_budget="1GiB")],
    ids=["chunk", "swap", "memory_budget"],
)
def test_plans_in_bytes_are_for_one_size(policy: Policy, captures: Captures) -> None:
    transformed = lc.transform(Tower(), policy)
    for batch in (20, 30, 50):
        plain_step(transformed, **at_batch(batch, time=torch.tensor(9.0)))
    assert captures == (3, 0)


def test_limits_in_bytes_are_kept_at_each_size(captures: Captures, caplog: pytest.LogCaptureFixture) -> None:
    limit = 3 * 8 * 4  # of three rows
    auto = lc.Auto(max_kept_bytes=limit)
    transformed = lc.transform(Denoiser(), Policy(cache=Cache(cut=auto, interval=2)))
    for batch in (2, 3):
        plain_step(transformed, **at_batch(batch))
    assert is_dynamic(transformed) == [False, True]
    with pytest.raises(lc.errors.CutError, match=f"max_kept_bytes={limit} is below the smallest cut, 128 bytes"):
        plain_step(transformed, **at_batch(4))
    assert told(caplog, f"max_kept_bytes={limit} is not kept")
    assert captures == (2, 1)


def test_one_capture_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Denoiser()
    transformed = lc.transform(model, Policy(max_signatures=2))
    for batch in (2, 3, 4, 5, 6):
        check(model, transformed, **at_batch(batch))
    assert not told(caplog, "max_signatures")
    check(model, transformed, **at_batch(1))
    assert told(caplog, "max_signatures") == [
        "max_signatures=2 reached: dropped the programs for sample (2, 4), timestep (), encoder_hidden_states (2, 3)"
    ]
    check(model, transformed, **at_batch(2))  # of what varies, which was not dropped
    check(model, transformed, **at_batch(1))
    check(model, transformed, **at_batch(3), scale=2.0)
    (text,) = told(caplog, "max_signatures")[1:]
    assert text.endswith(": dropped the programs for sample (2, 4), timestep (), encoder_hidden_states (2, 3)"
                         " and 4 other sizes")  # fmt: skip
    assert is_dynamic(transformed) == [False, False]


def test_sizes_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch, captures: Captures) -> None:
    monkeypatch.setattr(repertoire_module, "MOST_SIZES", 3)
    model = Denoiser()
    transformed = lc.transform(model)
    for batch in (2, 3, 4, 5, 6, 7, 3):
        check(model, transformed, **at_batch(batch))
        assert len(entries(transformed)) <= 4
    assert captures == (1, 1)


def test_another_state_of_the_module_is_another_capture(captures: Captures) -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    for batch in (2, 3):
        check(model, transformed, **at_batch(batch))
    model.double()
    for batch in (2, 3, 5):
        given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in at_batch(batch).items()}
        check(model, transformed, **given)
    assert captures == (2, 2)


# State ------------------------------------------------------------------------------------------------------------


def test_a_run_whose_size_changes_begins_anew() -> None:
    model = Watched(Denoiser(), Policy.deepcache(4))
    times = [torch.tensor(time) for time in TIMES]
    for batch in (2, 3, 4, 5):
        model.run(times[:1], prompt(0, batch))
    lc.reset(model.transformed)
    conditioning = {batch: prompt(0, batch) for batch in (4, 5)}
    kinds = [model(latent(step, b), times[step], conditioning[b]) for step, b in enumerate((4, 4, 5, 5, 4))]
    assert is_dynamic(model.transformed)[-2:] == [True, True]
    assert kinds == ["full", "reuse", "full", "reuse", "full"]
    with lc.marked_run(4):
        kinds = []
        for step in range(4):
            kinds.append([model(latent(step, b), times[step], conditioning[b]) for b in (4, 5)])
            lc.step_done()
    assert kinds == [["full", "full"], *[["reuse", "reuse"]] * 3]  # two calls a step, each with its own state


def test_in_inference_mode() -> None:
    model = Denoiser()
    transformed = lc.transform(model, Policy.deepcache(2))
    with torch.inference_mode():
        for batch in (2, 3, 5):
            given = {k: v * 1 if isinstance(v, torch.Tensor) else v for k, v in at_batch(batch).items()}
            assert torch.equal(transformed(**given), model(**given))
    assert is_dynamic(transformed) == [False, True, True]


# Inputs of another size -------------------------------------------------------------------------------------------


def test_inputs_of_another_size_are_laid_out_as_they_were() -> None:
    reader = CallReader(toy(lambda x, c: x), rates={})

    def read(x: torch.Tensor) -> Call:
        return reader.read((x, torch.tensor(1.0)), {})

    base = torch.arange(12.0).reshape(3, 4)
    for like, found in (
        (torch.zeros(5, 4), base[[0, 1, 2, 0, 1]]),
        (torch.zeros(2, 4), base[:2]),
        (torch.zeros(4, 5).t(), base[[0, 1, 2, 0, 1]]),
        (torch.zeros(1, 4).expand(5, 4), base[[0] * 5]),
    ):
        made = resized(read(base), read(like).layout).tensors[0]
        assert torch.equal(made, found)
        assert made.stride() == like.stride()
        assert not made._is_view()


# Real models ------------------------------------------------------------------------------------------------------


REAL = {"sd": Cache(cut=0, interval=2), "pixart": Cache(cut="auto", interval=2)}


@pytest.mark.parametrize("name", [pytest.param("sd", marks=pytest.mark.slow), "pixart"])
def test_real_models_at_several_batch_sizes(name: str, captures: Captures) -> None:
    model, make_inputs = ZOO[name].build()
    transformed = lc.transform(model, Policy(cache=REAL[name]))
    again = lc.transform(model, Policy(cache=REAL[name], dynamic=False))
    for batch in (2, 3, 4):
        for step in range(3):
            inputs = batched(make_inputs, batch, step)
            found = plain_step(transformed, **inputs)
            assert_bitwise(found, plain_step(again, **inputs), f"{batch}, {step}")
            if step % 2 == 0:
                assert_bitwise(found, plain_step(model, **inputs))
    assert captures == (1 + 3, 1)
    assert is_dynamic(transformed) == [False, True, True]
