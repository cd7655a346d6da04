"""What a cut keeps is recorded as the eager model computes it, and compared step by step."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx.errors import ArgumentError, TransformError
from oracle import assert_bitwise, plain_step
from toys import Denoiser, latent, prompt
from zoo import ZOO, run_inputs

EVERY_STEP = lc.Policy(cache=lc.Cache(cut=["inner", "middle"], interval=1))


def step(module: nn.Module, number: int, of_prompt: int = 0) -> None:
    plain_step(module, sample=latent(number), timestep=torch.tensor(981.0 - number),
               encoder_hidden_states=prompt(of_prompt))  # fmt: skip


def by_hooks(model: nn.Module, paths: list[str], calls: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """The tensors that submodules return in the eager model, the first of each."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _a, out, path=path: found[path].append(
                (out if isinstance(out, torch.Tensor) else out[0]).clone()
            )
        )
        for path in paths
    ]
    for inputs in calls:
        plain_step(model, **inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["wan", pytest.param("svd", marks=pytest.mark.slow)])
def test_values_are_the_eager_models(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    paths = lc.block_paths(model)
    calls = [inputs for _, inputs in zip(range(3), run_inputs(make_inputs, 0, 3), strict=True)]
    expected = by_hooks(model, paths, calls)
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=paths, interval=1), hoist=False))
    with lc.record_kept(transformed) as recording:
        for inputs in calls:
            plain_step(transformed, **inputs)
    assert [name for name in recording.names if "[" not in name] == paths
    for path in paths:
        assert_bitwise(recording.at(path), expected[path], path)
        similarity = recording.similarity(path)
        for i, j in itertools.product(range(3), repeat=2):
            one, other = (expected[path][k].flatten().double() for k in (i, j))
            torch.testing.assert_close(similarity[i, j], nn.functional.cosine_similarity(one, other, dim=0))


def test_each_branch_by_itself() -> None:
    model = Denoiser()
    transformed = lc.transform(model, EVERY_STEP)
    with lc.record_kept(transformed) as recording:
        for number in range(3):
            for of_prompt in (0, 1):
                step(transformed, number, of_prompt)
    assert recording.names == ["inner", "middle"]
    for branch in (0, 1):
        calls = [
            {"sample": latent(n), "timestep": torch.tensor(981.0 - n), "encoder_hidden_states": prompt(branch)}
            for n in range(3)
        ]
        for name, values in by_hooks(model, ["inner", "middle"], calls).items():
            assert_bitwise(recording.at(name, branch), values, f"{name}, {branch}")
    with pytest.raises(ArgumentError, match=r"branch: 'inner' was recorded for branches \[0, 1\], not 2"):
        recording.at("inner", 2)
    with pytest.raises(ArgumentError, match="name: nothing was recorded at 'iner'; did you mean 'inner'"):
        recording.similarity("iner")


def test_full_steps_alone() -> None:
    transformed = lc.transform(Denoiser(), lc.Policy(cache=lc.Cache(cut="inner", interval=3)))
    with lc.record_kept(transformed) as recording:
        for number in range(5):
            step(transformed, number)
    assert len(recording.at("inner")) == 2


def test_while_it_is_active_and_in_its_thread_alone() -> None:
    transformed = lc.transform(Denoiser(), EVERY_STEP)
    with contextlib.suppress(KeyboardInterrupt), lc.record_kept(transformed) as broken:
        step(transformed, 0)
        raise KeyboardInterrupt
    step(transformed, 1)
    with lc.record_kept(transformed) as recording:
        other = threading.Thread(target=step, args=(transformed, 2))
        other.start()
        other.join()
        step(transformed, 2)
        step(transformed, 3)
        with pytest.raises(TransformError, match="is being recorded already"), lc.record_kept(transformed):
            pass
    assert len(broken.at("inner")) == 1
    assert len(recording.at("inner")) == 2


def test_similarity_by_hand() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    recording = lc.Recording({("x", 0): [one, 2 * one, other, -one, torch.zeros(2), torch.zeros(2)]})
    expected = torch.eye(6, dtype=torch.float64)
    for i, j, value in ((0, 1, 1), (0, 3, -1), (1, 3, -1), (4, 5, 1)):
        expected[i, j] = expected[j, i] = value
    torch.testing.assert_close(recording.similarity("x"), expected)
    recording.values["x", 0].append(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"x: recorded in several shapes, \[\(2,\), \(3,\)\]"):
        recording.similarity("x")


def test_nothing_to_record() -> None:
    with (
        pytest.raises(ArgumentError, match="policy has no cache, so it keeps nothing"),
        lc.record_kept(lc.transform(Denoiser())),
    ):
        pass
    with pytest.raises(TransformError, match="is not transformed"), lc.record_kept(Denoiser()):
        pass


def test_no_warning_of_reuse_steps_that_there_are_none_of(caplog: pytest.LogCaptureFixture) -> None:
    model, make_inputs = ZOO["wan"].build()
    for interval, warns in ((1, False), (2, True)):
        cache = lc.Cache(cut=lc.block_paths(model), interval=interval)
        plain_step(lc.transform(model, lc.Policy(cache=cache)), **make_inputs(0, 0))
        assert ("does not read the current latent" in caplog.text) is warns
