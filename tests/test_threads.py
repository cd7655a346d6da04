"""Drop-ins in several threads: each has runs of its own, and a capture in one does not reach the others."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from oracle import assert_bitwise, plain_step
from toys import Denoiser, latent, prompt

TIMES = [981, 884, 787, 690, 593, 496, 399]


def in_threads(*work: Callable[[], object]) -> list[BaseException]:
    """Run each in a thread of its own; what they raised."""
    failed: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - carried to the main thread
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_two_threads() -> None:
    """Each thread has a run of its own; bitwise equal to what each gets alone."""
    transformed = lc.transform(Denoiser(), lc.Policy.deepcache(3, 0))

    def generate(seed: int) -> list[torch.Tensor]:
        conditioning = prompt(seed)
        with torch.no_grad():
            return [transformed(latent(100 * seed + i), torch.tensor(t), conditioning) for i, t in enumerate(TIMES)]

    alone = [generate(seed) for seed in range(2)]
    found: list[list[torch.Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(seed: int) -> None:
        start.wait()
        for _ in range(5):
            found[seed] = generate(seed)

    assert not in_threads(*(partial(work, seed) for seed in range(2)))
    for got, expected in zip(found, alone, strict=True):
        assert_bitwise(got, expected)


def test_threads_that_capture_at_once() -> None:
    """One drop-in, other shapes in each thread."""
    model = Denoiser()
    transformed = lc.transform(model, lc.Policy.deepcache(3, 0))
    found: dict[int, torch.Tensor] = {}

    def work(batch: int) -> None:
        inputs = {"sample": latent(0, batch), "timestep": 5, "encoder_hidden_states": prompt(0, batch)}
        found[batch] = plain_step(transformed, **inputs)[0]

    assert not in_threads(*(partial(work, batch) for batch in (1, 2, 3)))
    for batch in (1, 2, 3):
        assert torch.equal(found[batch], model(latent(0, batch), torch.tensor(5), prompt(0, batch)))


@pytest.mark.parametrize("same", [True, False], ids=["one drop-in", "two drop-ins of a model"])
def test_a_thread_that_runs_while_another_captures(same: bool) -> None:
    """The runner's steps all come out as alone, and plain modules of its own are not drawn into the trace."""
    model, other = Denoiser(), Denoiser()
    running = lc.transform(model, lc.Policy())
    capturing = running if same else lc.transform(model, lc.Policy.deepcache(3, 0))
    expected = running(latent(0), torch.tensor(5), prompt(0))
    plainly = other(latent(0), torch.tensor(5), prompt(0))
    done = threading.Event()
    steps: list[bool] = []

    def run(module: nn.Module, right: torch.Tensor) -> None:
        while not done.is_set():
            steps.append(torch.equal(module(latent(0), torch.tensor(5), prompt(0)), right))

    def capture() -> None:
        try:
            for batch in (2, 3, 4, 5):
                capturing(latent(0, batch), torch.tensor(5), prompt(0, batch))
        finally:
            done.set()

    assert not in_threads(partial(run, running, expected), partial(run, other, plainly), capture)
    assert steps
    assert all(steps)


def test_modules_of_another_thread_do_not_run_through_the_tracer() -> None:
    stacks: list[list[str]] = []

    class Elsewhere(nn.Module):
        def forward(self) -> None:
            stacks.append([frame.filename for frame in traceback.extract_stack()])

    class Starts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.elsewhere = nn.Linear(2, 2), Elsewhere()

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            assert not in_threads(self.elsewhere)
            return self.inner(sample) + timestep

    model = Starts().eval()
    assert torch.equal(lc.transform(model)(torch.ones(1, 2), torch.tensor(5)), model(torch.ones(1, 2), 5))
    assert len(stacks) >= 3  # the warm-up, the trace, the check
    assert not any("/fx/" in file for stack in stacks for file in stack)
    assert "fx" not in nn.Module.__call__.__code__.co_filename
