"""Operations that fetch the weights they read: the same bits, one weight at a time, and no way to harm a weight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightcache_fx import fetching
from lightcache_fx.errors import CaptureError, SwapError
from lightcache_fx.fetching import WeightsAway, aliases
from lightcache_fx.homes import Homes
from lightcache_fx.mapped import map_weights
from lightcache_fx.measure import measure_peak
from lightcache_fx.module_state import weight_slots
from pretend_device import DEVICE, PretendDevice, pretended, to_device
from toys import Tower, latent, prompt

CPU = torch.device("cpu")
ALL = WeightsAway(CPU, lambda _: True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    with pretended(monkeypatch) as device, torch.no_grad():
        yield device


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was fetched, in order."""
    shapes: list[tuple[int, ...]] = []
    original = fetching.FETCH

    def noted(weight: torch.Tensor, device: torch.device) -> Any:
        shapes.append(tuple(weight.shape))
        return original(weight, device)

    monkeypatch.setattr(fetching, "FETCH", noted)
    return shapes


def module_of(**weights: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, weight in weights.items():
        module.register_buffer(name, weight)
    return module


def inputs() -> tuple[torch.Tensor, ...]:
    return latent(0), torch.tensor(900.0), prompt(0)


# Memory ------------------------------------------------------------------------------------------------------------


def test_a_model_in_a_file_takes_its_largest_weight_and_not_their_sum(tmp_path: Path) -> None:
    """By allocation events; what activations take is that of a model whose weights are there."""
    model, call = Tower(width=128), inputs()
    with torch.no_grad():
        expected = model(*call)
        activations = measure_peak(lambda: model(*call)).peak_bytes
        homes = Homes(weight_slots(model), "disk", tmp_path)
        homes.adopt(weight_slots(model))
        away, found = WeightsAway(CPU, homes.is_home), []

        def run() -> None:
            with away.fetched(model):
                found.append(model(*call))

        run()
        measured = measure_peak(run)
    sizes = sorted(weight.nbytes for weight in model.parameters())
    assert all(torch.equal(output, expected) for output in found)
    assert sizes[-1] <= measured.peak_bytes <= sizes[-1] + sizes[0] + activations + 4096
    assert measured.peak_bytes < sum(sizes) / 4
    assert measured.end_bytes == expected.nbytes


def test_on_another_device_too(device: PretendDevice) -> None:
    model = Tower()
    expected, call = model(*inputs()), to_device(inputs())
    before, device.peak_bytes = device.num_bytes, 0
    with WeightsAway(DEVICE).fetched(model):
        found = model(*call)
    assert found.device == DEVICE
    assert torch.equal(found.cpu(), expected)
    largest = max(weight.nbytes for weight in model.parameters())
    assert largest <= device.peak_bytes - before <= largest + 16 * 1024
    del found
    assert device.num_bytes == before, "no copy is left"


def test_no_room_for_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch, 50_000), torch.no_grad():
        call = to_device(inputs())
        expected = r"no memory on privateuseone:0 for prompt.2.weight \(64.0 KiB\), which one operation reads .*smaller"
        with pytest.raises(SwapError, match=expected), WeightsAway(DEVICE).fetched(model := Tower()):
            model(*call)


def test_only_what_is_away_is_fetched(fetched: list[tuple[int, ...]]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)).eval()
    away = WeightsAway(CPU, lambda weight: weight is model[0].weight)
    with away.fetched(model), torch.no_grad():
        model(torch.ones(1, 3)) + torch.ones(5)
    assert fetched == [(4, 3)]
    model(torch.ones(1, 3))
    assert fetched == [(4, 3)], "and nothing behind the mode"


