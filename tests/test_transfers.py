"""Copies to and from the device: their order, what they overlap with, what lives how long, and what fails how."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightcache_fx import transfers
from lightcache_fx.arena import Arena
from lightcache_fx.errors import SwapError
from lightcache_fx.measure import measure_peak
from lightcache_fx.stores import Copies
from lightcache_fx.transfers import (
    OFFLOAD,
    PREFETCH,
    RELEASE,
    WAIT,
    StreamEngine,
    ThreadEngine,
    copy_bytes,
    recorded_copies,
)

CPU = torch.device("cpu")
TIMEOUT = 20.0


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (3, 4)), generator=torch.Generator().manual_seed(0)).to(dtype)


def buffer(arena: Arena, num_bytes: int) -> torch.Tensor:
    return arena.tensor_like(torch.empty(num_bytes, dtype=torch.uint8, device="meta"))


def at_home(arena: Arena, value: torch.Tensor) -> torch.Tensor:
    return arena.tensor_like(value).copy_(value)


@pytest.fixture(params=["host", "disk"])
def arena(request: pytest.FixtureRequest, tmp_path: Path) -> Arena:
    return Arena(2**16, folder=tmp_path if request.param == "disk" else None)


class Gate:
    """A copy that stands still until it is let through, and says what was copied."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Semaphore(0), threading.Semaphore(0)
        self.done: list[int] = []

    def __call__(self, into: torch.Tensor, source: torch.Tensor) -> None:
        self.begun.release()
        assert self.opened.acquire(timeout=TIMEOUT)
        transfers.copy_bytes(into, source)
        self.done.append(into.numel())

    def wait_for_begin(self) -> None:
        assert self.begun.acquire(timeout=TIMEOUT)

    def is_idle(self) -> bool:
        return not self.begun.acquire(timeout=0.05)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadEngine]:
    """The operators' engine, its copies behind the gate, which is opened at the end."""
    made = ThreadEngine(gate)
    monkeypatch.setattr(transfers, "engine_of", lambda kind, index: made)
    yield made
    gate.opened.release(100)


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        x(),
        x().t(),
        x(2, 3, 4, 5).to(memory_format=torch.channels_last),
        x(dtype=torch.bfloat16),
        x(dtype=torch.complex64),
        x() > 0,
        x(0, 3),
        torch.tensor(2.5),
    ],
    ids=["plain", "transposed", "channels_last", "bfloat16", "complex", "bool", "empty", "scalar"],
)
def test_a_round_trip_is_bitwise_and_keeps_the_layout(arena: Arena, value: torch.Tensor) -> None:
    leaving = OFFLOAD(value, buffer(arena, value.nbytes), "h")
    gone = RELEASE(leaving, value)
    arrived = WAIT(PREFETCH(gone, CPU, "h"))
    for tensor in (gone, arrived):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (value.shape, value.stride(), value.dtype)
        assert torch.equal(tensor, value)
    assert arrived.untyped_storage().data_ptr() != gone.untyped_storage().data_ptr() or not value.numel()
    assert not value.numel() or arena.offset_of(gone) == 0


def test_what_was_written_to_a_weight_at_home_arrives(arena: Arena) -> None:
    weight = at_home(arena, x())
    weight.mul_(2)
    assert torch.equal(WAIT(PREFETCH(weight, CPU, "w")), x() * 2)


def test_inference_tensors_and_gradients(arena: Arena) -> None:
    weight = torch.nn.Parameter(x())
    weight.data = at_home(arena, x())
    with torch.inference_mode():
        arrived = WAIT(PREFETCH(weight, CPU, "w"))
        gone = RELEASE(OFFLOAD(arrived, buffer(arena, arrived.nbytes), "h"), arrived)
    with torch.no_grad():
        again = WAIT(PREFETCH(gone, CPU, "h"))
    assert torch.equal(again, x())
    assert not again.requires_grad


def test_waiting_for_what_is_not_under_way_is_free(arena: Arena) -> None:
    value = x()
    assert WAIT(value) is value
    assert RELEASE(value, value) is value
    arrived = PREFETCH(at_home(arena, value), CPU, "w")
    assert WAIT(WAIT(arrived)) is arrived


