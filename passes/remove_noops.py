"""Casts to the same type, copies that copy nothing, views of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightcache_fx.graphs import calls, outputs, storage_root
from lightcache_fx.passes.base import PassResult, same_layout

aten = torch.ops.aten
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.to.prim_Device, aten.type_as.default,
    aten._to_copy.default, aten._autocast_to_full_precision.default, aten._autocast_to_reduced_precision.default,
}  # fmt: skip
_COPIES = {
    aten.contiguous.default, aten.clone.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
    aten.detach.default, aten.alias.default, aten.alias_copy.default, aten.detach_copy.default,
}  # fmt: skip
_RESHAPING = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.view_as.default,
}  # fmt: skip
_VIEWS = {*_RESHAPING, aten.expand.default, aten.permute.default, aten.expand_as.default}


def remove_noops(graph: fx.Graph) -> PassResult:
    """Remove calls that return what they were given. Bitwise.

        %c : f32[2,4] = aten.to.dtype(%x, f32)                      ->   uses of %c read %x   (1)
        %c : f32[2,4] = aten.contiguous.default(%x)                 ->   uses of %c read %x   (2)
        %c : f32[2,4] = aten.view.default(%x, [2, 4])               ->   uses of %c read %x   (3)
        %c : f32[2,4] = aten.slice.Tensor(%x, 0, 0, 9223372036854775807)   ->   likewise      (4)

    Invariant: shape, strides, dtype and device of the result are those of the argument. A copy
    stays where a returned tensor lives in it, since callers may write to what they are given.
    """
    counts = {"casts": 0, "copies": 0, "views": 0}
    returned = {storage_root(node) for node in outputs(graph) if isinstance(node, fx.Node)}
    for node in list(calls(graph)):
        kind = _kind(node)
        if kind is None:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or not _same_value(source, node):
            continue
        if kind != "views" and node in returned:
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        counts[kind] += 1
    return PassResult(graph, any(counts.values()), counts)


def _kind(node: fx.Node) -> str | None:
    if node.target in _CASTS:
        return "casts"
    if node.target in _COPIES:
        return "copies"
    if node.target in _VIEWS and (node.target is not aten.permute.default or _is_identity_permutation(node)):
        return "views"
    return "views" if node.target is aten.slice.Tensor and _is_whole_slice(node) else None


def _same_value(source: fx.Node, node: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and same_layout(before, after)):
        return False
    return node.target not in _RESHAPING or _keeps_strides(node, before)


def _keeps_strides(node: fx.Node, before: torch.Tensor) -> bool:
    """Whether a view to the same shape has the same strides; a trace's own may differ where there is one position."""
    numbers = (*before.shape, *before.stride())
    if 1 not in numbers or not all(isinstance(number, int) for number in numbers):
        return True
    twin = torch.empty_strided(before.shape, before.stride(), dtype=before.dtype, device="meta")
    args, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda _: twin)  # `view_as`: another of that shape
    view: Any = node.target(twin, *args, **kwargs)  # type: ignore[operator]
    return bool(view.stride() == twin.stride())


def _is_identity_permutation(node: fx.Node) -> bool:
    dims = node.args[1]
    return isinstance(dims, list | tuple) and list(dims) == list(range(len(dims)))


def _is_whole_slice(node: fx.Node) -> bool:
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(step == 1)
