"""Feature caching, the reading half: a reuse step takes the cut from the state instead of computing it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lightcache_fx.cuts import Slot
from lightcache_fx.graphs import GraphInput, drop_unused_inputs, eliminate_dead_code, placeholders
from lightcache_fx.passes.base import PassResult, find_kept


def read_cache(graph: fx.Graph, *, slots: Sequence[Slot]) -> PassResult:
    """Replace the cut by state inputs and remove what becomes dead (DeepCache's skip branch, Ma et al. 2023).

        %h = aten.add.Tensor(%a, %b)             ->   %slot_0 = placeholder[slot "slot_0"]            (1) a value
        %y = aten.cat.default([%h, %skip])            %y = aten.cat.default([%slot_0, %skip])
        %h = aten.add.Tensor(%a, %b)             ->   %r = aten.add.Tensor(%in, %slot_0)              (2) a residual
        %y = aten.mul.Tensor(%h, %g)                  %y = aten.mul.Tensor(%r, %g)

    Tier: approximate by design with respect to the model; bitwise with respect to the eager model with the same values
    replaced. Invariant: the state inputs come last, in the order of the slots; the outputs are the model's own.
    """
    if not slots:
        return PassResult(graph, False)
    by_name = {node.name: node for node in graph.nodes}
    last_input = placeholders(graph)[-1]
    replaced: dict[fx.Node, fx.Node] = {}
    for slot in slots:
        node = find_kept(by_name, slot.node, "read_cache")
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(slot.name)
        last_input.meta = {"val": node.meta["val"], "lightcache_input": GraphInput("slot", slot.name, "latent")}
        stand_in = last_input
        if slot.base is not None:
            base = find_kept(by_name, slot.base, "read_cache")
            with graph.inserting_after(node):
                stand_in = graph.call_function(torch.ops.aten.add.Tensor, (replaced.get(base, base), last_input))
            stand_in.meta = {"val": node.meta["val"], "nn_module_stack": node.meta.get("nn_module_stack", {})}
        _replace_uses(node, stand_in)
        replaced[node] = stand_in
    removed = eliminate_dead_code(graph)
    drop_unused_inputs(graph, ("weight", "constant", "hoisted", "user"))
    return PassResult(graph, True, {"slots": len(slots), "nodes removed": removed})


def _replace_uses(node: fx.Node, stand_in: fx.Node) -> None:
    """All uses of `node` but the stand-in's own."""

    def is_other(user: fx.Node) -> bool:
        return user is not stand_in

    node.replace_all_uses_with(stand_in, delete_user_cb=is_other)
