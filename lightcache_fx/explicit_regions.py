"""Regions that are told, not searched for: a module's calls, or the whole graph frame by frame."""

from __future__ import annotations

from collections.abc import Iterator

from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Chosen, Memory, estimated, exactly
from lightcache_fx.errors import RegionError, nearest
from lightcache_fx.graphs import describe, module_stack
from lightcache_fx.policy import Region as PolicyRegion
from lightcache_fx.regions import Blocked, axes_of, full_value, leaving, trace_region


def frame_by_frame(memory: Memory, frames: int) -> list[Chosen]:
    """The whole graph as one region along the first dimension of what it returns last; none where one chunk is all.

    Raises:
        RegionError: frames depend on each other.
    """
    axis = Axis(0, full_value(leaving(memory.order)[-1]).shape[0])
    if frames >= axis.size:
        return []
    try:
        return [_in_chunks_of(memory, frames, 0, len(memory.order) - 1, axis)]
    except Blocked as blocked:
        raise RegionError(
            f"decode: frames={frames}, but frames depend on each other: {describe(blocked.node)}: {blocked}; give a"
            f" budget instead of frames, which cuts space where it must"
        ) from blocked


def regions_of_module(memory: Memory, wanted: PolicyRegion) -> Iterator[Chosen]:
    """The calls of a module, each as a region; none where one chunk is all.

    Raises:
        RegionError: there is no such module or axis, or an operation cannot be cut along it.
    """
    calls_of: dict[str, list[int]] = {}
    for index, node in enumerate(memory.order):
        for path in module_stack(node):
            if path.partition("@")[0] == wanted.module:
                calls_of.setdefault(path, []).append(index)
    if not calls_of:
        known = {path.partition("@")[0] for node in memory.order for path in module_stack(node)}
        raise RegionError(f"region: the program has no module {wanted.module!r}{nearest(wanted.module, known)}")
    for indices in calls_of.values():
        begin, end = indices[0], indices[-1]
        seed = leaving(memory.order[begin : end + 1])[-1]
        axes = {axis.dim: axis for axis in axes_of(seed)}
        rank = full_value(seed).dim()
        if not -rank <= wanted.axis < rank or wanted.axis % rank not in axes:
            raise RegionError(
                f"region {wanted.module}: axis {wanted.axis} of {describe(seed)} has nothing to cut; expected one of"
                f" {', '.join(map(str, axes)) or 'none'}"
            )
        axis = axes[wanted.axis % rank]
        if wanted.size >= axis.size:
            continue
        try:
            yield _in_chunks_of(memory, wanted.size, begin, end, axis)
        except Blocked as blocked:
            raise RegionError(
                f"region {wanted.module}: axis {wanted.axis} cannot be cut: {describe(blocked.node)}: {blocked}"
            ) from blocked


def _in_chunks_of(memory: Memory, size: int, begin: int, end: int, axis: Axis) -> Chosen:
    """The calls from `begin` to `end` in chunks of `size` positions, or in fewer where another output has fewer."""
    region = trace_region(memory.order[begin : end + 1], axis)
    count = region.counts([-(-axis.size // size)])[0]
    return exactly(memory, estimated(memory, region, begin, end, count))
