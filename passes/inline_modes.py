"""Regions under `torch.no_grad` or a switched-off autocast, which export keeps as subgraphs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from lightcache_fx.graphs import calls
from lightcache_fx.passes.base import PassResult

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_modes(graph: fx.Graph) -> PassResult:
    """Inline subgraphs whose mode means nothing in inference. Bitwise.

        %r = wrap_with_set_grad_enabled(False, @submod, %x)            ->   the nodes of @submod      (1)
        %r = wrap_with_autocast(cpu, None, False, None, @submod, %x)   ->   the nodes of @submod      (2)

    Case 2 only with `enabled=False`: programs run outside autocast, so switching it off changes nothing. A region that
    switches autocast on is left alone.
    """
    inlined = 0
    while (node := next((n for n in calls(graph) if _inlinable(n)), None)) is not None:
        _inline(graph, node)
        inlined += 1
    return PassResult(graph, inlined > 0, {"regions": inlined})


def _inlinable(node: fx.Node) -> bool:
    if node.target is _GRAD:
        return True
    return node.target is _AUTOCAST and node.args[2] is False


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    skip = 1 if node.target is _GRAD else 4
    body_node, *operands = node.args[skip:]
    assert isinstance(body_node, fx.Node)
    assert graph.owning_module is not None
    body = getattr(graph.owning_module, str(body_node.target))
    arguments = iter(operands)
    mapping: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(arguments)
            elif inner.op == "output":
                results = inner.args[0]
                break
            else:
                copied = graph.node_copy(inner, mapping.__getitem__)
                if inner.op == "get_attr":  # the body of a region inside this one, under a name that is free out here
                    copied.target = _adopt(graph.owning_module, getattr(body, str(inner.target)))
                copied.meta = dict(inner.meta)
                copied.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
                mapping[inner] = copied
    results = fx.map_arg(results, mapping.__getitem__)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):  # getitem
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if not body_node.users:
        graph.erase_node(body_node)


def _adopt(owner: fx.GraphModule, value: object) -> str:
    name = next(name for index in itertools.count() if not hasattr(owner, name := f"inlined_{index}"))
    setattr(owner, name, value)
    return name
