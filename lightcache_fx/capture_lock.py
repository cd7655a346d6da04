"""While one thread captures, no other may run a drop-in.

PyTorch's tracers are not confined to their thread: for as long as one traces, `nn.Module.__call__` is patched for the
whole process, and the traced module's weights are fake tensors. So a capture waits until the drop-ins that other
threads run have returned, and these wait for the capture. Plain modules in other threads cannot be made to wait.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureLock:
    """Many threads run, or one captures. Both may be nested, in either order, within a thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: Counter[int] = Counter()
        self._captures = 0
        self._owner: int | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Held around every run of a program, or of a module in its place."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, me))
            self._running[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._changed.notify_all()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Held around every capture.

        A thread that is running already counts as not running while it waits: so two such threads that both begin to
        capture do not wait for each other.
        """
        me = threading.get_ident()
        with self._changed:
            mine = self._running.pop(me, 0)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._owner == me or (self._owner is None and not self._running))
            self._owner = me
            self._captures += 1
            if mine:
                self._running[me] = mine
        try:
            yield
        finally:
            with self._changed:
                self._captures -= 1
                if not self._captures:
                    self._owner = None
                self._changed.notify_all()


CAPTURE_LOCK = CaptureLock()
