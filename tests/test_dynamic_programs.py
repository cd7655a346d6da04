"""Programs of sizes that vary, compiled and saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lightcache_fx as lc
from lightcache_fx import Cache, Compile, Policy
from lightcache_fx.dynamic import may_be_dynamic
from lightcache_fx.plan import make_plan
from lightcache_fx.self_checks import own_results
from oracle import assert_bitwise, plain_step
from sizes_cases import TIMES, at_batch, check, entries, is_dynamic, of_toy, of_video, told, toy, video
from toys import Denoiser


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="lightcache_fx"):
        yield


# Compiled ---------------------------------------------------------------------------------------------------------


def compilations(module: nn.Module) -> dict[str, int]:
    """How often each program has been compiled; the prologue never is."""
    states = {name: bound.compile_state for name, bound in entries(module)[-1].bound.items()}
    return {name: state.compiled for name, state in states.items() if state is not None}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_third_size_is_compiled_no_more(compiler: str) -> None:
    model = video()
    cache = Cache(cut="between", interval=2)
    plain = lc.transform(model, Policy(cache=cache, dynamic=False))
    transformed = lc.transform(model, Policy(cache=cache, compile=Compile(backend=compiler)))
    for index, frames in enumerate((4, 6, 7, 5, 12)):
        for step in range(3):
            inputs = of_video(2, frames, step=step, seed=frames)
            found, expected = plain_step(transformed, **inputs), plain_step(plain, **inputs)
            if compiler == "inductor":
                assert float((found[0] - expected[0]).abs().max()) <= 1e-5 * float(expected[0].abs().max())
            else:
                assert_bitwise(found, expected, f"{frames}, {step}")
        if index:
            assert compilations(transformed) == {"full": 1, "reuse": 1}, frames
    assert is_dynamic(transformed) == [False, True, True, True, True]


def symbolic(inputs: Any) -> bool:
    return any(isinstance(n, torch.SymInt) for i in inputs for n in (i.shape if isinstance(i, torch.Tensor) else [i]))


def test_a_compiler_that_takes_no_symbols_compiles_each_size(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(graph_module: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        if symbolic(inputs):
            raise RuntimeError("numbers only")
        return graph_module.forward

    model = Denoiser()
    transformed = lc.transform(model, Policy(compile=Compile(backend=backend(refuse))))
    for batch in (2, 3, 5, 6, 3):
        check(model, transformed, **at_batch(batch))
    assert is_dynamic(transformed)[-1]
    (text,) = told(caplog, "is compiled for each size by itself")[:1]
    assert text.endswith("failed: BackendCompilerFailed: backend='counted' raised: RuntimeError: numbers only")
    assert compilations(transformed)["full"] == 3


def test_what_a_compiler_gets_wrong_for_symbols_is_not_used(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(graph_module: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        if not symbolic(inputs):
            return graph_module.forward
        return lambda *args: [result + 1 for result in graph_module.forward(*args)]

    model = Denoiser()
    transformed = lc.transform(model, Policy(hoist=False, compile=Compile(backend=backend(wrong))))
    for batch in (2, 3, 5):
        check(model, transformed, **at_batch(batch))
    assert "LoweringError: compile: backend" in told(caplog, "is compiled for each size by itself")[0]


def test_each_size_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.Size] = []

    def noted(graph_module: fx.GraphModule, args: Any) -> Any:
        compared.append(args[-1].shape)
        return own_results(graph_module, args)

    monkeypatch.setattr("lightcache_fx.lowering.own_results", noted)
    model = toy(lambda x, c: x.sin() + 0.3125)
    transformed = lc.transform(model, Policy(compile="eager"))
    sizes = (2, 3, 5, 3, 5, 7, 2)
    for batch in sizes:
        check(model, transformed, **of_toy(batch, 4))
    assert len(compared) == len(set(sizes))


def test_the_callers_tensors_keep_no_mark() -> None:
    model = Denoiser()
    transformed = lc.transform(model, Policy(compile="eager"))
    for batch in (2, 3, 5):
        given = at_batch(batch)
        check(model, transformed, **given)
        for tensor in (given["sample"], given["encoder_hidden_states"]):
            assert not [name for name in dir(tensor) if "dynamo" in name and hasattr(tensor, name)]


def test_cuda_graphs_are_of_one_size() -> None:
    assert not may_be_dynamic(Policy(compile=Compile(mode="reduce-overhead")), "forward")
    assert may_be_dynamic(Policy(compile=Compile(mode="max-autotune-no-cudagraphs")), "forward")
    assert not may_be_dynamic(Policy(decode=lc.Decode(frames=1)), "decode")
    assert may_be_dynamic(Policy(decode=lc.Decode(frames=1)), "forward")


# Saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Policy(), Policy(cache=Cache(cut=0, interval=3)), Policy(dynamic=True)], ids=str)
def test_each_size_is_saved_by_itself(tmp_path: Path, policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    model = Denoiser()
    transformed = lc.transform(model, policy)
    runs = {batch: [at_batch(batch, step, time) for step, time in enumerate(TIMES)] for batch in (2, 3, 5)}
    expected = {batch: [plain_step(transformed, **given) for given in run] for batch, run in runs.items()}
    assert any(is_dynamic(transformed))
    lc.save(transformed, tmp_path / "saved")
    assert not told(caplog, "save: left out")
    loaded = lc.load(tmp_path / "saved")
    for batch, run in runs.items():
        for given, wanted in zip(run, expected[batch], strict=True):
            assert_bitwise(plain_step(loaded, **given), wanted)
    assert lc.inspect(loaded).kept_bytes == (0 if policy.cache is None else 5 * 8 * 4)
    with pytest.raises(lc.errors.SignatureError, match="has no programs for this call"):
        loaded(**at_batch(4))


def test_a_size_whose_plan_would_keep_something_else_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Denoiser()
    transformed = lc.transform(model, Policy(cache=Cache(cut=0, interval=3)))
    for batch in (2, 3):
        plain_step(transformed, **at_batch(batch))

    def other(*given: Any) -> Any:
        return replace(make_plan(*given), cut=None)

    monkeypatch.setattr("lightcache_fx.dynamic.make_plan", other)
    lc.save(transformed, tmp_path / "saved")
    (left_out,) = told(caplog, "save: left out")
    assert "sample (3, 4), timestep (), encoder_hidden_states (3, 3), of sizes that vary: a plan for that" in left_out
    assert "size would keep something else; to save it transform the module with Policy(dynamic=False)" in left_out


def test_sizes_that_vary_are_not_compiled_ahead_of_time(tmp_path: Path) -> None:
    transformed = lc.transform(Denoiser(), Policy(dynamic=True, compile=Compile()))
    plain_step(transformed, **at_batch(2))
    with pytest.raises(
        lc.errors.SaveError,
        match=r"no programs but such as cannot be saved as asked, as warnings say",
    ):
        lc.save(transformed, tmp_path / "saved", compiled=True)
    assert not (tmp_path / "saved").exists()
