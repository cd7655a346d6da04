"""The pipeline that turns a raw capture into clean inference code."""

from __future__ import annotations

from torch import fx

from lightcache_fx.passes.base import Pass, run_passes
from lightcache_fx.passes.inline_modes import inline_modes
from lightcache_fx.passes.record_layouts import record_layouts
from lightcache_fx.passes.remove_asserts import remove_asserts
from lightcache_fx.passes.remove_dead_code import remove_dead_code
from lightcache_fx.passes.remove_dropout import remove_dropout
from lightcache_fx.passes.remove_noops import remove_noops

NORMALIZE: list[tuple[str, Pass]] = [
    ("inline_modes", inline_modes),  # first, so that the others see what was inside the regions
    ("remove_asserts", remove_asserts),  # before dead code: an assert keeps what it asserts about alive
    ("remove_dropout", remove_dropout),
    ("remove_noops", remove_noops),
    ("remove_dead_code", remove_dead_code),
    ("record_layouts", record_layouts),
]


def normalize(graph_module: fx.GraphModule, *, check_modified: bool = False) -> fx.GraphModule:
    """Run the normalising passes on a captured graph and recompile it. Bitwise."""
    run_passes(graph_module.graph, NORMALIZE, check_modified=check_modified)
    graph_module.recompile()
    return graph_module
