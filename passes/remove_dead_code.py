"""Dead code, where nondeterministic operators count as pure."""

from __future__ import annotations

from torch import fx

from lightcache_fx.graphs import eliminate_dead_code
from lightcache_fx.passes.base import PassResult


def remove_dead_code(graph: fx.Graph) -> PassResult:
    """Remove calls that no output depends on. Bitwise.

    Attention and dropout are tagged nondeterministic by torch, which would keep them and everything before them; here
    only writes and calls without a result are effects (`lightcache_fx.graphs.is_impure`). Inputs stay.
    """
    removed = eliminate_dead_code(graph)
    return PassResult(graph, removed > 0, {"nodes": removed})
