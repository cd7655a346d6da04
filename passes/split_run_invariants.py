"""Loop-invariant code motion: values that change once a generation leave the denoising step."""

from __future__ import annotations

from torch import fx

from lightcache_fx.graphs import GraphInput, copy_graph, drop_unused_inputs, eliminate_dead_code, output_node
from lightcache_fx.hoisting import HoistPlan
from lightcache_fx.passes.base import PassResult, read_from_input


def split_run_invariants(graph: fx.Graph, *, plan: HoistPlan) -> PassResult:
    """Replace each hoisted value by an input. Bitwise.

        %k = aten.linear.default(%prompt, %w)          ->   %k = placeholder[hoisted "k"]
        %y = aten.add.Tensor(%x, %k)                        %y = aten.add.Tensor(%x, %k)

    `prologue_of` gives the program that computes the inputs. Invariant: the input is
    named `<node>_hoisted` and has the node's type; what is replaced already is left as it is.
    """
    names = [value.node for value in plan.values]
    moved = read_from_input(graph, names, lambda name: GraphInput("hoisted", name, "run"), "hoisted")
    return PassResult(graph, moved > 0, {"values": moved})


def prologue_of(graph: fx.Graph, *, plan: HoistPlan) -> fx.Graph:
    """The program that computes the hoisted values from inputs and weights, in the plan's order."""
    prologue, _ = copy_graph(graph)
    by_name = {node.name: node for node in prologue.nodes}
    output_node(prologue).args = (tuple(by_name[value.node] for value in plan.values),)
    eliminate_dead_code(prologue)
    drop_unused_inputs(prologue, ("weight", "constant", "user"))
    return prologue
