"""Which run-invariant values are worth computing once a generation.

Loop-invariant code motion (Aho et al., section 9.5) over the denoising loop: a value of rate `run` or `const` that is
read by something faster leaves the step, if computing it again every step would cost more than reading it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lightcache_fx.cuts import GraphFacts
from lightcache_fx.graphs import ancestors, is_view, num_bytes, num_elements, storage_root, tensors_of
from lightcache_fx.marks import MARK
from lightcache_fx.rates import changes_within_run

MIN_BYTES = 16 * 2**20
WEIGHT_SHARE = 0.02
_POINTWISE_WORK = 8  # FLOP-equivalents of one element of a memory-bound operator
_MIN_WORK_PER_BYTE = 4.0


@dataclass(frozen=True)
class HoistedValue:
    """One value computed once a generation.

    Attributes:
        node: name of the graph node.
        num_bytes: what holding it costs.
        flops: FLOPs that no step computes any more because of it and the values before it in the plan.
    """

    node: str
    num_bytes: int
    flops: int


@dataclass(frozen=True)
class HoistPlan:
    """What leaves the denoising loop, in graph order."""

    values: tuple[HoistedValue, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes held from the first step of a generation to its end."""
        return sum(value.num_bytes for value in self.values)

    @property
    def flops(self) -> int:
        """FLOPs computed once instead of every step."""
        return sum(value.flops for value in self.values)


def plan_hoisting(facts: GraphFacts, max_bytes: int | None) -> HoistPlan:
    """Choose the frontier values that pay: most work per held byte first, while they fit `max_bytes`.

    A value pays when the work that only it needs is at least four FLOP-equivalents a byte that it holds; an element of
    a memory-bound operator counts as eight. With `max_bytes=None` hoisted values may hold 2 % of the weights' bytes,
    at least 16 MiB.
    """
    limit = max(MIN_BYTES, int(WEIGHT_SHARE * facts.weight_bytes())) if max_bytes is None else max_bytes
    slow = {node for node, rate in facts.rates.items() if not changes_within_run(rate) and node.op != "output"}
    frontier = dict.fromkeys(
        _smallest_form(node)
        for node in facts.graph.nodes
        if node in slow and node.op in ("call_function", "call_module") and any(user not in slow for user in node.users)
    )
    cones = {node: ancestors([node]) for node in frontier if _holdable(node)}
    work = {node: sum(_work(n, facts) for n in cone) for node, cone in cones.items()}
    chosen: list[fx.Node] = []
    covered: set[fx.Node] = set()
    used = 0
    for node in sorted(cones, key=lambda n: -work[n] / max(1, num_bytes(n))):
        gain = sum(_work(n, facts) for n in cones[node] - covered)
        if gain < _MIN_WORK_PER_BYTE * num_bytes(node) or gain == 0 or used + num_bytes(node) > limit:
            continue
        chosen.append(node)
        covered |= cones[node]
        used += num_bytes(node)
    order = {node: index for index, node in enumerate(facts.graph.nodes)}
    values, done = [], set[fx.Node]()
    for node in sorted(chosen, key=order.__getitem__):
        flops = sum(facts.flops.get(n, 0) for n in cones[node] - done)
        done |= cones[node]
        values.append(HoistedValue(node.name, num_bytes(node), flops))
    return HoistPlan(tuple(values))


def _work(node: fx.Node, facts: GraphFacts) -> int:
    if node.op == "placeholder" or node.target is MARK or is_view(node):
        return 0
    elements = sum(num_elements(tensor) for tensor in tensors_of(node))
    return facts.flops.get(node, 0) + _POINTWISE_WORK * elements


def _smallest_form(node: fx.Node) -> fx.Node:
    """The value before views and repetitions of it: holding less, and they cost next to nothing to redo."""
    while node.op == "call_function" and isinstance(source := node.args[0] if node.args else None, fx.Node):
        if (
            not (is_view(node) or node.target in _REPETITIONS)
            or source.op == "placeholder"
            or len(node.all_input_nodes) > 1
        ):
            break
        node = source
    return node


_REPETITIONS = {
    MARK,
    torch.ops.aten.repeat.default,
    torch.ops.aten.repeat_interleave.self_int,
    torch.ops.aten.clone.default,
}


def _holdable(node: fx.Node) -> bool:
    """A single dense tensor that owns its storage; a view of an input or of something larger would hold that too."""
    return isinstance(node.meta.get("val"), torch.Tensor) and storage_root(node) is node
