"""Profiler ranges: a trace reads like the plan, program by program, region by region, copy by copy.

    lightcache::step 0, branch 0
      lightcache::Tower.full
        lightcache::prefetch blocks.1.0.weight
        lightcache::region_0 (dim 0: [256] in 4 chunks)
          lightcache::chunk 0 of region_0

They are `torch.profiler.record_function`: `torch.profiler.profile` shows them, and NVTX (Nsight) has them inside of
`torch.autograd.profiler.emit_nvtx`. They are around programs and in what programs call, never in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_PREFIX = "lightcache::"
_NOTHING: AbstractContextManager[object] = nullcontext()


def is_profiled() -> bool:
    """Whether a profiler of torch is on in this process, and nothing is being traced into a graph."""
    return profiler._is_profiler_enabled and get_proxy_mode() is None  # noqa: SLF001 - torch's own way to ask


def profiled(name: Callable[[], str]) -> AbstractContextManager[object]:
    """A range while a profiler is on; else nothing, at the cost of asking.

    Args:
        name: makes its name, without `lightcache::`.
    """
    if not is_profiled():
        return _NOTHING
    return profiler.record_function(_PREFIX + name())
