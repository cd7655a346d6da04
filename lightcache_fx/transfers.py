"""Copies between the device and where weights and features are kept, as operators that a graph shows.

    %w_arriving = lightcache.prefetch(%w_home, device, "w")     begins a copy to the device
    %w          = lightcache.wait(%w_arriving)                  the same tensor, whole
    %h_leaving  = lightcache.offload(%h, %h_home, "h")          begins a copy from the device into a buffer's bytes
    %h_gone     = lightcache.release(%h_leaving, %h)            the buffer, laid out as %h; only now may %h be freed

Each returns what its consumers use, so that order is dataflow and dead code elimination drops none that matters. The
lifetime of a source is explicit: it is an argument of the operator behind whose call it may be freed. Nothing is copied
from an empty home or to one: so a caller says that a copy would be for nobody.

On CUDA the copies run on one stream each way, ordered by events, and the host never waits. Without an accelerator the
"device" is the process's own memory and its weights are kept in a memory-mapped file: one worker thread each way copies
while other threads compute, so that order, lifetime and overlap are real there too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lightcache_fx.arena import arena_of, arenas, span_of
from lightcache_fx.errors import SwapError
from lightcache_fx.mapped import check_file
from lightcache_fx.units import format_bytes

log = logging.getLogger(__name__)

Way = Literal["in", "out"]


class Engine(Protocol):
    """Copies to and from one device, each way in the order asked for."""

    def prefetch(self, home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
        """Begin a copy to the device; what is returned must be waited for."""

    def wait(self, arriving: torch.Tensor) -> None:
        """Go on only when the copy into a tensor has ended; at once where none is under way."""

    def offload(self, value: torch.Tensor, home: torch.Tensor, name: str) -> None:
        """Begin a copy from the device; the value must live until `release`."""

    def release(self, home: torch.Tensor) -> None:
        """Go on only when the copy into a buffer has ended; at once where none is under way."""


@dataclass(frozen=True)
class CopyRecord:
    """One copy that was made: what, which way, how many bytes, and when on the clock of `time.perf_counter`."""

    name: str
    way: Way
    num_bytes: int
    begin: float
    end: float


@dataclass
class CopyLog:
    """What was copied and how long computing waited for it, while `recorded_copies` is entered."""

    copies: list[CopyRecord] = field(default_factory=list)
    waited: float = 0.0

    @property
    def copying(self) -> float:
        """Seconds of all copies."""
        return sum(copy.end - copy.begin for copy in self.copies)


_log: CopyLog | None = None


@contextlib.contextmanager
def recorded_copies() -> Iterator[CopyLog]:
    """Record the copies that worker threads make (not those of CUDA, which a profiler shows)."""
    global _log  # noqa: PLW0603 - one process, one record
    outer, _log = _log, CopyLog()
    try:
        yield _log
    finally:
        _log = outer


class ThreadEngine:
    """Copies between memory and mapped files by one worker thread each way.

    A worker reads the file itself instead of the mapping: a page fault that the disk cannot serve would end the
    process, a read raises. Neither reading nor copying holds the interpreter's lock. A process that forks waits for the
    copies under way, so that its child, which has none of its threads, finds them whole.

    Args:
        copy: copies the bytes of the second tensor into the first; other ones are for tests.
    """

    def __init__(self, copy: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> None:
        self._copy = copy or copy_bytes
        self._pending: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.start()
        _thread_engines.add(self)

    def start(self) -> None:
        """Begin with workers of this very process; copies that have ended can still be waited for."""
        self._lock = threading.Lock()
        self._workers = {
            way: ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"lightcache_fx-{way}") for way in ("in", "out")
        }

    def finish(self) -> None:
        """Go on only when no copy is under way."""
        with self._lock:
            for copy in list(self._pending.values()):
                copy.exception()

    def prefetch(self, home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
        """As `Engine.prefetch`; a copy that still fills `home` ends first."""
        arriving = _empty_like(home, device, name)
        self._begin("in", arriving, home, name)
        return arriving

    def wait(self, arriving: torch.Tensor) -> None:
        """As `Engine.wait`."""
        self._end(arriving)

    def offload(self, value: torch.Tensor, home: torch.Tensor, name: str) -> None:
        """As `Engine.offload`."""
        self._begin("out", home, value, name)

    def release(self, home: torch.Tensor) -> None:
        """As `Engine.release`."""
        self._end(home)

    def _begin(self, way: Way, into: torch.Tensor, source: torch.Tensor, name: str) -> None:
        with self._lock:
            earlier = [copy for tensor in (into, source) if (copy := self._pending.get(tensor)) is not None]
            if way == "in":
                source = source.detach()  # a weight may be bound to other memory before its turn comes
            self._pending[into] = self._workers[way].submit(self._run, way, [(into, source)], name, earlier)

    def _end(self, into: torch.Tensor) -> None:
        with self._lock:
            copy = self._pending.pop(into, None)
        if copy is None:
            return
        begin = time.perf_counter()
        failed = copy.result()
        if (log := _log) is not None:
            log.waited += time.perf_counter() - begin
        if failed is not None:
            try:
                raise failed
            finally:
                del copy, failed  # or the traceback holds this frame, this frame the error, and both the tensors

    def _run(
        self,
        way: Way,
        tensors: list[tuple[torch.Tensor, torch.Tensor]],
        name: str,
        earlier: list[Future[SwapError | None]],
    ) -> SwapError | None:
        """One copy, behind those that it depends on.

        When it has ended nobody holds its tensors any more: they come in a list that is emptied, because the pool keeps
        arguments a while, and an error is returned, because the traceback of one that is raised keeps them for ever.
        """
        into, source = tensors.pop()
        for copy in earlier:
            if (failed := copy.result()) is not None:
                return failed
        begin = time.perf_counter()
        try:
            self._copy(into, source)
        except (OSError, SwapError) as error:
            to = "to the device" if way == "in" else "from the device"
            size = format_bytes(span_of(source))
            failed = SwapError(f"cannot copy {name} ({size}) {to}: {error}; it is intact where it was")
            failed.__cause__ = error.with_traceback(None)
            return failed
        if (log := _log) is not None:
            log.copies.append(CopyRecord(name, way, span_of(source), begin, time.perf_counter()))
        return None


_thread_engines: weakref.WeakSet[ThreadEngine] = weakref.WeakSet()


def _finish_all() -> None:
    for engine in list(_thread_engines):
        engine.finish()


def _start_all() -> None:
    for engine in list(_thread_engines):
        engine.start()


os.register_at_fork(before=_finish_all, after_in_child=_start_all)


def copy_bytes(into: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a dense tensor's bytes into another of the same size, through the file where one of them is in an arena's.

    Weights that the user's own files hold are read by the mapping: what was written to them is only there.

    Raises:
        SwapError: the file has been cut short.
        OSError: the disk failed, or is full.
    """
    size, mapped = span_of(source), arenas()
    if not size:
        return
    check_file(source)
    if (found := arena_of(source, mapped)) is not None and found[0].file is not None:
        arena, offset = found
        arena.check_file(offset + size)
        _all_of(os.preadv, arena.file, into.data_ptr(), offset, size)
    elif (found := arena_of(into, mapped)) is not None and found[0].file is not None:
        arena, offset = found
        _all_of(os.pwritev, arena.file, source.data_ptr(), offset, size)
    else:
        ctypes.memmove(into.data_ptr(), source.data_ptr(), size)


