"""Feature caching, the writing half: a full step also returns what later steps reuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lightcache_fx.cuts import Slot
from lightcache_fx.errors import PassError
from lightcache_fx.graphs import num_bytes, output_node, outputs, storage_root
from lightcache_fx.passes.base import PassResult, find_kept

aten = torch.ops.aten


def write_cache(graph: fx.Graph, *, slots: Sequence[Slot]) -> PassResult:
    """Append the slots to the outputs. Bitwise for what the model returns.

        return (%y,)                      ->   return (%y, %h)                                     (1) a value
                                               %d = aten.sub.Tensor(%h, %in); return (%y, %d)      (2) a residual
                                               %c = aten.clone.default(%h); return (%y, %c)        (3) a shared storage

    Case 3: a value that is a view of something larger, of an input, or of a returned tensor is copied, so that a slot
    holds exactly its own bytes and nobody else can write to it.
    """
    if not slots:
        return PassResult(graph, False)
    if any("lightcache_slot" in node.meta for node in graph.nodes):
        raise PassError("write_cache: this graph returns slots already; apply it to a copy of the captured graph")
    by_name = {node.name: node for node in graph.nodes}
    returned = {storage_root(node) for node in outputs(graph) if isinstance(node, fx.Node)}
    end = output_node(graph)
    kept: list[fx.Node] = []
    copies = 0
    for slot in slots:
        node = find_kept(by_name, slot.node, "write_cache")
        with graph.inserting_after(node):
            if slot.base is not None:
                node = _call(graph, aten.sub.Tensor, (node, find_kept(by_name, slot.base, "write_cache")), like=node)
            elif (
                (root := storage_root(node)) in returned
                or root.op == "placeholder"
                or num_bytes(root) != num_bytes(node)
            ):
                node = _call(graph, aten.clone.default, (node,), like=node)
                copies += 1
        returned.add(storage_root(node))
        node.meta["lightcache_slot"] = slot.name
        kept.append(node)
    end.args = ((*outputs(graph), *kept),)
    return PassResult(graph, True, {"slots": len(slots), "copies": copies})


def _call(graph: fx.Graph, target: torch._ops.OpOverload, args: tuple[fx.Node, ...], *, like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    node.meta["val"] = torch.empty_like(like.meta["val"])
    return node
