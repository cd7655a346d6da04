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
import weakref
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
        _ARENAS.add(self)
        self._close = weakref.finalize(self, _close, self.file, self.base if page_locked else None)

    def tensor_like(self, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor in a block of its own, of the same shape, dtype and strides.

        Raises:
            SwapError: no block is large enough.
        """
        size = span_of(like)
        if not size:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        offset = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
        view = memoryview(self._map)[offset : offset + size]
        block = torch.frombuffer(view, dtype=torch.uint8)  # its storage holds the view, and the view the mapping
        weakref.finalize(view, _give_back, weakref.ref(self), offset, -(-size // ALIGNMENT) * ALIGNMENT)
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
        return sum(size for _, size in self._free)

    def has_room(self, size: int) -> bool:
        """Whether a block of so many bytes can be taken."""
        return any(free >= -(-size // ALIGNMENT) * ALIGNMENT for _, free in self._free)

    def _take(self, size: int) -> int:
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        raise SwapError(
            f"the swap arena of {format_bytes(self.num_bytes)} has no block of {format_bytes(size)} left"
            f" ({format_bytes(self.free_bytes)} free in pieces)"
        )

    def give_back(self, offset: int, size: int) -> None:
        """A block is free again; it is joined with its free neighbours."""
        joined: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (offset, size)]):
            if joined and sum(joined[-1]) == begin:
                joined[-1] = joined[-1][0], joined[-1][1] + length
            else:
                joined.append((begin, length))
        self._free = joined


_ARENAS: weakref.WeakSet[Arena] = weakref.WeakSet()


def arenas() -> list[Arena]:
    """All that there are."""
    return list(_ARENAS)


def arena_for(tensors: Iterable[torch.Tensor], **options: object) -> Arena:
    """An arena with room for exactly these, each in a block of its own; `options` are those of `Arena`."""
    sizes = (-(-span_of(tensor) // ALIGNMENT) * ALIGNMENT for tensor in tensors)
    return Arena(sum(sizes), **options)  # type: ignore[arg-type]


def arena_of(tensor: torch.Tensor, among: Iterable[Arena]) -> tuple[Arena, int] | None:
    """The arena that a tensor lies in, and its offset there."""
    for arena in among:
        offset = arena.offset_of(tensor)
        if offset is not None:
            return arena, offset
    return None


def _give_back(arena: weakref.ref[Arena], offset: int, size: int) -> None:
    owner = arena()
    if owner is not None:
        owner.give_back(offset, size)


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
    free = format_bytes(shutil.disk_usage(folder).free) if Path(folder).is_dir() else "no such folder"
    return (
        f"cannot make a swap file of {format_bytes(num_bytes)} ({free} free there): {error}; name another folder in"
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
    """The mapping itself goes when the last tensor in it does."""
    if locked is not None:
        torch.cuda.cudart().cudaHostUnregister(locked)
    if file is not None:
        os.close(file)
