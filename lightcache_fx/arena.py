"""Memory away from the device, with exact offsets: page-locked host memory, or a memory-mapped file.

`pin_memory()` per tensor rounds each up to a power of two and wastes 1.7 to 1.9 times the bytes; here one mapping holds
many tensors, each at the next multiple of 64 bytes. A file has no name as soon as it is mapped, so nothing is left
behind however the process ends, and nobody can remove it; its space is reserved when it is made, so a full disk is an
error then and not a fault in the midst of a run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch

from lightcache_fx.errors import SwapError
from lightcache_fx.units import format_bytes

ALIGNMENT = 64
"""Bytes; of a cache line, which is also what torch's own CPU allocator aligns to."""


def span_of(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to behind its last: those of its elements where it has no gaps."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills the memory that it spans: in whichever order of dimensions, without gaps or overlaps."""
    return span_of(tensor) == tensor.numel() * tensor.element_size()


class Arena:
    """One mapping from which blocks are taken and to which they return when the last tensor in them dies.

    It lives as long as any tensor in it does: only then is its file closed and its memory no longer page-locked.

    Args:
        num_bytes: its size; blocks are aligned, so add `ALIGNMENT` for each.
        folder: where its file is made; None for host memory, which has none.
        page_locked: whether host memory is registered with CUDA, so that copies run beside the computing.

    Raises:
        SwapError: the disk is full, the folder cannot be written, or the host has not so much memory.
    """

    def __init__(self, num_bytes: int, *, folder: str | Path | None = None, page_locked: bool = False) -> None:
        self.num_bytes = max(num_bytes, mmap.PAGESIZE)
        self.file: int | None = None
        try:
            if folder is not None:
                self.file = _nameless_file(Path(folder), self.num_bytes)
                self._map = mmap.mmap(self.file, self.num_bytes)
            else:
                self._map = mmap.mmap(-1, self.num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            if self.file is not None:
                os.close(self.file)
            raise SwapError(_no_room(folder, self.num_bytes, error)) from error
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if page_locked:
            _lock_pages(self.base, self.num_bytes)
        self._free = [(0, self.num_bytes)]
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self.file, self.base if page_locked else None).atexit = False
        with _LOCK:
            _ARENAS.add(self)

    def tensor_like(self, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor in a block of its own, of the same shape, dtype and strides.

        Raises:
            SwapError: no block is large enough.
        """
        size = span_of(like)
        if not size:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        offset = self._take(_aligned(size))
        view = memoryview(self._map)[offset : offset + size]
        block = torch.frombuffer(view, dtype=torch.uint8)  # its storage holds the view, and the view the mapping
        weakref.finalize(view, self.give_back, offset, _aligned(size)).atexit = False  # and this holds the arena
        return block.view(like.dtype).as_strided(like.shape, like.stride())

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in this arena a tensor's memory begins; None where it is elsewhere."""
        offset = tensor.data_ptr() - self.base
        return offset if 0 <= offset < self.num_bytes else None

    def check_file(self, end: int) -> None:
        """Raise a `SwapError` where the file has been cut short, reading from which would end the process."""
        if self.file is not None and (size := os.fstat(self.file).st_size) < end:
            raise SwapError(
                f"the swap file has been truncated to {format_bytes(size)}, expected at least {format_bytes(end)}; the"
                f" weights behind that are lost: load the model again"
            )

    @property
    def free_bytes(self) -> int:
        """Bytes in no block."""
        with self._lock:
            return sum(size for _, size in self._joined())

    def has_room(self, size: int) -> bool:
        """Whether a block of so many bytes can be taken."""
        with self._lock:
            return any(free >= _aligned(size) for _, free in self._joined())

    def give_back(self, offset: int, size: int) -> None:
        """A block is free again. Called when a tensor dies: from any thread, between any two lines of any other."""
        self._returned.append((offset, size))

    def _take(self, size: int) -> int:
        with self._lock:
            free_blocks = self._joined()
            for index, (offset, free) in enumerate(free_blocks):
                if free >= size:
                    free_blocks[index : index + 1] = [(offset + size, free - size)] if free > size else []
                    return offset
            free = sum(free for _, free in free_blocks)
        raise SwapError(
            f"the swap arena of {format_bytes(self.num_bytes)} has no block of {format_bytes(size)} left"
            f" ({format_bytes(free)} free in pieces)"
        )

    def _joined(self) -> list[tuple[int, int]]:
        """The free blocks, those given back joined with their neighbours; to be called with the lock held."""
        while self._returned:
            joined: list[tuple[int, int]] = []
            for begin, length in sorted([*self._free, self._returned.popleft()]):
                if joined and sum(joined[-1]) == begin:
                    joined[-1] = joined[-1][0], joined[-1][1] + length
                else:
                    joined.append((begin, length))
            self._free = joined
        return self._free


_ARENAS: weakref.WeakSet[Arena] = weakref.WeakSet()
_LOCK = threading.Lock()  # a set that grows must not be gone through meanwhile


def arenas() -> list[Arena]:
    """All that there are."""
    with _LOCK:
        return list(_ARENAS)


def arena_for(tensors: Iterable[torch.Tensor], **options: object) -> Arena:
    """An arena with room for exactly these, each in a block of its own; `options` are those of `Arena`."""
    return Arena(sum(_aligned(span_of(tensor)) for tensor in tensors), **options)  # type: ignore[arg-type]


def arena_of(tensor: torch.Tensor, among: Iterable[Arena]) -> tuple[Arena, int] | None:
    """The arena that a tensor lies in, and its offset there."""
    for arena in among:
        offset = arena.offset_of(tensor)
        if offset is not None:
            return arena, offset
    return None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _nameless_file(folder: Path, num_bytes: int) -> int:
    """A file of reserved size that vanishes with its last user."""
    handle, path = tempfile.mkstemp(prefix="lightcache_fx-", suffix=".swap", dir=folder)
    try:
        Path(path).unlink()
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError:
        os.close(handle)
        raise
    return handle


def _no_room(folder: str | Path | None, num_bytes: int, error: Exception) -> str:
    if folder is None:
        return f"cannot get {format_bytes(num_bytes)} of host memory to swap to: {error}; swap to disk, or swap less"
    is_there = Path(folder).is_dir()
    there = f"{format_bytes(shutil.disk_usage(folder).free)} free in {folder}" if is_there else f"no folder {folder}"
    return (
        f"cannot make a swap file of {format_bytes(num_bytes)} ({there}): {error}; name another folder in"
        f" Swap(folder=...), or swap less"
    )


def _lock_pages(address: int, num_bytes: int) -> None:
    error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
    if error:
        raise SwapError(
            f"cannot page-lock {format_bytes(num_bytes)} of host memory (CUDA error {error}); the host has too little"
            f" of it, or a limit (ulimit -l): swap less"
        )


def _close(file: int | None, locked: int | None) -> None:
    """What goes beside the mapping itself, which goes with its last user."""
    if locked is not None:
        torch.cuda.cudart().cudaHostUnregister(locked)
    if file is not None:
        os.close(file)
