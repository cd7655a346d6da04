"""The places where modules were marked mean nothing to a program."""

from __future__ import annotations

from torch import fx

from lightcache_fx.graphs import calls
from lightcache_fx.marks import MARK
from lightcache_fx.passes.base import PassResult


def remove_marks(graph: fx.Graph) -> PassResult:
    """Replace marks by what they mark. Bitwise.

    %m : f32[2,4] = lightcache.mark.default(%x, 7)              ->   uses of %m read %x
    """
    found = [node for node in calls(graph) if node.target is MARK]
    for node in found:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if "lightcache_slot" in node.meta:  # what was marked is the slot now
            source.meta["lightcache_slot"] = node.meta["lightcache_slot"]
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    return PassResult(graph, bool(found), {"marks": len(found)})
