"""Memory away from the device: exact offsets, blocks that return, and what a full disk or a lost file says."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from lightcache_fx.arena import ALIGNMENT, Arena, arena_for, arena_of, arenas, is_dense, span_of
from lightcache_fx.errors import SwapError
from lightcache_fx.measure import measure_peak

PLACES = ["host", "disk"]


def arena(place: str, folder: Path, num_bytes: int = 2**14) -> Arena:
    return Arena(num_bytes, folder=folder if place == "disk" else None)


def some_bytes(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize(
    ("tensor", "span", "dense"),
    [
        (torch.empty(2, 3), 24, True),
        (torch.empty(2, 3).t(), 24, True),
        (torch.empty(1, 4, 2, 2).to(memory_format=torch.channels_last), 64, True),
        (torch.empty(4, 3)[:, 1:], 44, False),  # gaps
        (torch.empty(1, 3).expand(4, 3), 12, False),  # overlaps
        (torch.empty(0, 3), 0, True),
        (torch.empty(()), 4, True),
        (torch.empty(3, dtype=torch.bfloat16), 6, True),
    ],
)
def test_span_and_density(tensor: torch.Tensor, span: int, dense: bool) -> None:
    assert (span_of(tensor), is_dense(tensor)) == (span, dense)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64])
def test_a_tensor_keeps_shape_strides_and_dtype(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    like = torch.ones(2, 5, 3).to(dtype).permute(1, 2, 0)
    made = arena(place, tmp_path).tensor_like(like)
    made.copy_(like)
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), dtype)
    assert torch.equal(made, like)


def test_offsets_are_exact_and_nothing_overlaps(tmp_path: Path) -> None:
    home = arena_for([some_bytes(n) for n in (1, 64, 65, 0)], folder=tmp_path)
    tensors = [home.tensor_like(some_bytes(n)) for n in (1, 64, 65, 0)]
    assert [home.offset_of(tensor) for tensor in tensors] == [0, 64, 128, None]
    assert home.num_bytes == 4096  # one page; four blocks take 256 bytes
    for value, tensor in enumerate(tensors):
        tensor.fill_(value + 1)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1], [2], [3], []]


def test_an_arena_is_as_large_as_its_blocks() -> None:
    assert arena_for([some_bytes(5000), some_bytes(3000)]).num_bytes == 5056 + 3008


def test_no_memory_of_torchs_is_taken(tmp_path: Path) -> None:
    assert measure_peak(lambda: arena("host", tmp_path).tensor_like(some_bytes(2**13))).peak_bytes == 0


def test_blocks_return_when_their_last_tensor_dies_and_join(tmp_path: Path) -> None:
    home = Arena(4096, folder=tmp_path)
    first, second, third = (home.tensor_like(some_bytes(1024)) for _ in range(3))
    view = first[10:].view(torch.bfloat16)
    del first, third
    assert home.free_bytes == 2048
    assert not home.has_room(2049)
    del view
    assert home.free_bytes == 3072
    assert not home.has_room(2049)  # in two pieces
    del second
    assert home.has_room(4096)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    home = Arena(4096, folder=tmp_path)
    kept = home.tensor_like(some_bytes(4000))
    with pytest.raises(
        SwapError, match=r"the swap arena of 4.0 KiB has no block of 128 B left \(64 B free in pieces\)"
    ):
        home.tensor_like(some_bytes(100))
    assert kept.numel() == 4000


def test_blocks_return_from_any_thread_while_others_are_taken(tmp_path: Path) -> None:
    home = Arena(64 * ALIGNMENT, folder=tmp_path)

    def churn() -> None:
        for _ in range(300):
            held = [home.tensor_like(some_bytes(ALIGNMENT)) for _ in range(8)]
            assert len({home.offset_of(tensor) for tensor in held}) == 8
            del held

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert home.free_bytes == home.num_bytes
    assert home.has_room(home.num_bytes)


@pytest.mark.parametrize("place", PLACES)
def test_it_lives_as_long_as_a_tensor_in_it(place: str, tmp_path: Path) -> None:
    home = arena(place, tmp_path)
    tensor, handle = home.tensor_like(torch.ones(7)).fill_(3), home.file
    del home
    gc.collect()
    found = arena_of(tensor, arenas())
    assert found is not None
    assert found[0].file == handle
    assert tensor.tolist() == [3.0] * 7
    del found, tensor
    gc.collect()
    if handle is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


def test_its_file_has_no_name_and_its_space_is_reserved(tmp_path: Path) -> None:
    home = Arena(2**20, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert home.file is not None
    assert os.fstat(home.file).st_blocks * 512 >= 2**20


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = len([*Path("/proc/self/fd").iterdir()])

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    expected = (
        r"cannot make a swap file of 3.0 MiB \(.*B free in /.*\): \[Errno 28\] No space left on device; name another"
        r" folder in Swap\(folder=...\), or swap less"
    )
    with pytest.raises(SwapError, match=expected):
        Arena(3 * 2**20, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len([*Path("/proc/self/fd").iterdir()]) == opened


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes rights that this process does not have")
    try:
        with pytest.raises(SwapError, match=r"\(64.0 KiB free in .*\): .* No space left on device"):
            Arena(2**20, folder=tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert Arena(2**15, folder=tmp_path).has_room(2**15)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        SwapError, match=r"cannot make a swap file of 4.0 KiB \(no folder /.*/absent\): .*; name another"
    ):
        Arena(1, folder=tmp_path / "absent")


def test_a_host_without_so_much_memory() -> None:
    with pytest.raises(
        SwapError, match=r"cannot get 1073741824.00 GiB of host memory to swap to: .*; swap to disk, or swap"
    ):
        Arena(2**60)


def test_a_truncated_file_is_told_before_it_is_read(tmp_path: Path) -> None:
    home = Arena(2**14, folder=tmp_path)
    home.check_file(2**14)
    assert home.file is not None
    os.ftruncate(home.file, 100)
    home.check_file(100)
    expected = (
        "the swap file has been truncated to 100 B, expected at least 16.0 KiB; the weights behind that are lost:"
        " load the model again"
    )
    with pytest.raises(SwapError, match=f"^{re.escape(expected)}$"):
        home.check_file(2**14)


class FakeCudart:
    """CUDA's registration of host memory, without CUDA."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.locked[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        del self.locked[address]
        return 0


def test_pages_are_locked_exactly_and_as_long_as_a_tensor_lies_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    home = Arena(10_000, page_locked=True)
    assert cudart.locked == {home.base: 10_000}
    tensor = home.tensor_like(torch.empty(3))
    del home
    gc.collect()
    assert cudart.locked
    del tensor
    gc.collect()
    assert not cudart.locked


def test_pages_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudart(error=2))
    expected = r"cannot page-lock 9.8 KiB of host memory \(CUDA error 2\); the host has too little of it, or a limit"
    with pytest.raises(SwapError, match=expected):
        Arena(10_000, page_locked=True)
