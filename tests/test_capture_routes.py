"""The route behind export: what real-tensor tracing captures, and what it bakes in and is refused for."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightcache_fx as lc
from lightcache_fx.graphs import writes_in_place
from lightcache_fx.passes import functionalize_writes as functionalizing


class CountFromABuffer(nn.Module):
    """Reads a constant through numpy, which no fake tensor allows; the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("count", torch.tensor(2.0))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for _ in range(int(self.count.numpy())):
            sample = self.layer(sample)
        return sample * timestep


class BranchThroughNumpy(nn.Module):
    """Decides by the sign of the latent's sum, where no tracer sees it."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.detach().numpy().sum() > 0 else sample * timestep


class BranchOnATensor(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.sum() > 0 else sample * timestep


def test_real_tensors_are_traced_where_export_fails() -> None:
    torch.manual_seed(0)
    model = CountFromABuffer().eval()
    transformed = lc.transform(model)
    for seed in range(3):
        sample = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(transformed(sample, torch.tensor(4.0)), model(sample, torch.tensor(4.0)))
    assert lc.inspect(transformed).route == "trace"


@pytest.mark.parametrize("model", [BranchThroughNumpy(), BranchOnATensor()], ids=lambda m: type(m).__name__)
def test_a_decision_by_the_example_is_refused(model: nn.Module) -> None:
    sample = torch.ones(3, 8)
    with pytest.raises(lc.errors.CaptureError, match=type(model).__name__) as error:
        lc.transform(model.eval())(sample, torch.tensor(4.0))
    assert "by trace" in str(error.value)
    assert torch.equal(model(sample, torch.tensor(4.0)), sample * 2)


class WritesWhereNoneFollows(nn.Module):
    """Writes in place to what it makes, in a trace of real tensors: numpy stops the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(2.0))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(64, dtype=sample.dtype)
        for _ in range(int(self.count.numpy())):
            total[1:].scatter_add_(0, torch.arange(63), sample.flatten()[1:])
        return sample * total.reshape(sample.shape) + timestep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_in_a_trace_of_real_tensors_are_values_of_their_own(dtype: torch.dtype) -> None:
    """What is written to is computed from nothing, so that it is hoisted where that pays: here, as bfloat16."""
    model = WritesWhereNoneFollows().eval()
    transformed = lc.transform(model)
    for step in range(4):
        sample = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        timestep = torch.tensor(900.0 - step, dtype=dtype)
        assert torch.equal(transformed(sample, timestep), model(sample, timestep))
    report = lc.inspect(transformed)
    assert report.route == "trace"
    assert not writes_in_place(report.programs["full"].graph_module.graph)


def test_writes_that_stay_are_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Functionalisation leaves what it cannot tell the memory of."""
    monkeypatch.setattr(functionalizing, "functionalize_writes", lambda graph: None)
    model = WritesWhereNoneFollows().eval()
    sample, timestep = torch.randn(8, 8), torch.tensor(4.0)
    with caplog.at_level(logging.INFO, "lightcache_fx"):
        assert torch.equal(lc.transform(model)(sample, timestep), model(sample, timestep))
    failures = [record.message for record in caplog.records if "failed by trace" in record.message]
    assert len(failures) == 1
    assert "forward writes in place by %scatter_add_" in failures[0]


def test_a_route_that_fails_says_so_by_its_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Export prints the graph so far, and its loggers what they met."""
    with pytest.raises(lc.errors.CaptureError):
        lc.transform(BranchOnATensor().eval())(torch.ones(3, 8), torch.tensor(4.0))
    assert capfd.readouterr() == ("", "")


