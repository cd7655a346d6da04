"""Types say the strides that values really have, as the kernels choose them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lightcache_fx.graphs import calls
from lightcache_fx.liveness import timeline
from lightcache_fx.passes.base import PassResult
from lightcache_fx.printer import format_type


def record_layouts(graph: fx.Graph) -> PassResult:
    """Replace types whose strides are not those of a run.

    Export's fake tensors and real ones part where a dimension has one position: a batch of one image stays
    channels-last in the one and looks contiguous to the next kernel in the other. What a chunked region allocates has
    the layout of its output's type, and kernels round by layout.

        %d : f32[1,16,4,4]{channels_last} = aten.div.Tensor(%a, 1.0)    ->    %d : f32[1,16,4,4] = ...

    Tier: bitwise, as nothing is computed otherwise. Invariants: shapes and dtypes stay; what cannot be run with fake
    tensors, or has symbolic sizes, keeps its type.
    """
    strides = timeline(graph).strides
    recorded = changed = 0
    for node in calls(graph):
        leaves, spec = pytree.tree_flatten(node.meta.get("val"))
        seen = strides.get(node, ())
        if len(seen) != len(leaves) or not any(map(_differs, leaves, seen)):
            continue
        before = format_type(node.meta["val"])
        node.meta["val"] = pytree.tree_unflatten(list(map(_with_strides, leaves, seen)), spec)
        recorded += 1
        changed += format_type(node.meta["val"]) != before
    return PassResult(graph, changed > 0, {"layouts": recorded})


def _differs(value: Any, strides: tuple[int, ...] | None) -> bool:
    if strides is None or not isinstance(value, torch.Tensor):
        return False
    symbolic = any(isinstance(number, torch.SymInt) for number in (*value.shape, *value.stride()))
    return not symbolic and value.stride() != strides


def _with_strides(value: Any, strides: tuple[int, ...] | None) -> Any:
    if strides is None or not _differs(value, strides):
        return value
    with torch.no_grad():
        return value.new_empty_strided(value.shape, strides)
