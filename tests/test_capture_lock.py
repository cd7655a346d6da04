"""The lock between captures and runs: who waits for whom, and that nobody waits for ever."""

from __future__ import annotations

import threading
import time

import pytest

from lightcache_fx.capture_lock import CaptureLock


class Thread(threading.Thread):
    """A thread whose progress can be seen: `begun` its work, and `done` with it."""

    def __init__(self, *kinds: str, lock: CaptureLock, hold: threading.Event) -> None:
        super().__init__(daemon=True)
        self.kinds, self.lock, self.hold = kinds, lock, hold
        self.inside, self.finished = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        self.enter(self.kinds)
        self.finished.set()

    def enter(self, kinds: tuple[str, ...]) -> None:
        if not kinds:
            self.inside.set()
            self.hold.wait(10)
            return
        with getattr(self.lock, kinds[0])():
            self.enter(kinds[1:])


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (("running",), ("running",), True),
        (("running",), ("capturing",), False),
        (("capturing",), ("running",), False),
        (("capturing",), ("capturing",), False),
        (("running", "capturing"), ("running",), False),
        (("capturing", "running"), ("running",), False),
        (("running", "running", "capturing"), ("running", "capturing"), False),
    ],
)
def test_who_waits(first: tuple[str, ...], second: tuple[str, ...], together: bool) -> None:
    lock, leave = CaptureLock(), threading.Event()
    one = Thread(*first, lock=lock, hold=leave)
    assert one.inside.wait(5)
    other = Thread(*second, lock=lock, hold=leave)
    assert other.inside.wait(5 if together else 0.1) == together
    leave.set()
    assert one.finished.wait(5)
    assert other.finished.wait(5)


def test_two_that_run_and_then_capture_do_not_wait_for_each_other() -> None:
    lock, barrier, done = CaptureLock(), threading.Barrier(2), []

    def work() -> None:
        with lock.running():
            barrier.wait(5)
            with lock.capturing():
                done.append(1)
                time.sleep(0.01)
            with lock.running():
                done.append(2)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(done) == [1, 1, 2, 2]


def test_a_run_counts_again_after_the_capture_inside_it() -> None:
    """A thread that captured within its run keeps others from capturing until the run is over."""
    lock, leave, captured = CaptureLock(), threading.Event(), threading.Event()

    def work() -> None:
        with lock.running():
            with lock.capturing():
                pass
            captured.set()
            leave.wait(5)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    assert captured.wait(5)
    other = Thread("capturing", lock=lock, hold=leave)
    assert not other.inside.wait(0.1)
    leave.set()
    worker.join(5)
    assert other.finished.wait(5)


def test_errors_let_go() -> None:
    lock = CaptureLock()
    for kind in ("running", "capturing"):
        with pytest.raises(RuntimeError, match="inside"), getattr(lock, kind)():
            raise RuntimeError("inside")
    hold = threading.Event()
    hold.set()
    assert Thread("capturing", lock=lock, hold=hold).finished.wait(5)
