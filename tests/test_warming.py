"""Inductor's own start is begun beside a capture, and what goes wrong with it is told where it is compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._inductor import cpu_vec_isa

import lightcache_fx as lc
from lightcache_fx import warming
from oracle import plain_step
from toys import Denoiser, latent, prompt

CPU = torch.device("cpu")
INDUCTOR = lc.Compile()


@pytest.fixture(autouse=True)
def not_begun() -> Iterator[None]:
    warming._begin.cache_clear()
    yield
    warming._begin.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads on which Inductor was asked for the CPU's instructions."""
    threads: list[str] = []
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: threads.append(threading.current_thread().name))
    return threads


def test_once_and_on_another_thread(asked: list[str]) -> None:
    for _ in range(2):
        warming.warm(INDUCTOR, CPU)
    warming._begin().join()
    assert asked == ["lightcache-warm"]


@pytest.mark.parametrize(
    ("settings", "device"),
    [(None, CPU), (lc.Compile(backend="eager"), CPU), (INDUCTOR, torch.device("cuda"))],
    ids=["uncompiled", "another compiler", "another device"],
)
def test_not_where_it_is_not_asked_for(settings: lc.Compile | None, device: torch.device, asked: list[str]) -> None:
    warming.warm(settings, device)
    assert warming._begin.cache_info().currsize == 0
    assert not asked


def test_a_failure_is_left_to_who_compiles(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", fails)
    with caplog.at_level("DEBUG", "lightcache_fx.warming"):
        warming.warm(INDUCTOR, CPU)
        warming._begin().join()
    assert "has not been warmed" in caplog.text


def test_begun_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []

    def capture(*_: object, **__: object) -> None:
        begun.append(warming._begin.cache_info().currsize == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr("lightcache_fx.compiler.capture", capture)
    for compile_ in ("eager", INDUCTOR):
        module = lc.transform(Denoiser(), lc.Policy(compile=compile_))
        with pytest.raises(KeyboardInterrupt):
            plain_step(module, sample=latent(0), timestep=torch.tensor(1.0), encoder_hidden_states=prompt(0))
    assert begun == [False, True]
