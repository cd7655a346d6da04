"""Dropout in inference is the identity, but torch marks it nondeterministic and keeps it alive."""

from __future__ import annotations

import torch
from torch import fx

from lightcache_fx.graphs import calls
from lightcache_fx.passes.base import PassResult

aten = torch.ops.aten
_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}


def remove_dropout(graph: fx.Graph) -> PassResult:
    """Replace inference dropout by its input. Bitwise.

        %d : f32[2,4] = aten.dropout.default(%x, 0.1, False)        ->   uses of %d read %x

    Only calls whose `train` argument is the constant False, or whose probability is zero; others draw random numbers
    and are left alone.
    """
    removed = 0
    for node in list(calls(graph)):
        if node.target not in _DROPOUTS:
            continue
        source, probability, train = node.args
        if not isinstance(source, fx.Node) or not (train is False or probability == 0):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        removed += 1
    return PassResult(graph, removed > 0, {"dropouts": removed})
