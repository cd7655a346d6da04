"""FLOPs of a graph's nodes, by torch's own counter registry (a multiply-add counts as two)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightcache_fx.data_sizes import agreeing_size
from lightcache_fx.graphs import calls, expression, is_view

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
    def _count(target: OpOverload, flat: Sequence[object], spec: pytree.TreeSpec) -> int:
        given = [x for x in flat if isinstance(x, torch.Tensor | torch.SymInt)]
        sizes = [n for x in given for n in (x.shape if isinstance(x, torch.Tensor) else [x])]
        symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
        for as_seen in (False, True) if symbolic else (False,):
            leaves = [_twin(x, as_seen=as_seen) for x in flat]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            try:
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    target(*args, **kwargs)
            except NotImplementedError as reason:  # shapes that depend on data: nothing that multiplies matrices
                log.debug("no FLOP count for %s: %s", target, reason)
                return 0
            except RuntimeError as reason:  # sizes that must agree do not, at their bounds
                if not symbolic:
                    raise
                log.debug("no FLOP count for %s at sizes %s: %s", target, "seen" if as_seen else "bound", reason)
            else:
                return int(counter.get_total_flops())
        log.info("%s counts as no FLOPs: its sizes depend on data, and nothing has shown them", target)
        return 0


def _twin(value: object, *, as_seen: bool) -> object:
    if isinstance(value, torch.SymInt):
        return agreeing_size(value, as_seen=as_seen)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [agreeing_size(size, as_seen=as_seen) for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _body(node: fx.Node) -> fx.GraphModule | None:
    found = getattr(node.graph.owning_module, str(node.target), None)
    return found if isinstance(found, fx.GraphModule) else None


def _type_key(value: object) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(map(expression, value.shape)), value.dtype
    return (type(value), str(value))
