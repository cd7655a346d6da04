"""Feature caching by extrapolation: a reuse step continues what the cut's values did at the last full steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

from lightcache_fx.cuts import Slot
from lightcache_fx.errors import PassError
from lightcache_fx.extrapolation import COEFFICIENTS, num_coefficients, older_name, slot_and_age
from lightcache_fx.graphs import GraphInput, input_of, placeholders
from lightcache_fx.passes.base import PassResult, typed_call

aten = torch.ops.aten


def extrapolate(graph: fx.Graph, *, slots: Sequence[Slot], order: int, name: str = COEFFICIENTS) -> PassResult:
    """Read from each slot its Taylor expansion about the last full step instead (TaylorSeer, Liu et al. 2025).

        %y = aten.mul.Tensor(%slot_0, %g)    ->   %d = aten.sub.Tensor(%slot_0, %slot_0_before_1)
                                                  %f = aten.div.Tensor(%d, %gap)
                                                  %s = aten.mul.Tensor(%f, %ahead)
                                                  %p = aten.add.Tensor(%slot_0, %s)
                                                  %y = aten.mul.Tensor(%p, %g)

    Derivatives are divided differences of the slot's values at the last `order + 1` full steps, each by the number of
    steps between the two newest of its values; gaps and weights are elements of the one input `coefficients` (or
    `name`), so that one program serves steps of any distance. It stands before the first call that reads the slot.

    Tier: approximate by design; bitwise with respect to the same sums over the values kept. Apply after `read_cache`.
    Invariant: the new inputs come last; the outputs are the model's own.
    """
    by_slot = {input_of(node).name: node for node in placeholders(graph) if input_of(node).kind == "slot"}
    read = [by_slot[slot.name] for slot in slots if slot.name in by_slot and by_slot[slot.name].users]
    if not order or not read:
        return PassResult(graph, False)
    given = [input_of(node) for node in placeholders(graph)]
    if {slot_and_age(one.name)[0] for one in given if one.kind == "history"} & by_slot.keys() & {s.name for s in slots}:
        raise PassError("extrapolate: this graph reads the history of its slots already; apply it to a copy of before")
    last_input = placeholders(graph)[-1]

    def add_input(given: GraphInput, value: torch.Tensor) -> fx.Node:
        nonlocal last_input
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(given.name)
        last_input.meta = {"val": value, "lightcache_input": given}
        return last_input

    like = read[0].meta["val"]
    coefficients = add_input(
        GraphInput("coefficients", name, "step"),
        like.new_empty(num_coefficients(order), dtype=torch.float32),
    )
    values = {
        slot: [slot, *(add_input(_older(slot, age), torch.empty_like(slot.meta["val"])) for age in range(1, order + 1))]
        for slot in read
    }
    point = last_input.next
    with graph.inserting_before(point):
        numbers = [
            typed_call(graph, aten.select.int, coefficients, 0, place) for place in range(num_coefficients(order))
        ]
    places = {node: place for place, node in enumerate(graph.nodes)}
    for slot, differences in values.items():
        users = sorted(slot.users, key=places.__getitem__)
        with graph.inserting_before(users[0]):  # until then a copy of it may be on its way
            total = _expansion(graph, differences, numbers[:order], numbers[order:])
        for user in users:
            user.replace_input_with(slot, total)
    return PassResult(graph, True, {"slots": len(read), "order": order})


def _expansion(
    graph: fx.Graph, values: Sequence[fx.Node], gaps: Sequence[fx.Node], weights: Sequence[fx.Node]
) -> fx.Node:
    """The sum of a slot's value and of its derivatives, each weighed.

    Args:
        graph: where the calls are put at its present place.
        values: of the slot at the last full steps, newest first.
        gaps: between these steps, newest first.
        weights: of the derivatives, from the first on.
    """
    total, differences = values[0], values
    for weight in weights:
        differences = [
            typed_call(graph, aten.div.Tensor, typed_call(graph, aten.sub.Tensor, newer, older), gap)
            for (newer, older), gap in zip(pairwise(differences), gaps, strict=False)
        ]
        total = typed_call(graph, aten.add.Tensor, total, typed_call(graph, aten.mul.Tensor, differences[0], weight))
    return total


def _older(slot: fx.Node, age: int) -> GraphInput:
    return GraphInput("history", older_name(input_of(slot).name, age), "latent")
