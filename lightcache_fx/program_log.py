"""The log of programs, by a logger of its own so that `TORCH_LOGS="+lightcache_fx.program_log"` prints them alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightcache_fx.printer import format_graph

if TYPE_CHECKING:
    from lightcache_fx.plan import Plan
    from lightcache_fx.program import Program

log = logging.getLogger(__name__)


def log_programs(plan: Plan, programs: Mapping[str, Program]) -> None:
    """Log programs that have been made or loaded: each with its size, and below that, at level DEBUG, as printed."""
    if not log.isEnabledFor(logging.INFO):
        return
    for name, program in programs.items():
        title = f"{plan.model}.{name}, {plan.branches} calls a step" if plan.branches > 1 else f"{plan.model}.{name}"
        sizes = (program.num_calls, program.flops / 1e9, program.num_regions, program.num_transfers)
        log.info("%s: %d nodes, %.3f GFLOP, %d chunked regions, %d transfers", title, *sizes)
        log.debug("%s:\n%s", title, format_graph(program, modules=True))