def _all_of(operation: Callable[..., int], file: int | None, address: int, offset: int, size: int) -> None:
    """Read or write that many bytes, however few each call does."""
    done = 0
    while done < size:
        part = (ctypes.c_char * (size - done)).from_address(address + done)
        count = operation(file, [part], offset + done)
        if count <= 0:
            raise OSError(f"only {done} of {size} bytes at offset {offset}")
        done += count


class StreamEngine:
    """Copies between page-locked host memory and a CUDA device, on one stream each way.

    A copy to the device waits for what the computing stream has been given so far: its memory may have belonged to a
    value that is still read. What a copy reads and writes is held until its event has passed, or, on the device, until
    the computing stream waits for it: that stream then orders what happens to the memory, but not what the host does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {way: torch.cuda.Stream(device) for way in ("in", "out")}
        self._pending: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._held: list[tuple[torch.cuda.Event, tuple[torch.Tensor, ...]]] = []
        self._lock = threading.Lock()

    def prefetch(self, home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
        """As `Engine.prefetch`."""
        arriving = _empty_like(home, device, name)
        self._begin("in", arriving, home)
        return arriving

    def wait(self, arriving: torch.Tensor) -> None:
        """As `Engine.wait`, on the computing stream."""
        self._end(arriving)

    def offload(self, value: torch.Tensor, home: torch.Tensor, name: str) -> None:  # noqa: ARG002 - part of the protocol
        """As `Engine.offload`."""
        self._begin("out", home, value)

    def release(self, home: torch.Tensor) -> None:
        """As `Engine.release`, on the computing stream."""
        self._end(home)

    def _begin(self, way: Way, into: torch.Tensor, source: torch.Tensor) -> None:
        computing, stream = torch.cuda.current_stream(self._device), self._streams[way]
        with self._lock:
            stream.wait_stream(computing)
            for tensor in (into, source):
                if (event := self._pending.get(tensor)) is not None:
                    stream.wait_event(event)
            with torch.cuda.stream(stream):
                into.copy_(source, non_blocking=True)
                event = torch.cuda.Event()
                event.record(stream)
            self._pending[into] = event
            self._held = [(e, tensors) for e, tensors in self._held if not e.query()]
            memory = (source.detach(),) if way == "in" else ()  # a weight may be bound to other memory meanwhile
            self._held.append((event, (into, source, *memory)))

    def _end(self, into: torch.Tensor) -> None:
        with self._lock:
            event = self._pending.pop(into, None)
            if event is None:
                return
            torch.cuda.current_stream(self._device).wait_event(event)
            self._held = [
                (e, tuple(t for t in tensors if t.device.type == "cpu") if e is event else tensors)
                for e, tensors in self._held
            ]


def _empty_like(home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    try:
        return torch.empty_strided(home.shape, home.stride(), dtype=home.dtype, device=device)
    except RuntimeError as error:  # the allocators of both kinds of device raise a RuntimeError
        size = format_bytes(span_of(home))
        raise SwapError(
            f"no memory on {device} for {name} ({size}); it is intact where it is kept. Lower the memory budget so that"
            f" the plan leaves room for what else is there: {error}"
        ) from error


@cache
def engine_of(kind: str, index: int) -> Engine:
    """The engine of a device, one for the whole process: two on one link would only be in each other's way."""
    if kind == "cuda":
        return StreamEngine(torch.device(kind, index))
    if kind == "cpu":
        return ThreadEngine()
    raise SwapError(f"weights and features can be swapped on cuda and cpu devices, not on {kind}: leave out swap")