# Operators ---------------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Composite functions, lists of weights, and an operator called by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 4)])
        self.batch = nn.BatchNorm1d(4)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.tables = nn.ParameterList([torch.randn(8), torch.randn(8)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for norm in self.norms:
            x = norm(x)
        x = self.recurrent(self.batch(x))[0]
        x = x + torch.stack(list(self.tables)).sum(0)
        x += self.tables[0]
        return torch.ops.aten.mul.Tensor(x, self.tables[1])


def test_operators_get_their_weights_however_they_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # it is not taken under any function mode
    model, tokens = Attends().eval(), torch.arange(4).reshape(1, 4)
    with torch.no_grad():
        expected = model(tokens)
        with ALL.fetched(model):
            assert torch.equal(model(tokens), expected)


def test_tied_weights_and_weights_that_share_memory(fetched: list[tuple[int, ...]]) -> None:
    fused = torch.randn(6, 4)
    module = module_of(a=fused[:2], b=fused[2:])
    module.c = module.a
    with ALL.fetched(module):
        found = F.linear(torch.ones(1, 4), module.a) @ module.b[:2], module.a * module.c
    assert torch.equal(found[0], F.linear(torch.ones(1, 4), fused[:2]) @ fused[2:4])
    assert torch.equal(found[1], fused[:2] ** 2)
    assert fetched == [(2, 4), (2, 4), (2, 4)], "a tensor that a call reads twice comes once"


# Views -------------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "row": lambda w: w[1],
    "slice": lambda w: w[:, 1:3],
    "none": lambda w: w[:, None],
    "view": lambda w: w.view(-1),
    "reshape": lambda w: w.reshape(2, -1),
    "expand": lambda w: w[0].expand(3, 6),
    "chunk": lambda w: w.chunk(2)[1],
    "unbind": lambda w: torch.unbind(w)[2],
    "contiguous": lambda w: w.contiguous(),
    "float": lambda w: w.float(),
    "as_strided": lambda w: w.as_strided((2, 2), (6, 2), 3),
    "of a view": lambda w: w.view(2, 2, 6).permute(2, 0, 1)[1:],
}


@pytest.mark.parametrize("name", list(VIEWS))
def test_views_are_taken_where_the_weight_is(name: str, device: PretendDevice, fetched: list[tuple[int, ...]]) -> None:
    module = module_of(w=torch.randn(4, 6))
    plain = VIEWS[name](module.w)
    with WeightsAway(DEVICE).fetched(module):
        view = VIEWS[name](module.w)
        assert fetched == []
        assert view.untyped_storage()._cdata == module.w.untyped_storage()._cdata
        assert view.device == DEVICE
        read = view * 2
        assert fetched == [tuple(plain.shape)]
    assert (view.shape, view.stride(), view.storage_offset()) == (plain.shape, plain.stride(), plain.storage_offset())
    assert read.device == DEVICE
    assert torch.equal(read.cpu(), plain * 2)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(5, 3).t(),
        torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(4, 4)[:, 1:],
        torch.randn(9)[5:],
        torch.randn(3).expand(4, 3),
        torch.randn(4, 3).to(torch.bfloat16)[1:, ::2],
        torch.tensor(3.0),
        torch.empty(0, 3),
    ],
    ids=["transposed", "channels last", "gaps", "behind", "overlapping", "half", "scalar", "empty"],
)
def test_copies_are_laid_out_as_the_weight_is(weight: torch.Tensor) -> None:
    """Strides and alignment decide which algorithm an operator takes, and that the last bits."""
    copy = fetching.FETCH(weight, CPU)
    assert torch.equal(copy, weight)
    assert copy.stride() == weight.stride()
    assert copy.data_ptr() % 64 == weight.data_ptr() % 64 or not weight.numel()
    assert not aliases([copy], [weight])


def test_what_is_computed_does_not_lie_in_a_weight() -> None:
    module = module_of(w=torch.ones(2, 2))
    with ALL.fetched(module):
        placed = [module.w.to("cpu"), module.w.cpu(), module.w.clone(), module.w + 0, torch.zeros_like(module.w)]
    assert not aliases(placed, [module.w])
    for tensor in placed:
        tensor.zero_()
    assert torch.equal(module.w, torch.ones(2, 2))


def test_a_weight_that_is_moved_on_purpose(device: PretendDevice) -> None:
    """As one on the device: `.cpu()` copies it to the CPU, where no operation fetches it again."""
    module = module_of(w=torch.ones(2, 2))
    with WeightsAway(DEVICE).fetched(module):
        here, there = module.w.cpu(), module.w.to(DEVICE)
        assert (here.device, there.device) == (CPU, DEVICE)
        assert torch.equal(here + torch.ones(2, 2), torch.full((2, 2), 2.0))
        assert module.w.to(torch.float64).device == DEVICE


# Devices -----------------------------------------------------------------------------------------------------------


def test_a_weight_names_the_device_that_it_is_read_on(device: PretendDevice) -> None:
    module = module_of(w=torch.ones(2, 2))
    with WeightsAway(DEVICE).fetched(module):
        assert next(module.buffers()).device == DEVICE
        assert module.w.t()[0].device == DEVICE
        assert (module.w.is_cpu, module.w.is_cuda, module.w.get_device()) == (False, False, 0)
        assert torch.zeros(2, device=module.w.device).device == DEVICE
        assert torch.ones(2).to(module.w).device == DEVICE
        assert torch.ones(2).device == CPU
        assert (module.w.shape, module.w.dtype, module.w.dim()) == ((2, 2), torch.float32, 2)
    assert (module.w.device, module.w.is_cpu) == (CPU, True)
    with ALL.fetched(module):
        assert (module.w.device, module.w.is_cpu, module.w.get_device()) == (CPU, True, -1)


