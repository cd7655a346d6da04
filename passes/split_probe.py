"""Adaptive caching: a step is split behind what it decides by."""

from __future__ import annotations

import torch
from torch import fx

from lightcache_fx.graphs import (
    GraphInput,
    copy_graph,
    drop_unused_inputs,
    eliminate_dead_code,
    output_node,
    owns_its_storage,
)
from lightcache_fx.passes.base import PassResult, find_kept, read_from_input, typed_call
from lightcache_fx.probing import ProbePlan

aten = torch.ops.aten
INDICATOR = "indicator"


def split_probe(graph: fx.Graph, *, plan: ProbePlan) -> PassResult:
    """Replace each value that the probe hands over by an input. Bitwise.

        %h = aten.linear.default(%sample, %w)          ->   %h_handed = placeholder[handed "h"]
        %y = aten.add.Tensor(%h, %k)                        %y = aten.add.Tensor(%h_handed, %k)

    `probe_of` gives the program that computes the inputs. Invariant: an input is named `<node>_handed` and has the
    node's type; what is replaced already is left as it is.
    """
    names = [value.node for value in plan.handed]
    moved = read_from_input(graph, names, lambda name: GraphInput("handed", name, "latent"), "handed")
    return PassResult(graph, moved > 0, {"values": moved})


def probe_of(graph: fx.Graph, *, plan: ProbePlan) -> fx.Graph:
    """The program that returns how much the indicator has changed, the indicator, and what is handed over.

        %x = aten.sub.Tensor(%out, %in)                      (of a residual)
        %old = placeholder[indicator "indicator"]
        %change = mean(|%x - %old|) / mean(|%old|)           as FirstBlockCache and TeaCache have it
        return (%change, %x, ...)

    A copy: the graph is left as it is.
    """
    probe, _ = copy_graph(graph)
    by_name = {node.name: node for node in probe.nodes}
    end = output_node(probe)
    node = find_kept(by_name, plan.node, "split_probe")
    with probe.inserting_before(next(n for n in probe.nodes if n.op != "placeholder")):
        old = probe.placeholder(INDICATOR)
    with probe.inserting_before(end):
        base = find_kept(by_name, plan.base, "split_probe") if plan.base is not None else None
        if base is not None:
            now = typed_call(probe, aten.sub.Tensor, node, base)
        else:  # a view would keep alive what it is a view of, and an input may be written to
            now = node if owns_its_storage(node) else typed_call(probe, aten.clone.default, node)
        given = GraphInput("indicator", INDICATOR, "latent")
        old.meta = {"val": torch.empty_like(now.meta["val"]), "lightcache_input": given}
        difference = typed_call(probe, aten.abs.default, typed_call(probe, aten.sub.Tensor, now, old))
        size = typed_call(probe, aten.mean.default, typed_call(probe, aten.abs.default, old))
        change = typed_call(probe, aten.div.Tensor, typed_call(probe, aten.mean.default, difference), size)
    handed = [find_kept(by_name, value.node, "split_probe") for value in plan.handed]
    end.args = ((change, now, *handed),)
    eliminate_dead_code(probe)
    drop_unused_inputs(probe, ("weight", "constant", "hoisted", "user"))
    return probe