def _engine(device: torch.device) -> Engine:
    if device.type != "cuda":
        return engine_of(device.type, 0)
    unnamed = str(device) == "cuda"  # whichever is current
    return engine_of("cuda", torch.cuda.current_device() if unnamed else device.index)


_library = torch.library.Library("lightcache", "FRAGMENT")
_library.define("prefetch(Tensor home, Device device, str name) -> Tensor")
_library.define("wait(Tensor(a) arriving) -> Tensor(a)")
_library.define("offload(Tensor value, Tensor(a!) home, str name) -> Tensor(a!)")
_library.define("release(Tensor(a) leaving, Tensor value) -> Tensor(a)")


def _prefetch(home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    if not home.numel():
        return _empty_like(home, device, name)
    return _engine(device).prefetch(home, device, name)


def _wait(arriving: torch.Tensor) -> torch.Tensor:
    _engine(arriving.device).wait(arriving)
    return arriving


def _offload(value: torch.Tensor, home: torch.Tensor, name: str) -> torch.Tensor:
    if value.numel() and not home.numel():
        return home
    leaving = _laid_out(home, value)
    _engine(value.device).offload(value, leaving, name)
    return leaving


def _release(leaving: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    _engine(value.device).release(leaving)
    return leaving


def _fake_prefetch(home: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_strided(home.shape, home.stride(), dtype=home.dtype, device=device)


def _first_of(first: torch.Tensor, *_: Any) -> torch.Tensor:
    return first


def _laid_out(home: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A buffer's bytes as a tensor with a value's shape, strides and dtype."""
    return home.view(value.dtype).as_strided(value.shape, value.stride())


def _fake_offload(value: torch.Tensor, home: torch.Tensor, name: str) -> torch.Tensor:  # noqa: ARG001
    return _laid_out(home, value)


for _name, _real, _fake in (
    ("prefetch", _prefetch, _fake_prefetch),
    ("wait", _wait, _first_of),
    ("offload", _offload, _fake_offload),
    ("release", _release, _first_of),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lightcache::{_name}", _fake, lib=_library)

PREFETCH = torch.ops.lightcache.prefetch.default
WAIT = torch.ops.lightcache.wait.default
OFFLOAD = torch.ops.lightcache.offload.default
RELEASE = torch.ops.lightcache.release.default
