"""Regions that are told, not searched for: a module's calls, every layer, or the whole graph frame by frame."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from lightcache_fx.axes import Axis
from lightcache_fx.axis_rules import CannotCut
from lightcache_fx.chunk_memory import Chosen, Memory, Stretch
from lightcache_fx.chunk_trials import estimated, exactly
from lightcache_fx.errors import RegionError, nearest
from lightcache_fx.graphs import describe, module_stack, tensors_of
from lightcache_fx.policy import Layers
from lightcache_fx.policy import Region as PolicyRegion
from lightcache_fx.regions import Blocked, axes_of, full_value, trace_region

_CONV2D = torch.ops.aten.conv2d.default
_SMALL_LAYER = 1 / 64
"""Layers whose values are all smaller than this share of the graph's largest are left whole."""


def frame_by_frame(memory: Memory, frames: int) -> list[Chosen]:
    """The whole graph as one region along the first dimension of what it returns last; none where one chunk is all.

    Raises:
        RegionError: frames depend on each other.
    """
    axis = Axis(0, full_value(memory.leaving(0, len(memory.order) - 1)[-1]).shape[0])
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
        seed = memory.leaving(begin, end)[-1]
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


def layer_by_layer(memory: Memory, layers: Layers, taken: Sequence[Chosen] = ()) -> list[Chosen]:
    """Every layer in a fixed number of chunks, the outermost modules that can be cut so (FME).

    Args:
        memory: of the graph.
        layers: into how many.
        taken: regions that were told apart, which are left as they are.
    """
    images = {tensors_of(node.all_input_nodes[0])[0].shape[0] for node in memory.order if node.target is _CONV2D}
    large = max(memory.own.values(), default=0) * _SMALL_LAYER
    busy = {index for region in taken for index in range(region.begin, region.end + 1)}
    found: list[Chosen] = []

    def visit(indices: Sequence[int], depth: int) -> None:
        for path, group in _calls_by_module(memory, indices, depth).items():
            begin, end = group[0], group[-1]
            if not path or max(memory.own[memory.order[index]] for index in group) <= large:
                continue
            inside = [index for index in group if len(module_stack(memory.order[index])) > depth + 1]
            region = None
            if not busy.intersection(range(begin, end + 1)):
                region = _cut_layer(memory, begin, end, layers, images, by_width=not inside)
            if region is None:
                visit(inside, depth + 1)
            else:
                found.append(region)
                busy.update(range(begin, end + 1))

    visit(range(len(memory.order)), 0)
    return found


def _calls_by_module(memory: Memory, indices: Sequence[int], depth: int) -> dict[str, list[int]]:
    """Calls by the module that they are in at a depth of the stack; `""` are those in none so deep."""
    groups: dict[str, list[int]] = {}
    for index in indices:
        stack = module_stack(memory.order[index])
        groups.setdefault(stack[depth] if len(stack) > depth else "", []).append(index)
    return groups


def _cut_layer(
    memory: Memory, begin: int, end: int, layers: Layers, images: Collection[int], *, by_width: bool
) -> Chosen | None:
    """A layer along its first dimension, where that has enough positions, or else, if asked, along its width."""
    leave = memory.leaving(begin, end)
    axes = {axis.dim: axis for axis in axes_of(leave[-1])} if leave else {}
    if not axes:
        return None
    rank = tensors_of(leave[-1])[0].dim()
    of_images = 0 in axes and axes[0].size in images
    enough = of_images or (0 in axes and axes[0].size >= layers.temporal)
    width = rank - 1 if rank > 3 else 1  # of a sequence, the tokens
    for dim in [*([0] if enough else []), *([width, 0] if by_width else [])]:
        axis = axes.get(dim)
        count = layers.spatial if dim == 0 and of_images else layers.temporal
        if axis is None or count == 1:
            continue
        try:
            return _in_chunks_of(memory, -(-axis.size // count), begin, end, axis)
        except Blocked:
            continue
    return None


def _in_chunks_of(memory: Memory, size: int, begin: int, end: int, axis: Axis) -> Chosen:
    """The calls from `begin` to `end` in chunks of `size` positions, or in fewer where another output has fewer."""
    region = trace_region(memory.order[begin : end + 1], axis)
    counts = region.counts([-(-axis.size // size)])
    if not counts:
        raise Blocked(region.seed, axis, CannotCut("another of its results has one position only"))
    count = counts[0]
    return exactly(estimated(Stretch(memory, region, begin, end), count))
