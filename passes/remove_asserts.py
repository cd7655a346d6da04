"""Assertions about shapes, dtypes and ranges that export leaves in the graph: the signature already guarantees them."""

from __future__ import annotations

import torch
from torch import fx

from lightcache_fx.graphs import calls
from lightcache_fx.passes.base import PassResult

aten = torch.ops.aten
_ASSERTS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def remove_asserts(graph: fx.Graph) -> PassResult:
    """Remove metadata and range assertions. Bitwise.

        aten._assert_tensor_metadata.default(%x, dtype=f32)         ->   (nothing)

    Invariant: none of these returns a value, so no user is left behind.
    """
    found = [node for node in calls(graph) if node.target in _ASSERTS and not node.users]
    for node in found:
        graph.erase_node(node)
    return PassResult(graph, bool(found), {"asserts": len(found)})
