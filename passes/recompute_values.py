"""Rematerialisation: a value is computed once for each pass over it, so that no pass keeps it for the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import fx

from lightcache_fx.graphs import ancestors, calls, num_bytes, output_node
from lightcache_fx.passes.base import PassResult


def recompute_values(graph: fx.Graph, *, names: Iterable[str]) -> PassResult:
    """Give every pass over the named values but the first copies of what it reads, made right before.

    Gradient checkpointing's trade (Chen et al. 2016), made in inference.

        %x = aten.conv2d(%u, %w)                      %x = aten.conv2d(%u, %w)
        %m = row_moments(%x)                          %m = row_moments(%x)
        %n = aten.addcmul(%b, %x, %s)          ->     %x_1 = aten.conv2d(%u, %w)
                                                      %n = aten.addcmul(%b, %x_1, %s)

    A pass is a run of readers of which none depends on another (`passes_over`). Tier: bitwise. Invariants: what is
    returned keeps its own value; the calls and their copies stand right before what reads them first, and are marked
    `lightcache_streamed`. Names that this graph does not have are passed over.
    """
    wanted = set(names)
    returned = set(output_node(graph).all_input_nodes)
    streamed = {node for node in calls(graph) if node.name in wanted and node not in returned}
    chains = [{reader: links(reader, streamed) for reader in readers} for readers in passes_over(graph, streamed)]
    copies = moves = 0
    while chains:  # last pass first, so that what is copied still reads what it always did
        last = chains.pop()
        earlier = {node for chain in chains for part in chain.values() for node in part}
        known: dict[fx.Node, fx.Node] = {}
        for reader, chain in last.items():
            new = [node for node in chain if node not in known]
            moved = not _stand_before(reader, [node for node in new if node not in earlier])
            for node in new:
                if node in earlier:
                    known[node] = _copy_before(reader, node, known)
                    copies += 1
                else:
                    reader.prepend(node)
                    moves += moved
                    _read(node, known)
                    known[node] = node
                known[node].meta["lightcache_streamed"] = True
            _read(reader, known)
    return PassResult(graph, copies + moves > 0, {"copies": copies, "moves": moves})


def passes_over(
    graph: fx.Graph, streamed: Collection[fx.Node], *, num_bytes: Callable[[fx.Node], int] = num_bytes
) -> list[list[fx.Node]]:
    """The calls that read streamed values and are none, in order: those of one list can read the same strips.

    None of a list depends on another of it, and no large value is made between them from something else.

    Args:
        graph: not yet changed.
        streamed: calls whose values are computed again.
        num_bytes: of a call's value, or something that remembers it.
    """
    large = min(map(num_bytes, streamed), default=0)
    found: list[list[fx.Node]] = [[]]
    after: set[fx.Node] = set()  # what depends on the readers of the last list
    closed = False
    for node in calls(graph):
        sources = node.all_input_nodes
        depends = not after.isdisjoint(sources)
        if node in streamed or not any(source in streamed for source in sources):
            closed = closed or (node not in streamed and num_bytes(node) >= large)
            if depends:
                after.add(node)
            continue
        if (depends or closed) and found[-1]:
            found.append([])
            after.clear()
        closed = False
        found[-1].append(node)
        after.add(node)
    return found


def links(reader: fx.Node, streamed: Collection[fx.Node]) -> list[fx.Node]:
    """The streamed calls that a reader's inputs are made by, back to what is kept, in graph order."""
    sources = [node for node in reader.all_input_nodes if node in streamed]
    return sorted(ancestors(sources, stop=lambda node: node not in streamed))


def _stand_before(reader: fx.Node, chain: list[fx.Node]) -> bool:
    """Whether the calls of a chain stand right before a call already, in order."""
    at = reader
    return all((at := at.prev) is node for node in reversed(chain))


def _copy_before(reader: fx.Node, node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    with reader.graph.inserting_before(reader):
        copy = reader.graph.node_copy(node, lambda source: known.get(source, source))
    copy.meta = dict(node.meta)
    return copy


def _read(node: fx.Node, known: dict[fx.Node, fx.Node]) -> None:
    """Let a call read the copies of this pass."""
    for source in node.all_input_nodes:
        if known.get(source, source) is not source:
            node.replace_input_with(source, known[source])
