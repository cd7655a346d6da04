"""Models whose Python code decides by what tensors hold: a capture for each decision, and the right one for a call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import Cache, Policy, compiler
from lightcache_fx.errors import CaptureError, SaveError
from lightcache_fx.readings import Readings


class Decides(nn.Module):
    """Asks whether the conditioning is zeros, and slices it by the lengths that its mask tells.

    Shapes: sample (B, 4), timestep (), encoder_hidden_states (B, L, 3), mask (B, L) -> (B, 4).
    """

    def __init__(self, how: Callable[[torch.Tensor], bool] = bool) -> None:
        super().__init__()
        self.how = how
        self.inner, self.text, self.other = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(3, 8)
        self.middle, self.outer = nn.Linear(8, 8), nn.Linear(16, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.eval().requires_grad_(False)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        layer = self.other if self.how(torch.all(encoder_hidden_states == 0)) else self.text
        lengths = mask.sum(dim=1).tolist()
        rows = [row[:length].mean(dim=0) for row, length in zip(layer(encoder_hidden_states), lengths, strict=True)]
        skip = self.inner(sample)
        up = self.middle(torch.tanh(skip * torch.sin(timestep) + torch.stack(rows)))
        return self.outer(torch.cat([up, skip], dim=-1))


def inputs(step: int, *, zeros: bool = False, lengths: tuple[int, int] = (2, 5), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(2, 6, 3) if zeros else torch.randn(2, 6, 3, generator=generator)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).to(torch.int64)
    sample = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
    return [sample, torch.tensor(900.0 - 100 * step), text, mask]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    capture = compiler.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(len(found))
        return capture(*args, **kwargs)

    monkeypatch.setattr(compiler, "capture", counted)
    return found


READS: list[Callable[[torch.Tensor], Any]] = [
    bool, int, float, torch.Tensor.item, torch.Tensor.tolist, lambda t: t.numpy().item(), lambda t: [0, 1][t.to(int)],
]  # fmt: skip


@pytest.mark.parametrize("how", READS)
def test_each_decision_has_a_capture_of_its_own(
    how: Callable[[torch.Tensor], Any], captures: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = Decides(how)
    transformed = lc.transform(model)
    kinds = [{}, {"zeros": True}, {"lengths": (3, 1)}, {"seed": 7}, {"lengths": (3, 1), "seed": 3}, {"zeros": True}]
    for step, kind in enumerate(kinds + kinds):
        given = inputs(step, **kind)
        assert torch.equal(transformed(*given), model(*given)), f"{kind}"
    assert len(captures) == 3
    assert lc.inspect(transformed).route == "export by values"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "Decides decides by the values of encoder_hidden_states, mask what it computes" in record.message


def test_a_value_that_is_written_anew_is_read_anew(captures: list[int]) -> None:
    model = Decides()
    transformed = lc.transform(model)
    given = inputs(0)
    for length in (6, 1, 6):
        given[3][1] = (torch.arange(6) < length).to(torch.int64)
        assert torch.equal(transformed(*given), model(*given)), f"{length}"
    assert len(captures) == 2


class ReadsWhatItHasRead(Decides):
    """Reads of words that it has picked by how many it has read there are."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        words = encoder_hidden_states[mask.bool()] * torch.arange(1.0, 1 + mask.sum().item())[:, None]
        factor = 2 if words.max().item() > 0 else 1
        return (
            self.outer(torch.cat([self.inner(sample) * timestep, self.text(words).mean(dim=0).expand(2, 8)], 1))
            * factor
        )


def test_a_capture_whose_reads_other_values_do_not_lead_to_does_not_hold(captures: list[int]) -> None:
    model = ReadsWhatItHasRead()
    transformed = lc.transform(model)
    for lengths in ((2, 5), (3, 1), (2, 5), (3, 1)):
        given = inputs(0, lengths=lengths)
        assert torch.equal(transformed(*given), model(*given)), f"{lengths}"
    assert len(captures) == 2


def test_the_same_tensors_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decides()
    transformed = lc.transform(model)
    given, count, read = inputs(0), [0], Readings.read
    transformed(*given)

    def counted(self: Readings, arguments: Any) -> Any:
        count[0] += 1
        return read(self, arguments)

    monkeypatch.setattr(Readings, "read", counted)
    for step in range(5):
        sample, timestep, *_ = inputs(step)
        transformed(sample, timestep, *given[2:])
    assert count == [1]


def test_branches_that_decide_otherwise_keep_what_is_theirs() -> None:
    """Prompts of guidance have lengths of their own: both are called in each step, by programs of their own."""
    model = Decides()
    transformed = lc.transform(model, Policy(cache=Cache(cut="middle", interval=3)))
    alone = lc.transform(model, Policy(cache=Cache(cut="middle", interval=3)))
    prompts = [{"lengths": (2, 5)}, {"zeros": True, "lengths": (1, 1)}]
    fixed = [inputs(0, **prompt)[2:] for prompt in prompts]

    def generation(module: Any, wanted: list[int]) -> list[torch.Tensor]:
        found = []
        with lc.marked_run(5):
            for step in range(5):
                found += [module(*inputs(step)[:2], *fixed[index]) for index in wanted]
                lc.step_done()
        return found

    for _ in range(2):
        both = generation(transformed, [0, 1])
        for index in (0, 1):
            assert all(map(torch.equal, both[index::2], generation(alone, [index])))
    assert lc.inspect(transformed).counts["reuse"] == 2 * 2 * 3


class DecidesByTheLatent(Decides):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return super().forward(sample, timestep, *rest) * (2 if sample.sum() > 0 else 1)


def test_what_changes_from_step_to_step_decides_nothing() -> None:
    with pytest.raises(CaptureError, match=r"by export by values: .*forward decides by the value of %gt.*'latent'"):
        lc.transform(DecidesByTheLatent())(*inputs(0))


def test_nothing_of_it_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformed = lc.transform(Decides())
    transformed(*inputs(0))
    with caplog.at_level(logging.WARNING, "lightcache_fx"), pytest.raises(SaveError, match="as warnings say"):
        lc.save(transformed, tmp_path / "saved")
    assert "it holds for some values of its tensors alone" in caplog.text