def test_a_copy_to_the_device_takes_its_own_bytes_and_one_from_it_none(arena: Arena) -> None:
    value = at_home(arena, x(25, 40))
    assert measure_peak(lambda: WAIT(PREFETCH(value, CPU, "w"))).peak_bytes == 4000
    here, home = x(25, 40), buffer(arena, 4000)
    assert measure_peak(lambda: RELEASE(OFFLOAD(here, home, "h"), here)).peak_bytes == 0


def test_a_device_that_is_neither_cpu_nor_cuda_is_refused() -> None:
    with pytest.raises(SwapError, match="can be swapped on cuda and cpu devices, not on xpu: leave out swap"):
        transfers.engine_of("xpu", 0)


# Order and overlap --------------------------------------------------------------------------------------------------


def test_computing_goes_on_while_a_copy_is_under_way(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    arriving = PREFETCH(at_home(arena, x()), CPU, "w")
    gate.wait_for_begin()
    assert torch.equal(x() + x(), 2 * x())  # the copy stands still meanwhile
    assert gate.done == []
    gate.opened.release()
    assert torch.equal(WAIT(arriving), x())


def test_both_ways_at_the_same_time(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    arriving = PREFETCH(at_home(arena, x()), CPU, "w")
    gate.wait_for_begin()
    value = x(5)
    leaving = OFFLOAD(value, buffer(arena, value.nbytes), "h")
    gate.wait_for_begin()  # though the first has not ended
    gate.opened.release(2)
    assert torch.equal(WAIT(arriving), x())
    assert torch.equal(RELEASE(leaving, value), value)


@pytest.mark.parametrize("way", ["in", "out"])
def test_one_way_in_the_order_asked_for(arena: Arena, gate: Gate, engine: ThreadEngine, way: str) -> None:
    values = [x(n) for n in (7, 2, 5)]
    if way == "in":
        begun = [PREFETCH(at_home(arena, value), CPU, "w") for value in values]
    else:
        begun = [OFFLOAD(value, buffer(arena, value.nbytes), "h") for value in values]
    gate.wait_for_begin()
    assert gate.is_idle()  # the second waits for the first
    gate.opened.release(3)
    for copy, value in reversed([*zip(begun, values, strict=True)]):
        assert torch.equal(WAIT(copy) if way == "in" else RELEASE(copy, value), value)
    assert gate.done == [7, 2, 5]


def test_waiting_for_one_does_not_wait_for_the_next(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    first, _second = (PREFETCH(at_home(arena, x(n)), CPU, "w") for n in (2, 3))
    gate.opened.release()
    assert torch.equal(WAIT(first), x(2))
    assert gate.done == [2]


def test_a_slot_is_not_fetched_before_it_has_left(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    value = x()
    leaving = OFFLOAD(value, buffer(arena, value.nbytes), "h")
    gate.wait_for_begin()
    arriving = PREFETCH(leaving, CPU, "h")
    assert gate.is_idle()  # the other worker has nothing else to do, and waits
    gate.opened.release(2)
    assert torch.equal(WAIT(arriving), value)


def test_a_copy_that_still_arrives_may_be_sent_away(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    arriving = PREFETCH(at_home(arena, x()), CPU, "w")
    leaving = OFFLOAD(arriving, buffer(arena, arriving.nbytes), "h")
    gate.opened.release(2)
    assert torch.equal(RELEASE(leaving, arriving), x())


def test_what_is_copied_is_recorded(arena: Arena) -> None:
    with recorded_copies() as log:
        value = WAIT(PREFETCH(at_home(arena, x()), CPU, "a.weight"))
        RELEASE(OFFLOAD(value, buffer(arena, value.nbytes), "h"), value)
    WAIT(PREFETCH(at_home(arena, x()), CPU, "not recorded"))
    assert [(copy.name, copy.way, copy.num_bytes) for copy in log.copies] == [("a.weight", "in", 48), ("h", "out", 48)]
    assert log.copying == sum(copy.end - copy.begin for copy in log.copies)
    assert log.copying > 0
    assert log.waited > 0


def test_waiting_is_recorded_as_such(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    with recorded_copies() as log:
        arriving = PREFETCH(at_home(arena, x()), CPU, "w")
        timer = threading.Timer(0.05, gate.opened.release)
        timer.start()
        WAIT(arriving)
    assert 0.04 < log.waited <= log.copying + 0.05


# Lifetimes ----------------------------------------------------------------------------------------------------------


def test_a_source_lives_until_its_copy_has_ended(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    value = x()
    died = weakref.ref(value)
    leaving = OFFLOAD(value, buffer(arena, value.nbytes), "h")
    gate.wait_for_begin()
    del value  # as a program does behind `release`, only too early
    assert died() is not None
    gate.opened.release()
    assert torch.equal(RELEASE(leaving, torch.empty(0)), x())
    assert died() is None


def test_a_source_is_free_as_soon_as_it_is_released(arena: Arena) -> None:
    for _ in range(50):  # nobody else holds it then, not for a moment
        value = x()
        died = weakref.ref(value)
        leaving = OFFLOAD(value, buffer(arena, value.nbytes), "h")
        RELEASE(leaving, value)
        del value
        assert died() is None


def test_a_worker_holds_nothing_when_it_says_that_it_is_done(
    arena: Arena, gate: Gate, engine: ThreadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what is released would be free a moment later, or not, as threads happen to run."""
    value, alive = x(), []
    died = weakref.ref(value)
    real = Future.set_result
    monkeypatch.setattr(Future, "set_result", lambda future, result: alive.append(died()) or real(future, result))
    leaving = OFFLOAD(value, buffer(arena, value.nbytes), "h")
    gate.wait_for_begin()
    del value
    gate.opened.release()
    RELEASE(leaving, torch.empty(0))
    assert alive == [None]


def test_a_home_lives_until_its_copy_has_ended(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    arriving = PREFETCH(at_home(arena, x()), CPU, "w")  # whose home nobody else holds
    gate.wait_for_begin()
    assert arena.free_bytes < arena.num_bytes
    gate.opened.release()
    assert torch.equal(WAIT(arriving), x())
    assert arena.free_bytes == arena.num_bytes


def test_an_arriving_tensor_that_is_never_waited_for_leaks_nothing(arena: Arena) -> None:
    engine = transfers.engine_of("cpu", 0)
    assert isinstance(engine, ThreadEngine)

    def drop() -> None:
        for _ in range(10):
            PREFETCH(at_home(arena, x()), CPU, "w")
        engine.offload(x(), buffer(arena, 48), "h")
        WAIT(PREFETCH(at_home(arena, x()), CPU, "w"))
        engine.release(torch.empty(0))

    drop()
    last = x()
    engine.offload(last, home := arena.tensor_like(last), "last")
    engine.release(home)
    del home
    gc.collect()
    assert len(engine._pending) == 0
    assert arena.free_bytes == arena.num_bytes


def test_a_failed_copy_that_is_never_waited_for_leaks_nothing(arena: Arena) -> None:
    def fail(*_: torch.Tensor) -> None:
        raise OSError(errno.EIO, "Input/output error")

    engine = ThreadEngine(fail)
    home = at_home(arena, x())
    arriving = engine.prefetch(home, CPU, "w")
    died = [weakref.ref(arriving), weakref.ref(home)]
    engine.finish()
    del home, arriving
    assert [ref() for ref in died] == [None, None]
    assert len(engine._pending) == 0


# Faults -------------------------------------------------------------------------------------------------------------


def test_an_error_in_a_worker_surfaces_where_it_is_waited_for(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(into: torch.Tensor, source: torch.Tensor) -> None:
        raise OSError(errno.EIO, "Input/output error")

    engine = ThreadEngine(fail)
    monkeypatch.setattr(transfers, "engine_of", lambda kind, index: engine)
    home = at_home(arena, x())
    arriving = PREFETCH(home, CPU, "down.0.weight")
    expected = "cannot copy down.0.weight (48 B) to the device: [Errno 5] Input/output error; it is intact where it was"
    with pytest.raises(SwapError, match=f"^{re.escape(expected)}$") as raised:
        WAIT(arriving)
    assert isinstance(raised.value.__cause__, OSError)
    assert torch.equal(home, x())
    assert WAIT(arriving) is arriving  # told once

    leaving = OFFLOAD(x(), buffer(arena, 48), "mid")
    fetched = PREFETCH(leaving, CPU, "mid")  # never sees what has not left
    for wait in (lambda: RELEASE(leaving, x()), lambda: WAIT(fetched)):
        with pytest.raises(SwapError, match=re.escape("cannot copy mid (48 B) from the device: [Errno 5]")):
            wait()


def test_the_next_copies_are_made_after_one_has_failed(arena: Arena) -> None:
    left = [OSError(errno.EIO, "Input/output error")]

    def fail_once(into: torch.Tensor, source: torch.Tensor) -> None:
        if left:
            raise left.pop()
        transfers.copy_bytes(into, source)

    engine = ThreadEngine(fail_once)
    first, second = (engine.prefetch(at_home(arena, x()), CPU, name) for name in "ab")
    with pytest.raises(SwapError, match="cannot copy a "):
        engine.wait(first)
    engine.wait(second)
    assert torch.equal(second, x())


def test_a_full_disk_on_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may be full though it had reserved the space (copy on write, quotas)."""
    arena = Arena(2**14, folder=tmp_path)
    value = x()
    home = buffer(arena, value.nbytes)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    leaving = OFFLOAD(value, home, "h")
    with pytest.raises(SwapError, match=r"cannot copy h \(48 B\) from the device: \[Errno 28\] No space left on dev"):
        RELEASE(leaving, value)
    assert torch.equal(value, x())
    assert list(tmp_path.iterdir()) == []
    del home, leaving
    assert arena.free_bytes == arena.num_bytes


def test_a_truncated_file(tmp_path: Path) -> None:
    arena = Arena(2**14, folder=tmp_path)
    home = at_home(arena, x())
    assert arena.file is not None
    os.ftruncate(arena.file, 0)
    expected = r"cannot copy w \(48 B\) to the device: the swap file has been truncated to 0 B, expected at least 48 B"
    with pytest.raises(SwapError, match=expected):
        WAIT(PREFETCH(home, CPU, "w"))


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_reads_and_writes_go_on_where_they_were_cut_off(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., int] = getattr(os, call)

    def short(file: int, parts: list[Any], offset: int) -> int:
        return real(file, [memoryview(parts[0])[:20]], offset)

    monkeypatch.setattr(os, call, short)
    arena = Arena(2**14, folder=tmp_path)
    gone = RELEASE(OFFLOAD(x(), buffer(arena, 48), "h"), x())
    assert torch.equal(gone, x())
    assert torch.equal(WAIT(PREFETCH(gone, CPU, "h")), x())


def test_a_read_that_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = at_home(Arena(2**14, folder=tmp_path), x())
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(SwapError, match=r"cannot copy w \(48 B\) to the device: only 0 of 48 bytes at offset 0; it is"):
        WAIT(PREFETCH(home, CPU, "w"))


def test_the_file_is_read_and_written_itself_and_not_the_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    value = x()
    arena = Arena(2**14, folder=tmp_path)
    gone = RELEASE(OFFLOAD(value, buffer(arena, 48), "h"), value)
    WAIT(PREFETCH(gone, CPU, "h"))
    assert calls == ["pwritev", "preadv"]


def test_no_memory_on_the_device(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    home = at_home(arena, x())

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty_strided", fail)
    expected = (
        "no memory on cpu for w (48 B); it is intact where it is kept. Lower the memory budget so that the plan leaves"
        " room for what else is there: DefaultCPUAllocator: can't allocate memory"
    )
    with pytest.raises(SwapError, match=f"^{re.escape(expected)}$"):
        PREFETCH(home, CPU, "w")
    assert torch.equal(home, x())


def test_an_error_between_offload_and_release(arena: Arena, gate: Gate, engine: ThreadEngine) -> None:
    """The program ends, the copy does not: it keeps what it needs until then, and no longer."""

    def program() -> None:
        value = x()
        OFFLOAD(value, buffer(arena, 48), "h")
        gate.wait_for_begin()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program()
    gc.collect()
    assert arena.free_bytes < arena.num_bytes
    gate.opened.release()
    gate.opened.release()
    engine.offload(x(), other := arena.tensor_like(x()), "behind it")
    engine.release(other)
    del other
    gc.collect()
    assert arena.free_bytes == arena.num_bytes


# Processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_finds_copies_whole_and_makes_its_own(
    arena: Arena, gate: Gate, engine: ThreadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = at_home(arena, x())
    arriving = PREFETCH(home, CPU, "w")
    gate.wait_for_begin()
    threading.Timer(0.05, gate.opened.release).start()  # forking waits for it
    answers, questions = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        questions.send(torch.equal(WAIT(arriving), x()))
        gate.opened.release(5)
        questions.send(torch.equal(WAIT(PREFETCH(home, CPU, "again")), x()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        assert [answers.poll(TIMEOUT) and answers.recv() for _ in range(2)] == [True, True]
        process.join(TIMEOUT)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert torch.equal(WAIT(arriving), x())


# Streams ------------------------------------------------------------------------------------------------------------


class FakeStream:
    """A queue of work that runs when it is told to, and until an event that has not been reached."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls
        self.queue: list[Callable[[], bool]] = []  # each: do it, or say that it has to wait

    def run(self) -> None:
        while self.queue and self.queue[0]():
            self.queue.pop(0)

    def put(self, work: Callable[[], bool]) -> None:
        self.queue.append(work)

    def wait_event(self, event: FakeEvent) -> None:
        self.calls.append(f"{self.name} waits for {event.name}")
        self.put(lambda: event.passed)

    def wait_stream(self, other: FakeStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")
        event = FakeEvent(other.name)
        other.put(event.passes)
        self.put(lambda: event.passed)


class FakeEvent:
    made = 0

    def __init__(self, name: str = "") -> None:
        FakeEvent.made += not name
        self.name = name or f"event {FakeEvent.made}"
        self.passed = False

    def record(self, stream: FakeStream) -> None:
        stream.calls.append(f"{stream.name} records {self.name}")
        stream.put(self.passes)

    def passes(self) -> bool:
        self.passed = True
        return True

    def query(self) -> bool:
        return self.passed


class Cuda:
    """A device in host memory: what computes is put on `computing`, and copies on the engine's two streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.streams: list[FakeStream] = []
        self.computing = FakeStream("computing", self.calls)
        self.current = self.computing
        self.asked: list[torch.device | None] = []
        FakeEvent.made = 0
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "stream", self.entered)

        def copy_(into: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
            assert non_blocking
            return self.copy(into, source)

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        self.engine = StreamEngine(torch.device("cuda", 1))
        monkeypatch.setattr(transfers, "engine_of", lambda kind, index: self.engine)

    def make(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream("in" if not self.streams else "out", self.calls))
        return self.streams[-1]

    def current_stream(self, device: torch.device | None) -> FakeStream:
        self.asked.append(device)
        return self.current

    def entered(self, stream: FakeStream) -> Any:
        cuda = self

        class Entered:
            def __enter__(self) -> None:
                cuda.current = stream

            def __exit__(self, *_: object) -> None:
                cuda.current = cuda.computing

        return Entered()

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"{self.current.name} copies")
        # As CUDA does it: with addresses, which keep nothing alive.
        self.current.put(partial(move, into.data_ptr(), source.data_ptr(), source.nbytes))
        return into

    def run(self) -> None:
        """All streams, for as long as anything moves."""
        for _ in range(10):
            for stream in (self.computing, *self.streams):
                stream.run()


def move(into: int, source: int, size: int) -> bool:
    ctypes.memmove(into, source, size)
    return True


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_streams_a_weight_is_fetched(cuda: Cuda) -> None:
    home = x()
    arriving = PREFETCH(home, CPU, "w")
    assert cuda.calls == ["in waits for computing", "in copies", "in records event 1"]
    WAIT(arriving)
    assert cuda.calls[3:] == ["computing waits for event 1"]
    WAIT(arriving)  # whole already
    assert len(cuda.calls) == 4
    cuda.run()
    assert torch.equal(arriving, home)
    assert not cuda.computing.queue


def test_streams_a_slot_is_sent_away_and_fetched(cuda: Cuda) -> None:
    value, home = x(), torch.empty(48, dtype=torch.uint8)
    leaving = OFFLOAD(value, home, "h")
    arriving = PREFETCH(leaving, CPU, "h")
    gone = RELEASE(leaving, value)
    WAIT(arriving)
    assert cuda.calls == [
        "out waits for computing",
        "out copies",
        "out records event 1",
        "in waits for computing",
        "in waits for event 1",
        "in copies",
        "in records event 2",
        "computing waits for event 1",
        "computing waits for event 2",
    ]
    cuda.run()
    assert torch.equal(gone, value)
    assert torch.equal(arriving, value)


def test_streams_the_memory_of_an_arriving_tensor_may_still_be_read(cuda: Cuda) -> None:
    """A copy begins when what was computed before it has ended: its block may have been another value's."""
    read = []
    cuda.computing.put(lambda: bool(read))
    arriving = PREFETCH(x(), CPU, "w")
    arriving.zero_()
    cuda.run()
    assert not arriving.any()
    read.append(True)
    cuda.run()
    assert torch.equal(arriving, x())


def test_streams_what_a_copy_needs_is_held_until_it_has_ended(cuda: Cuda) -> None:
    home = x()
    arriving = PREFETCH(home, CPU, "w")
    died = [weakref.ref(home), weakref.ref(arriving)]
    del home, arriving  # never waited for
    PREFETCH(x(), CPU, "another")
    assert None not in [ref() for ref in died]
    cuda.run()
    PREFETCH(x(), CPU, "a third")
    assert [ref() for ref in died] == [None, None]


def test_streams_the_host_side_is_held_though_computing_waits_for_it(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computing waits on the device: the host is far ahead, and must not write to what is still being copied."""
    home = x()
    arriving = PREFETCH(home, CPU, "w")
    died = weakref.ref(home)
    WAIT(arriving)
    del home
    assert died() is not None
    cuda.run()
    PREFETCH(x(), CPU, "another")
    assert died() is None


def test_streams_a_value_is_free_when_it_is_released(cuda: Cuda) -> None:
    """On the device the computing stream orders what happens to the memory next."""
    home = torch.empty(48, dtype=torch.uint8)
    value = x().as_subclass(OnDevice)
    cuda.engine.offload(value, home, "h")
    died = weakref.ref(value)
    cuda.engine.release(home)
    del value
    assert died() is None


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


def test_streams_are_those_of_the_engines_device(cuda: Cuda) -> None:
    value, home = x(), torch.empty(48, dtype=torch.uint8)
    RELEASE(OFFLOAD(value, home, "h"), value)
    WAIT(PREFETCH(x(), CPU, "w"))
    assert set(cuda.asked) == {torch.device("cuda", 1)}


def test_streams_each_device_has_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(transfers, "engine_of", lambda kind, index: asked.append((kind, index)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("cuda", "cuda:0", "cuda:2", "cpu", "cpu:0"):
        transfers._engine(torch.device(device))
    assert asked == [("cuda", 3), ("cuda", 0), ("cuda", 2), ("cpu", 0), ("cpu", 0)]


def test_a_weight_that_is_bound_to_other_memory_before_its_turn_comes() -> None:
    """As `.to(dtype)` does behind a step whose last copies are still to be made: the copy is of what was there."""
    held_up = threading.Event()

    def copy_later(into: torch.Tensor, source: torch.Tensor) -> None:
        assert held_up.wait(10)
        copy_bytes(into, source)

    engine, weight = ThreadEngine(copy_later), nn.Parameter(torch.ones(1000), requires_grad=False)
    arriving = engine.prefetch(weight, torch.device("cpu"), "w")
    weight.data = torch.zeros(2000, dtype=torch.float64)
    held_up.set()
    engine.wait(arriving)
    assert torch.equal(arriving, torch.ones(1000))


def test_a_copy_of_another_version_is_let_go_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is held until then, so a budget must not count on it before."""
    ended: list[torch.Tensor] = []
    monkeypatch.setattr("lightcache_fx.stores.WAIT", ended.append)
    copies, copy = Copies(), torch.zeros(3)
    for put, asked, found in ((1, 2, None), (1, None, None), (1, 1, copy)):
        ended.clear()
        copies.put("weight", copy, put)
        assert copies.take("weight", asked) is found
        assert [one is copy for one in ended] == [True] * (found is None)
        assert copies.take("weight", asked) is None
