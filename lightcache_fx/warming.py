"""What a compiler does once in a process, begun while a model is being captured."""

from __future__ import annotations

import functools
import logging
import threading

import torch

from lightcache_fx.policy import Compile

log = logging.getLogger(__name__)


def warm(settings: Compile | None, device: torch.device) -> None:
    """Let Inductor find out on another thread what instructions a CPU has; it returns at once.

    For that Inductor compiles and runs small programs, one after the other, in processes of their own: seconds in which
    a capture, which is Python on one core, goes on beside them. Its results are Inductor's own, kept where it looks for
    them; a compilation that begins meanwhile waits for them as for any other process's.
    """
    if settings is not None and settings.backend == "inductor" and device.type == "cpu":
        _begin()


@functools.cache
def _begin() -> threading.Thread:
    thread = threading.Thread(target=_find_instructions, name="lightcache-warm", daemon=True)
    thread.start()
    return thread


def _find_instructions() -> None:
    try:
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        valid_vec_isa_list()
    except Exception:  # a compiler that is missing, say: whoever compiles is told
        log.debug("Inductor has not been warmed", exc_info=True)
