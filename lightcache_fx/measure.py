"""The memory that a call really takes, by what torch's allocators report."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class MeasuredPeak:
    """What was allocated during one call, relative to what there was before it.

    Attributes:
        peak_bytes: the most at any moment.
        end_bytes: still allocated when the call had returned, its result included.
        num_allocations: how often memory was allocated; 0 on CUDA, where it is not counted.
        device_type: `cpu` or `cuda`.
    """

    peak_bytes: int
    end_bytes: int
    num_allocations: int
    device_type: str


def measure_peak(function: Callable[[], Any], *, device_type: str = "cpu") -> MeasuredPeak:
    """Call `function` once and measure what it allocates at its peak.

    On the CPU every allocation and release of torch's CPU allocator counts, exact to the byte, from whichever thread
    (the profiler's `[memory]` events in order of time). This includes the temporaries of kernels that take them from
    that allocator, and scalars wrapped as tensors. It leaves out what libraries take from malloc themselves: oneDNN's
    and MKL's packed operands and scratch, and Python's own objects. Inputs and weights exist before the call and do not
    count; releasing them during it would count negatively, so hold them.

    On CUDA it is `torch.cuda.max_memory_allocated` less what was allocated before: blocks of the caching allocator,
    cuDNN's and cuBLAS's workspaces included, which may exceed what was asked for by 512 bytes, or by up to 1 MiB where
    a cached block was too small to be split.

    Args:
        function: takes nothing; its result is held until the measurement is over. Call it once before where its first
            call fills caches.
        device_type: `cpu` or `cuda` (the current device).
    """
    gc.collect()
    if device_type == "cuda":
        return _measure_cuda(function)
    sizes = [event for _, event in _events_of(function) if isinstance(event, int)]
    totals = list(accumulate(sizes))
    return MeasuredPeak(
        peak_bytes=max(totals, default=0),
        end_bytes=totals[-1] if totals else 0,
        num_allocations=sum(size > 0 for size in sizes),
        device_type="cpu",
    )


def measure_stages(function: Callable[[Callable[[str], None]], Any], *, device_type: str = "cpu") -> dict[str, int]:
    """Call `function` once and measure what is allocated at the peak of each of its stages, in bytes.

    Counted is as in `measure_peak`, and relative to what there was before the call: what an earlier stage leaves
    behind counts in the later ones.

    Args:
        function: is given a function to call with the name of each stage as it begins; what happens before the first
            one counts nowhere. Its result is held until the measurement is over.
        device_type: `cpu` or `cuda` (the current device).
    """
    if device_type == "cuda":
        gc.collect()
        return _measure_stages_cuda(function)
    peaks: dict[str, int] = {}
    for moment in measure_over_time(function):
        if moment.stage is not None:
            peaks[moment.stage] = max(peaks.get(moment.stage, 0), moment.num_bytes)
    return peaks


class MemoryMoment(NamedTuple):
    """What is allocated from one moment on.

    Attributes:
        seconds: since the first allocation, on the profiler's clock: watching takes time too.
        num_bytes: allocated since the call began and not released.
        stage: that is under way; None before the first one.
    """

    seconds: float
    num_bytes: int
    stage: str | None


def measure_over_time(function: Callable[[Callable[[str], None]], Any]) -> list[MemoryMoment]:
    """Call `function` once, as `measure_stages` does, and follow what is allocated on the CPU, change by change."""
    gc.collect()
    found: list[MemoryMoment] = []
    total, stage, begin = 0, None, None
    for nanoseconds, event in _events_of(lambda: function(_mark_stage)):
        begin = nanoseconds if begin is None else begin
        if isinstance(event, str):
            stage = event
        else:
            total += event
        found.append(MemoryMoment((nanoseconds - begin) / 1e9, total, stage))
    return found


_STAGE = "lightcache stage: "


def _mark_stage(name: str) -> None:
    with record_function(_STAGE + name):
        pass


def _events_of(function: Callable[[], Any]) -> list[tuple[int, int | str]]:
    """Bytes allocated (released: below zero) on the CPU while `function` runs, and stages as they begin.

    In order, each with its moment in nanoseconds.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    recorded = profiler.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    found: list[tuple[int, int | str]] = []
    # Not through profiler.events(), which drops memory events that happen outside operators.
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            found.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(_STAGE):
            found.append((event.start_ns(), event.name().removeprefix(_STAGE)))
    del result
    found.sort(key=lambda event: event[0])  # stable: events of one thread keep their order
    return found


def _measure_cuda(function: Callable[[], Any]) -> MeasuredPeak:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return MeasuredPeak(max(peak - before, 0), after - before, 0, "cuda")


def _measure_stages_cuda(function: Callable[[Callable[[str], None]], Any]) -> dict[str, int]:
    before = torch.cuda.memory_allocated()
    peaks: dict[str, int] = {}
    stage: list[str] = []

    def close() -> None:
        torch.cuda.synchronize()
        if stage:
            peaks[stage[-1]] = max(peaks.get(stage[-1], 0), torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    def begin(name: str) -> None:
        close()
        stage.append(name)

    result = function(begin)
    close()
    del result
    return peaks
