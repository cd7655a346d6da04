"""Which large value could be computed again for each reader instead of being kept (`passes/recompute_values`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.graphs import is_view, num_bytes, tensors_of

_MAX_CHAIN = 12


def recomputable(graph: fx.Graph, live: Sequence[str], failed: Collection[str]) -> tuple[str, ...]:
    """The largest live value that can be computed again for each reader, with the calls that must be repeated for it.

    Its inputs are there anyway as long as it is, or are at most half its size and are kept for longer, or are computed
    again themselves.
    """
    by_name = {node.name: node for node in graph.nodes}
    last_use = _last_readers(graph)
    for name in live:
        node = by_name.get(name)
        if node is None or name in failed or len(node.users) < 2:
            continue
        chain = _chain(node, last_use)
        if chain is not None:
            return tuple(link.name for link in chain)
    return ()


def _last_readers(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place of the last call that reads each value, or a view of it."""
    places = {node: index for index, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        last[node] = max([places[node], *(places[user] for user in node.users)])
        last[node] = max([last[node], *(last[user] for user in node.users if is_view(user))])
    return last


def _chain(value: fx.Node, last_use: dict[fx.Node, int]) -> list[fx.Node] | None:
    """What must be computed again to have a value again; None where that cannot be done in strips, or is long."""
    size, until = num_bytes(value), last_use[value]
    chain, stack = [value], [value]
    while stack:
        node = stack.pop()
        if not _in_strips(node) or len(chain) > _MAX_CHAIN:
            return None
        for source in node.all_input_nodes:
            kept = source.op == "placeholder" or last_use[source] >= until or num_bytes(source) <= size // 2
            if not kept and source not in chain:
                chain.append(source)
                stack.append(source)
    return chain


def _in_strips(node: fx.Node) -> bool:
    """Whether a call can be computed in strips of its last dimension but one."""
    tensors = tensors_of(node)
    if len(tensors) != 1 or tensors[0].dim() < 3:
        return False
    try:
        needs_of(node, Axis(tensors[0].dim() - 2, tensors[0].shape[-2]))
    except CannotCut:
        return False
    return True
