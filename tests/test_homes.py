"""Weights move home and back: bitwise, in their own layout, tied as they were, and not at all where anything fails."""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightcache_fx import arena as arena_module
from lightcache_fx import homes as homes_module
from lightcache_fx.arena import Arena, arenas
from lightcache_fx.errors import SwapError
from lightcache_fx.homes import Homes
from lightcache_fx.measure import measure_peak
from lightcache_fx.module_state import weight_slots
from lightcache_fx.transfers import PREFETCH, WAIT

CPU = torch.device("cpu")


class Model(nn.Module):
    """Layouts and ties of every kind."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.plain = nn.Parameter(weight(4, 6))
        self.tied = self.plain
        self.transposed = nn.Parameter(weight(5, 3).t())
        self.channels_last = nn.Parameter(weight(2, 3, 2, 2).to(memory_format=torch.channels_last))
        self.brief = nn.Parameter(weight(7, dtype=torch.bfloat16))
        fused = weight(6, 4)
        self.query, self.key = nn.Parameter(fused[:3]), nn.Parameter(fused[3:])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(3), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return (sample @ self.plain).sum() + self.brief.sum() + self.transposed.sum() * self.count


NAMES = ["plain", "tied", "transposed", "channels_last", "brief", "query", "key", "empty", "count"]


def homes_for(model: nn.Module, folder: Path, tier: homes_module.Tier = "disk") -> Homes:
    return Homes(weight_slots(model), tier, folder)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name) for name in NAMES}


def assert_same(model: nn.Module, before: nn.Module) -> None:
    for name, weight in weights_of(model).items():
        old = getattr(before, name)
        assert torch.equal(weight, old), name
        assert (weight.stride(), weight.dtype, type(weight)) == (old.stride(), old.dtype, type(old)), name
    assert model.tied is model.plain
    assert shared(model.query, model.key)
    assert not shared(model.query, model.plain)


def test_what_is_home_already_costs_one_walk_of_the_module(tmp_path: Path) -> None:
    """This is asked before every call; a walk for each weight took longer than the copies."""
    model, walks = Model(), []
    homes = Homes(lambda: (walks.append(1), weight_slots(model))[1], "disk", tmp_path)
    assert homes.adopt(NAMES) > 0
    walks.clear()
    assert homes.adopt(NAMES) == 0
    assert len(walks) == 1
    walks.clear()
    assert [w is getattr(model, name) for w, name in zip(homes.weights(NAMES), NAMES, strict=True)] == [True] * 9
    assert len(walks) == 1
    homes.recall(CPU)


def shared(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_home_and_back_is_bitwise_and_keeps_layouts_and_ties(tmp_path: Path, tier: homes_module.Tier) -> None:
    model, before = Model(), Model()
    homes = homes_for(model, tmp_path, tier)
    objects = {name: id(weight) for name, weight in weights_of(model).items()}
    moved = homes.adopt(NAMES)
    assert moved == 4 * (24 + 15 + 24 + 24) + 14 + 8
    assert all(map(homes.is_home, weights_of(model).values()))
    assert_same(model, before)
    assert torch.equal(model(torch.ones(4)), before(torch.ones(4)))
    homes.recall(CPU)
    assert not any(homes.is_home(weight) for weight in weights_of(model).values() if weight.numel())
    assert homes.num_bytes == 0
    assert_same(model, before)
    assert objects == {name: id(weight) for name, weight in weights_of(model).items()}


def test_the_devices_memory_is_free_when_they_have_moved(tmp_path: Path) -> None:
    def moved() -> tuple[nn.Module, Homes]:
        homes = homes_for(model := nn.Linear(100, 100), tmp_path)
        homes.adopt(["weight", "bias"])
        return model, homes

    measured = measure_peak(moved)
    assert measured.peak_bytes >= 4 * (10_000 + 100)
    assert measured.end_bytes == 0


def test_what_is_home_stays_there(tmp_path: Path) -> None:
    model = Model()
    homes = homes_for(model, tmp_path)
    homes.adopt(NAMES)
    places, size = [w.data_ptr() for w in weights_of(model).values()], homes.num_bytes
    assert homes.adopt(NAMES) == 0
    assert ([w.data_ptr() for w in weights_of(model).values()], homes.num_bytes) == (places, size)


def test_tensors_without_elements_take_no_arena(tmp_path: Path) -> None:
    homes = homes_for(Model(), tmp_path)
    assert homes.adopt(["empty"]) == 0
    assert homes.num_bytes == 0


def test_only_what_is_named_moves_and_what_shares_its_memory(tmp_path: Path) -> None:
    model = Model()
    homes = homes_for(model, tmp_path)
    homes.adopt(["key"])
    assert [name for name, weight in weights_of(model).items() if homes.is_home(weight)] == ["query", "key", "empty"]
    assert_same(model, Model())


def test_dtypes_that_share_memory_stay_aligned(tmp_path: Path) -> None:
    """Flattened weights: half precision from byte 2 on, single precision behind it."""
    model = nn.Module()
    flat = torch.arange(64, dtype=torch.uint8)
    model.brief = nn.Parameter(flat[2:8].view(torch.bfloat16), requires_grad=False)
    model.single = nn.Parameter(flat[8:24].view(torch.float32), requires_grad=False)
    before = model.brief.clone(), model.single.clone()
    homes = homes_for(model, tmp_path)
    homes.adopt(["brief", "single"])
    assert torch.equal(model.brief, before[0])
    assert torch.equal(model.single, before[1])


def test_a_weight_whose_data_is_replaced_moves_again(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    homes = homes_for(model, tmp_path)
    homes.adopt(["weight"])
    model.weight.data = torch.full((3, 3), 2.0)
    assert not homes.is_home(model.weight)
    assert homes.adopt(["weight"]) == 36
    assert torch.equal(WAIT(PREFETCH(model.weight, CPU, "w")), torch.full((3, 3), 2.0))


def test_a_weight_that_is_replaced_is_looked_up_anew(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    homes = homes_for(model, tmp_path)
    homes.adopt(["weight"])
    model.weight = nn.Parameter(torch.ones(3, 3))
    assert homes.adopt(["weight"]) == 36
    assert torch.equal(model.weight, torch.ones(3, 3))


def test_adapters_that_come_later_and_keys_that_go(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    homes = Homes(lambda: weight_slots(model), "disk", tmp_path)
    homes.adopt(["0.weight"])
    model.append(nn.Linear(3, 3, bias=False))
    assert homes.adopt(["0.weight", "1.weight"]) == 36
    fixed = homes_for(model, tmp_path)
    del model[0]._parameters["bias"]  # as torch.nn.utils.remove_weight_norm does
    assert fixed.adopt(["1.weight"]) == 0  # at home already, in the other one's arena


@pytest.mark.parametrize("moving", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad])
def test_weights_made_and_moved_in_inference_mode(
    tmp_path: Path, made: Callable[[], torch.no_grad], moving: Callable[[], torch.no_grad]
) -> None:
    with made():
        model = Model()
    was = model.plain.is_inference()
    homes = homes_for(model, tmp_path)
    with moving():
        homes.adopt(NAMES)
        assert was or not model.plain.is_inference()  # a normal one stays a normal one
        with homes.all_present(CPU):
            assert was or not model.plain.is_inference()
        assert was or not model.plain.is_inference()
        assert_same(model, Model())
        homes.recall(CPU)
    assert_same(model, Model())
    assert was or not model.plain.is_inference()


# Bringing all of them to the device ---------------------------------------------------------------------------------


def test_all_present_and_home_again(tmp_path: Path) -> None:
    model, before = Model(), Model()
    homes = homes_for(model, tmp_path)
    with homes.all_present(CPU):
        assert not any(homes.is_home(weight) for weight in weights_of(model).values() if weight.numel())
        for name, weight in weights_of(model).items():
            assert torch.equal(weight, getattr(before, name))
    assert all(map(homes.is_home, weights_of(model).values()))
    assert_same(model, before)


def test_all_are_home_again_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    homes = homes_for(model, tmp_path)
    with pytest.raises(KeyboardInterrupt), homes.all_present(CPU):
        raise KeyboardInterrupt
    assert all(map(homes.is_home, weights_of(model).values()))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SwapError, match=r"cannot copy a weight .* Input/output error"), homes.all_present(CPU):
        raise AssertionError
    assert all(map(homes.is_home, weights_of(model).values()))
    monkeypatch.undo()
    assert_same(model, Model())


def test_copies_are_free_again(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    homes = homes_for(model, tmp_path)
    homes.adopt(["weight", "bias"])

    def run() -> None:
        with homes.all_present(CPU):
            model(torch.ones(1, 100))

    run()
    measured = measure_peak(run)
    assert 40_000 <= measured.peak_bytes <= 42_000
    assert measured.end_bytes == 0


# Faults: everything is where it was ---------------------------------------------------------------------------------


def assert_untouched(model: nn.Module, homes: Homes, folder: Path, places: list[int]) -> None:
    gc.collect()
    assert [weight.data_ptr() for weight in weights_of(model).values()] == places
    assert_same(model, Model())
    assert homes.num_bytes == 0
    assert list(folder.iterdir()) == []


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("tier", "owner", "name", "fault", "expected"),
    [
        ("disk", os, "posix_fallocate", full, r"cannot make a swap file of .* No space left on device; name another"),
        ("disk", os, "pwritev", full, r"cannot move weights of 96 B: .* No space left .*; they are intact where they"),
        ("host", arena_module.mmap, "mmap", refuse, r"cannot get .* of host memory to swap to: .* Cannot allocate mem"),
    ],
    ids=["disk full", "disk full though reserved", "no host memory"],
)
def test_no_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tier: homes_module.Tier,
    owner: object,
    name: str,
    fault: Callable[..., object],
    expected: str,
) -> None:
    model = Model()
    places = [weight.data_ptr() for weight in weights_of(model).values()]
    homes, before = homes_for(model, tmp_path, tier), len(arenas())
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(SwapError, match=expected):
        homes.adopt(NAMES)
    monkeypatch.undo()
    assert_untouched(model, homes, tmp_path, places)
    assert len(arenas()) <= before
    assert homes.adopt(NAMES) > 0  # there is room again


def test_weights_with_gaps_are_refused_before_anything_moves(tmp_path: Path) -> None:
    model = Model()
    model.register_buffer("gaps", torch.ones(4, 4)[:, 1:])
    places = [weight.data_ptr() for weight in weights_of(model).values()]
    homes = homes_for(model, tmp_path)
    expected = (
        "cannot move a weight of shape (4, 3) and strides (4, 1): it overlaps itself or has gaps, so another copy would"
        " be laid out otherwise; call .contiguous() on it first"
    )
    with pytest.raises(SwapError, match=f"^{re.escape(expected)}$"):
        homes.adopt(["plain", "gaps"])
    assert_untouched(model, homes, tmp_path, places)


def test_no_memory_to_bring_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    homes = homes_for(model, tmp_path)
    homes.adopt(NAMES)
    real = torch.empty

    def third_fails(*args: object, **options: object) -> torch.Tensor:
        third_fails.calls += args == (60,)
        if args == (60,) and third_fails.calls == 1:
            raise RuntimeError("can't allocate memory: you tried to allocate 60 bytes.")
        return real(*args, **options)

    third_fails.calls = 0
    monkeypatch.setattr(torch, "empty", third_fails)
    with pytest.raises(
        SwapError, match=r"no memory on cpu to bring back weights of .*; they are intact where they are"
    ):
        homes.recall(CPU)
    assert_same(model, Model())
    homes.recall(CPU)
    assert_same(model, Model())
    assert homes.num_bytes == 0


def test_a_truncated_file_when_they_are_brought_back(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    homes = homes_for(model, tmp_path)
    homes.adopt(["weight"])
    handle = homes._arenas[0].file
    assert handle is not None
    os.ftruncate(handle, 0)
    with pytest.raises(SwapError, match=r"the swap file has been truncated to 0 B, expected at least 36 B"):
        homes.recall(CPU)
    os.ftruncate(handle, homes.num_bytes)  # or a look at the weight would end this process


# Buffers for slots --------------------------------------------------------------------------------------------------


def test_buffers_take_what_is_free_and_a_new_arena_where_nothing_is(tmp_path: Path) -> None:
    homes = homes_for(nn.Linear(3, 3), tmp_path)
    first = homes.buffer(5000)
    assert (first.dtype, first.shape, homes.num_bytes) == (torch.uint8, (5000,), 5064)
    second = homes.buffer(3000)
    assert homes.num_bytes == 5064 + 4096
    place = first.data_ptr()
    del first
    assert homes.buffer(4000).data_ptr() == place
    assert homes.num_bytes == 5064 + 4096
    assert second.numel() == 3000


def test_no_room_for_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = homes_for(nn.Linear(3, 3), tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SwapError, match=r"cannot make a swap file of 4.9 KiB .* No space left on device"):
        homes.buffer(5000)
    assert homes.num_bytes == 0


def test_slots_keep_their_arena_when_weights_are_recalled(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    homes = homes_for(model, tmp_path)
    homes.adopt(["weight"])
    slot = homes.buffer(100).fill_(7)
    homes.recall(CPU)
    gc.collect()
    assert slot.unique().tolist() == [7]
    assert any(arena.offset_of(slot) is not None for arena in homes._arenas)


def test_page_locked_where_there_is_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(homes_module, "arena_for", lambda tensors, **options: asked.append(options) or Arena(4096))
    homes_for(nn.Linear(3, 3), tmp_path, "host").adopt(["weight"])
    homes_for(nn.Linear(3, 3), tmp_path, "disk").adopt(["weight"])
    assert asked == [{"page_locked": True}, {"folder": tmp_path}]
