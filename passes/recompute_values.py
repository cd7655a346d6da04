"""Rematerialisation: a value is computed once for each reader, so that no reader keeps it for the next."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from lightcache_fx.graphs import output_node
from lightcache_fx.passes.base import PassResult


def recompute_values(graph: fx.Graph, *, names: Iterable[str]) -> PassResult:
    """Give every reader but the first a copy of the call, right before it.

    Gradient checkpointing's trade (Chen et al. 2016), made in inference.

        %x = aten.conv2d(%u, %w)                      %x = aten.conv2d(%u, %w)
        %m = row_moments(%x)                          %m = row_moments(%x)
        %n = aten.addcmul(%b, %x, %s)          ->     %x_1 = aten.conv2d(%u, %w)
                                                      %n = aten.addcmul(%b, %x_1, %s)

    Tier: bitwise. Invariants: names are taken last first, so that a chain of calls is copied whole; what is returned
    keeps its own value. Names that this graph does not have, or that one call reads, are passed over.
    """
    wanted = set(names)
    copies = 0
    for node in [n for n in reversed(graph.nodes) if n.name in wanted]:
        places = {other: index for index, other in enumerate(graph.nodes)}
        readers = sorted(node.users, key=lambda reader: -1 if reader is output_node(graph) else places[reader])
        for reader in readers[1:]:
            with graph.inserting_before(reader):
                copy = graph.node_copy(node)
            copy.meta = dict(node.meta)
            reader.replace_input_with(node, copy)
            copies += 1
    return PassResult(graph, copies > 0, {"copies": copies})
