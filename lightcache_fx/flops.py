"""FLOPs of a graph's nodes, by torch's own counter registry (a multiply-add counts as two)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightcache_fx.graphs import calls, concrete_size, is_view

log = logging.getLogger(__name__)


def count_flops(graph: fx.Graph) -> dict[fx.Node, int]:
    """FLOPs of every call, from shapes alone.

    Each distinct operator call is run once on the meta device under `torch.utils.flop_counter`, which decomposes what
    has no formula of its own (linear, matmul, attention). So the count is the same for every device: on real CPU
    tensors the counter leaves attention out, for want of a formula for the CPU's kernel. Opaque submodules carry the
    count of their warm-up call; subgraphs of higher-order operators are counted node by node.

    Source: `torch.utils.flop_counter.flop_registry`.
    """
    counter = _Counter()
    return {node: counter.of(node) for node in calls(graph)}


def total_flops(graph: fx.Graph) -> int:
    """The sum over a graph's nodes."""
    return sum(count_flops(graph).values())


class _Counter:
    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def of(self, node: fx.Node) -> int:
        if node.op == "call_module":
            return int(node.meta["lightcache_flops"])
        bodies = [_body(arg) for arg in node.all_input_nodes if arg.op == "get_attr"]
        if bodies:
            return sum(self.of(inner) for body in bodies if body is not None for inner in calls(body.graph))
        if not isinstance(node.target, OpOverload) or is_view(node) or torch.Tag.pointwise in node.target.tags:
            return 0
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val"))):
            return 0  # a number that is read from a tensor
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        flat, spec = pytree.tree_flatten((args, kwargs))
        key = (node.target, str(spec), tuple(map(_type_key, flat)))
        if key not in self._known:
            self._known[key] = self._count(node.target, flat, spec)
        return self._known[key]

    @staticmethod
    def _count(target: OpOverload, flat: Iterable[object], spec: pytree.TreeSpec) -> int:
        leaves = [_twin(x) if isinstance(x, torch.Tensor | torch.SymInt) else x for x in flat]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                target(*args, **kwargs)
        except NotImplementedError as reason:  # shapes that depend on data: nothing that multiplies matrices
            log.debug("no FLOP count for %s: %s", target, reason)
            return 0
        return int(counter.get_total_flops())


def _twin(value: torch.Tensor | torch.SymInt) -> torch.Tensor | int:
    if isinstance(value, torch.SymInt):
        return concrete_size(value)
    tensor = value
    return torch.empty([concrete_size(size) for size in tensor.shape], dtype=tensor.dtype, device="meta")


def _body(node: fx.Node) -> fx.GraphModule | None:
    found = getattr(node.graph.owning_module, str(node.target), None)
    return found if isinstance(found, fx.GraphModule) else None


def _type_key(value: object) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(map(concrete_size, value.shape)), value.dtype
    return (type(value), str(value))
