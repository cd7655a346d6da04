"""Which parts of a graph do the same: the blocks of a model, found by what they compute and not by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Mapping, Sequence
from typing import Any

from torch import fx

from lightcache_fx.costs import is_free, machine_of
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import layout_of, module_stack, num_bytes, tensors_of

SMALLEST = 10
"""A module of fewer calls is not worth compiling apart: it would cost more in fusions than it saves."""


class Place:
    """Stands for a node among arguments, where only its place counts."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"<{self.index}>"


def calls_key(inputs: Sequence[fx.Node], body: Sequence[fx.Node]) -> tuple[dict[fx.Node, Any], Hashable]:
    """Equal for calls that compute the same of inputs laid out alike.

    Args:
        inputs: what the calls read from outside.
        body: the calls, in order.

    Returns:
        the place of each node, and the key.
    """
    places: dict[fx.Node, Any] = {node: Place(index) for index, node in enumerate((*inputs, *body))}
    calls = []
    for node in body:
        arguments = fx.map_arg((node.args, node.kwargs), places.__getitem__)
        calls.append((node.target, repr(arguments), layout_of(node)))
    return places, (tuple(map(layout_of, inputs)), tuple(calls))


def graph_key(graph: fx.Graph) -> Hashable | None:
    """Equal for graphs that compute the same; None where a graph holds more than calls, or does not know its types."""
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    body = [node for node in nodes if node.op not in ("placeholder", "output")]
    if any(node.op != "call_function" for node in body) or not all(map(layout_of, inputs)):
        return None
    places, key = calls_key(inputs, body)
    return key, repr(fx.map_arg(nodes[-1].args, places.__getitem__))


def repeated_blocks(graph: fx.Graph) -> dict[fx.Node, str]:
    """The call of the outermost module that does the same as another one's, for each node in such a call."""
    bodies: dict[str, list[fx.Node]] = {}
    for node in _calls(graph):
        for path in module_stack(node):
            bodies.setdefault(path, []).append(node)
    keys = {path: _key_of(body) for path, body in bodies.items() if len(body) >= SMALLEST}
    counts = Counter(keys.values())
    repeated = {path for path, key in keys.items() if counts[key] > 1}
    found: dict[fx.Node, str] = {}
    for node in _calls(graph):
        for path in module_stack(node):
            if path in repeated:
                found[node] = path
                break
    return found


def share_to_compile(graph: fx.Graph, blocks: Mapping[fx.Node, str]) -> float:
    """Of a graph's calls, those that are left when what blocks have in common counts once; from 0 to 1."""
    bodies: dict[str, list[fx.Node]] = {}
    for node, path in blocks.items():
        bodies.setdefault(path, []).append(node)
    different = {_key_of(body): len(body) for body in bodies.values()}
    count = len(_calls(graph))
    return (count - len(blocks) + sum(different.values())) / max(1, count)


def share_of_time(graph: fx.Graph, nodes: Container[fx.Node]) -> float:
    """How much of a graph's time these calls take, roughly, when one runs after the other; from 0 to 1."""
    machine = machine_of(graph, cuda=any(tensor.is_cuda for node in graph.nodes for tensor in tensors_of(node)))
    flops = count_flops(graph)
    seconds = {
        node: machine.seconds(flops[node], machine.moving(num_bytes(node) + sum(map(num_bytes, node.all_input_nodes))))
        for node in _calls(graph)
        if not is_free(node, flops[node])
    }
    return sum(time for node, time in seconds.items() if node in nodes) / max(sum(seconds.values()), 1e-9)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _key_of(body: Sequence[fx.Node]) -> Hashable:
    inside = set(body)
    inputs = dict.fromkeys(source for node in body for source in node.all_input_nodes if source not in inside)
    places, key = calls_key(list(inputs), body)
    return key, tuple(places[node].index for node in body if any(user not in inside for user in node.users))