class Expert(nn.Module):
    """Reads a number through numpy, so that its calls stay opaque."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * float(self.factor.numpy())


class Experts(nn.Module):
    """More modules that stop a trace than are tried one by one, and one that no route follows where `decides`."""

    def __init__(self, decides: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), Expert(0.5 + i / 8)) for i in range(12))
        self.decides = decides

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            sample = block(sample)
        return sample * 2 if self.decides and sample.sum() > 0 else sample * timestep


def test_a_class_of_modules_that_stop_the_trace_is_opaque_as_a_whole() -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    transformed = lc.transform(model)
    sample = torch.randn(3, 8)
    assert torch.equal(transformed(sample, torch.tensor(4.0)), model(sample, torch.tensor(4.0)))
    assert lc.inspect(transformed).route == "export with blocks.0.1 and 11 more opaque"


def test_what_stopped_the_routes_is_told_once_each() -> None:
    with pytest.raises(lc.errors.CaptureError) as error:
        lc.transform(Experts(decides=True).eval())(torch.randn(3, 8), torch.tensor(4.0))
    text = str(error.value)
    assert text.count("by export") == 3
    assert "by export with blocks.0.1 and 11 more opaque" in text
    assert text.count("if self.decides and sample.sum() > 0") == 2
    assert "decides by the value of %gt" in text
    assert "dynamic shapes" not in text
    assert len(text) < 1200


class Noisy(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * timestep + torch.randn_like(sample)


def test_a_capture_draws_no_random_numbers_of_the_users() -> None:
    """A model that draws them differs from itself, and is compared as far as that goes."""
    model, sample, timestep = Noisy().eval(), torch.randn(3, 8), torch.tensor(4.0)
    transformed = lc.transform(model)
    found = {}
    for module in (model, transformed):
        torch.manual_seed(0)
        found[module] = [module(sample, timestep) for _ in range(3)]
    assert all(map(torch.equal, found[model], found[transformed]))


class WordsFirst(nn.Module):
    """Sorts words before padding: as many of both as there were, which export does not know and need not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        text, is_word = encoder_hidden_states, mask[0]
        for block in self.blocks:
            values = torch.cat([text[:, is_word], text[:, ~is_word]], dim=1)
            sample = sample + block(F.scaled_dot_product_attention(sample * timestep, text, values))
        return sample


@pytest.mark.parametrize("cut", ["auto", lc.Residual(first="blocks.1", last="blocks.2"), "blocks.2"])
def test_sizes_that_depend_on_data(cut: str | lc.Residual, capfd: pytest.CaptureFixture[str]) -> None:
    """Ten words and padding are 20 at most by the bounds of both, which attention to ten keys would not take."""
    torch.manual_seed(0)
    model, text = WordsFirst().eval(), torch.randn(1, 10, 8)
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, interval=2), chunk=lc.Chunk(budget="100%")))
    for length in (7, 3, 10):
        mask = (torch.arange(10) < length)[None]
        for step in range(4):
            sample, timestep = torch.randn(1, 6, 8), torch.tensor(900.0 - step)
            found, expected = (module(sample, timestep, text, mask) for module in (transformed, model))
            assert torch.equal(found, expected) == (step % 2 == 0), f"length {length}, step {step}"
    report = lc.inspect(transformed)
    assert report.route == "export"
    assert report.plan.full_flops == 4 * (2 * 6 * 8 * 8 + 4 * 6 * 10 * 8)
    assert report.counts["reuse"] == 6
    assert capfd.readouterr().err == ""


class TwoStreams(nn.Module):
    """Blocks of a stream of fixed length and one of words without padding."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            image = image + self.image(F.scaled_dot_product_attention(image, text, text))
            return image, text + self.text(F.scaled_dot_product_attention(text, image, image))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreams.Block() for _ in range(4))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        image, text = sample * timestep, encoder_hidden_states[:, mask[0]]
        for block in self.blocks:
            image, text = block(image, text)
        return image


@pytest.mark.parametrize("cut", ["auto", lc.Residual(first="blocks.1", last="blocks.2")])
def test_streams_whose_sizes_depend_on_data_are_told_apart(cut: str | lc.Residual) -> None:
    torch.manual_seed(0)
    model, text = TwoStreams().eval(), torch.randn(1, 10, 8)
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut=cut, interval=2)))
    for length in (7, 3):
        mask = (torch.arange(10) < length)[None]
        for step in range(4):
            sample, timestep = torch.randn(1, 6, 8), torch.tensor(900.0 - step)
            found, expected = (module(sample, timestep, text, mask) for module in (transformed, model))
            assert torch.equal(found, expected) == (step % 2 == 0), f"length {length}, step {step}"
    assert lc.inspect(transformed).route == "export"


class Adapted(nn.Module):
    """Adds in place to what a block has returned twice, as a U-Net does with what an adapter gives it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            sample = self.layer(sample)
            return sample, (sample,)

    def __init__(self) -> None:
        super().__init__()
        self.block, self.outer = Adapted.Block(), nn.Linear(16, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
        hidden, (skip,) = self.block(sample)
        hidden += adapter
        return self.outer(torch.cat([hidden, skip * timestep], dim=-1))


def test_a_tensor_that_a_module_returns_twice_stays_one() -> None:
    torch.manual_seed(0)
    model, adapter = Adapted().eval(), torch.randn(3, 8)
    transformed = lc.transform(model, lc.Policy(cache=lc.Cache(cut="block", interval=2)))
    with torch.no_grad():
        for step in range(4):
            sample, timestep = torch.randn(3, 8), torch.tensor(9.0 - step)
            found, expected = transformed(sample, timestep, adapter), model(sample, timestep, adapter)
            assert torch.equal(found, expected) == (step % 2 == 0)
    assert lc.inspect(transformed).kept_bytes == 3 * 8 * 4
