"""Loop-invariant code motion: values that change once a generation leave the denoising step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from lightcache_fx.graphs import GraphInput, copy_graph, drop_unused_inputs, eliminate_dead_code, output_node
from lightcache_fx.hoisting import HoistPlan
from lightcache_fx.passes.base import PassResult


def split_run_invariants(graph: fx.Graph, *, plan: HoistPlan) -> PassResult:
    """Replace each hoisted value by an input. Bitwise.

        %k = aten.linear.default(%prompt, %w)          ->   %k = placeholder[hoisted "k"]
        %y = aten.add.Tensor(%x, %k)                        %y = aten.add.Tensor(%x, %k)

    `prologue_of` gives the program that computes the inputs. Invariant: the input is
    named `<node>_hoisted` and has the node's type.
    """
    names = [value.node for value in plan.values]
    moved = read_from_input(graph, names, lambda name: GraphInput("hoisted", name, "run"), "hoisted")
    return PassResult(graph, moved > 0, {"values": moved})


def read_from_input(graph: fx.Graph, names: Iterable[str], given: Callable[[str], GraphInput], suffix: str) -> int:
    """Replace nodes by inputs named after them, and remove what becomes dead; returns how many there were."""
    by_name = {node.name: node for node in graph.nodes}
    first = next(iter(graph.nodes))
    moved = 0
    for name in names:
        node = by_name.get(name)
        if node is None or node.op == "placeholder":
            continue
        with graph.inserting_before(first):
            held = graph.placeholder(f"{name}_{suffix}")
        held.meta = {"val": node.meta["val"], "lightcache_input": given(name)}
        node.replace_all_uses_with(held)
        moved += 1
    if moved:
        eliminate_dead_code(graph)
        drop_unused_inputs(graph, ("weight", "constant", "hoisted", "user"))
    return moved


def prologue_of(graph: fx.Graph, *, plan: HoistPlan) -> fx.Graph:
    """The program that computes the hoisted values from inputs and weights, in the plan's order."""
    prologue, _ = copy_graph(graph)
    by_name = {node.name: node for node in prologue.nodes}
    output_node(prologue).args = (tuple(by_name[value.node] for value in plan.values),)
    eliminate_dead_code(prologue)
    drop_unused_inputs(prologue, ("weight", "constant", "user"))
    return prologue
