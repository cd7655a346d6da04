"""Where a U-Net's skip connections join its up path, found from the graph alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from lightcache_fx.graphs import ancestors, calls
from lightcache_fx.policy import Rate


def find_joins(graph: fx.Graph, flops: Mapping[fx.Node, int], rates: Mapping[fx.Node, Rate]) -> list[fx.Node]:
    """The up-path value that each skip connection is concatenated to, outermost (last executed) first.

    A join is a concatenation of two values that change with the latent, one of which (the skip) costs nothing that the
    other (the up path) has not already cost: everything with FLOPs before the skip also lies before the up path, and
    the up path has FLOPs of its own. Rotary embeddings, concatenated streams and gated units are told apart by this.
    Entry `b` is the value that DeepCache (Ma et al. 2023) keeps at branch `b`. Where a block joins in its midst, and
    what it was given goes around that as well (Stable Cascade), it is what the block was given.
    """
    joins = []
    for node in calls(graph):
        if node.target is not torch.ops.aten.cat.default or rates[node] != "latent":
            continue
        operands = node.args[0]
        if not isinstance(operands, list | tuple) or len(operands) != 2:
            continue
        first, second = operands
        if (
            not isinstance(first, fx.Node)
            or not isinstance(second, fx.Node)
            or {rates[first], rates[second]} != {"latent"}
        ):
            continue
        before = {operand: ancestors([operand]) for operand in (first, second)}
        own_first = sum(flops.get(n, 0) for n in before[first] - before[second])
        own_second = sum(flops.get(n, 0) for n in before[second] - before[first])
        if own_first > 0 and own_second == 0:
            joins.append(_given(first, before[first], before[second], rates))
        elif own_second > 0 and own_first == 0:
            joins.append(_given(second, before[second], before[first], rates))
    return joins[::-1]


def _given(up: fx.Node, before: set[fx.Node], skipped: set[fx.Node], rates: Mapping[fx.Node, Rate]) -> fx.Node:
    """The up path's last value before the join that is also read past it; by default the joined one."""
    own = [node for node in before - skipped if node is not up and rates[node] == "latent"]
    around = {node for node in own if any(user not in before for user in node.users)}
    return next((node for node in around if around <= ancestors([node])), up)
