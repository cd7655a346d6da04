"""How often a value can change: const < run < step < latent, from the declared rates of the inputs."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from lightcache_fx.graphs import input_of
from lightcache_fx.policy import Rate

ORDER: tuple[Rate, ...] = ("const", "run", "step", "latent")
_DETERMINISTIC = {torch.ops.aten.scaled_dot_product_attention.default}


def rates_of(graph: fx.Graph) -> dict[fx.Node, Rate]:
    """The rate of every node: the fastest of what it reads; random numbers count as latent.

    A forward data-flow analysis over the four-point chain of rates; one pass suffices, since graphs are acyclic.
    """
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            level[node] = ORDER.index(input_of(node).rate)
        elif draws_random_numbers(node):
            level[node] = ORDER.index("latent")
        else:
            level[node] = max((level[arg] for arg in node.all_input_nodes), default=0)
    return {node: ORDER[value] for node, value in level.items()}


def changes_within_run(rate: Rate) -> bool:
    """Whether a value of this rate can differ between two steps of one generation."""
    return rate in ("step", "latent")


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return bool(node.target not in _DETERMINISTIC or dropout != 0.0)