def test_a_weights_value_can_be_asked_for(device: PretendDevice) -> None:
    module = module_of(count=torch.tensor(3.0))
    with WeightsAway(DEVICE).fetched(module):
        assert (float(module.count), module.count.item(), module.count.tolist()) == (3.0, 3.0, 3.0)
        assert module.count > 2


# Writes ------------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], object]] = {
    "add_": lambda m: m.w.add_(1),
    "view": lambda m: m.w[0].mul_(2),
    "data": lambda m: m.w.data.mul_(2),
    "item": lambda m: m.w.__setitem__(0, 5.0),
    "copy_": lambda m: m.w.copy_(torch.zeros(2, 2)),
    "out": lambda m: torch.add(torch.ones(2, 2), 1, out=m.w),
    "operator": lambda m: torch.ops.aten.add_.Tensor(m.w, torch.ones(2, 2)),
    "rebound": lambda m: setattr(m.w, "data", torch.zeros(2, 2)),
}


@pytest.mark.parametrize("write", list(WRITES.values()), ids=list(WRITES))
def test_writing_to_a_weight_is_refused_and_harms_none(write: Callable[[Any], object]) -> None:
    module = module_of(w=torch.ones(2, 2))
    with (
        pytest.raises(CaptureError, match=r"^Module writes to its weight w; a step must be pure$"),
        ALL.fetched(module),
    ):
        write(module)
    assert torch.equal(module.w, torch.ones(2, 2))


def test_a_weight_may_be_bound_to_its_own_memory() -> None:
    """As models do that cast their weights where these have another dtype."""
    module = module_of(w=torch.ones(2, 2))
    with ALL.fetched(module):
        module.w.data = module.w.data.float()
    assert torch.equal(module.w, torch.ones(2, 2))


# What goes wrong ---------------------------------------------------------------------------------------------------


def test_the_mode_ends_with_an_error() -> None:
    module = nn.Linear(3, 3)
    with pytest.raises(KeyboardInterrupt), ALL.fetched(module):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), ALL.fetched(module):
        module(torch.ones(1, 4))
    assert module.weight.device == CPU
    assert module(torch.ones(1, 3)).shape == (1, 3)


@pytest.mark.parametrize("on", [CPU, DEVICE], ids=str)
def test_a_truncated_swap_file(tmp_path: Path, device: PretendDevice, on: torch.device) -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    homes = Homes(weight_slots(model), "disk", tmp_path)
    homes.adopt(["weight"])
    handle = homes._arenas[0].file
    assert handle is not None
    os.ftruncate(handle, 0)
    away = WeightsAway(on, homes.is_home)
    with pytest.raises(SwapError, match="the swap file has been truncated to 0 B"), away.fetched(model):
        model(torch.ones(1, 3).to(on))
    os.ftruncate(handle, homes.num_bytes)  # or a look at the weight would end this process


@pytest.mark.parametrize("on", [CPU, DEVICE], ids=str)
def test_a_truncated_model_file(tmp_path: Path, device: PretendDevice, on: torch.device) -> None:
    from safetensors.torch import save_file

    model, path = nn.Linear(3, 3).requires_grad_(False), tmp_path / "model.safetensors"
    save_file(dict(model.state_dict()), path)
    content = path.read_bytes()
    map_weights(model, path)
    with WeightsAway(on, lambda _: True).fetched(model):
        assert model(torch.ones(1, 3).to(on)).device == on
    os.truncate(path, 0)
    away = WeightsAway(on, lambda _: True)
    with pytest.raises(SwapError, match=r"model.safetensors has been truncated to 0 B"), away.fetched(model):
        model(torch.ones(1, 3).to(on))
    path.write_bytes(content)  # or a look at the weight would end this process


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    homes = Homes(weight_slots(model), "disk", tmp_path)
    homes.adopt(["weight", "bias"])

    def fail(*_: object) -> int:
        raise OSError("Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    away = WeightsAway(CPU, homes.is_home)
    with pytest.raises(SwapError, match=r"cannot read weights of .*: Input/output error"), away.fetched(model):
        model(torch.ones(1, 3))
