"""What a step computes before it decides whether to go on in full: an indicator, and all that leads to it.

A graph with an indicator is split there. The *probe* computes the indicator and how much it has changed; the rest of
the step, full or reuse, takes over what the probe has computed and either still needs, so that nothing is computed
twice.

Sources: FirstBlockCache (ParaAttention), TeaCache (Liu et al. 2024).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from lightcache_fx.caching import Adaptive
from lightcache_fx.cuts import CutChoice, GraphFacts, check_path, residual_streams, reuse_nodes
from lightcache_fx.errors import CutError
from lightcache_fx.graphs import (
    ancestors,
    describe,
    is_mark,
    is_view,
    num_bytes,
    outputs,
    owns_its_storage,
    tensors_of,
)
from lightcache_fx.marks import marked_nodes
from lightcache_fx.rates import changes_within_run


@dataclass(frozen=True)
class Handed:
    """A value that the probe hands over.

    Attributes:
        node: name of the graph node.
        num_bytes: held until the step ends; none where it is the indicator, which is held longer.
    """

    node: str
    num_bytes: int


@dataclass(frozen=True)
class ProbePlan:
    """Where a step is split.

    Attributes:
        label: of the indicator, for tables and messages.
        node: name of the node that is looked at.
        base: name of the node that is subtracted from it; None for a value as it is.
        indicator_bytes: kept from step to step, to compare with; and of the change, a number.
        handed: what the rest takes over.
        flops: of the probe.
    """

    label: str
    node: str
    base: str | None
    indicator_bytes: int
    handed: tuple[Handed, ...]
    flops: int

    @property
    def handed_bytes(self) -> int:
        """Held until the step ends."""
        return sum(value.num_bytes for value in self.handed)


def plan_probe(facts: GraphFacts, adaptive: Adaptive, cut: CutChoice, module: nn.Module) -> ProbePlan:
    """Find the indicator, and what the rest of a step needs of what leads to it.

    Raises:
        CutError: no such module, none of its results changes within a run, or it is behind the cut.
    """
    by_name = {node.name: node for node in facts.graph.nodes}
    kept = [(by_name[s.node], by_name[s.base] if s.base is not None else None) for s in cut.slots]
    remaining = reuse_nodes(facts.graph, kept)
    if adaptive.indicator is None:
        node, base = _entry(facts, kept, remaining), None
        label = describe(node)
    else:
        node, base = _of_module(facts, adaptive, module)
        label = f"what {adaptive.indicator} {'returns' if base is None else 'adds'}"
    roots = [node] if base is None else [node, base]
    before = ancestors(roots)
    for slot_node, _ in kept:
        if slot_node in before:
            raise CutError(
                f"adaptive: {label} is computed from {describe(slot_node)}, which cut {cut.label} keeps, so it cannot"
                f" be known before that; name an indicator that comes before the cut"
            )
    # What a full step reads and keeps: a reuse step reads nothing else, for it stops at what is kept.
    needed = [n for n in outputs(facts.graph) if isinstance(n, fx.Node)]
    needed += [n for pair in kept for n in pair if n is not None]
    order = {n: place for place, n in enumerate(facts.graph.nodes)}
    shared = {node} if base is None and owns_its_storage(node) else set()  # kept as the indicator, and counted there
    values = sorted(_handed(needed, before), key=order.__getitem__)
    handed = tuple(Handed(n.name, 0 if n in shared else num_bytes(n)) for n in values)
    return ProbePlan(
        label=label,
        node=node.name,
        base=base.name if base is not None else None,
        indicator_bytes=num_bytes(node) + node.meta["val"].element_size(),
        handed=handed,
        flops=sum(facts.flops.get(n, 0) for n in before),
    )


def _of_module(facts: GraphFacts, adaptive: Adaptive, module: nn.Module) -> tuple[fx.Node, fx.Node | None]:
    """What is looked at of a module: what it adds to its stream, or what it returns."""
    path = adaptive.indicator
    assert path is not None
    check_path(module, path)
    found = marked_nodes(facts.graph, facts.marks)
    returned = [
        n for m, n in found.items() if m.path == path and m.side == "out" and changes_within_run(facts.rates[n])
    ]
    if not returned:
        raise CutError(
            f"adaptive: indicator={path!r} returns nothing that changes within a run and reaches the output; name a"
            f" module of the part that each step computes"
        )
    if adaptive.of != "output":
        try:
            streams = residual_streams(facts, path, path)
        except CutError:
            if adaptive.of == "residual":
                raise
            streams = []
        # A stream of the prompt, where there is one, enters the first block unchanged by the latent.
        moving = [(out, base) for out, base in streams if base is not None and facts.rates[base] == "latent"] or streams
        if moving:
            return max(moving, key=lambda pair: num_bytes(pair[0]))
    return max(returned, key=lambda n: (facts.rates[n] == "latent", num_bytes(n))), None


def _entry(facts: GraphFacts, kept: Sequence[tuple[fx.Node, fx.Node | None]], remaining: Iterable[fx.Node]) -> fx.Node:
    """The largest value that reuse steps compute too and that the part of the model that they leave out reads.

    Raises:
        CutError: there is none.
    """
    left = set(remaining)
    saved = ancestors([node for node, _ in kept]) - left
    read = {
        source
        for node in saved
        for source in node.all_input_nodes
        if source in left and source.op == "call_function" and facts.rates[source] == "latent" and tensors_of(source)
    }
    if not read:
        raise CutError(
            "adaptive: a reuse step computes nothing of what the cut saves, so there is nothing to decide by; name a"
            " module of the part before the cut: indicator=..."
        )
    order = {n: place for place, n in enumerate(facts.graph.nodes)}
    return max(read, key=lambda n: (num_bytes(n), order[n]))


def _handed(roots: Sequence[fx.Node], before: set[fx.Node]) -> set[fx.Node]:
    """The values of the probe that a program with these results reads; views of them are taken anew."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in before or node.op in ("placeholder", "get_attr") or _is_light(node):
            stack += node.all_input_nodes
        else:
            found.add(node)
    return found


def _is_light(node: fx.Node) -> bool:
    """A view, a mark, or a number: made anew rather than handed over."""
    if not tensors_of(node):
        return True
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node) and not is_view(source):
        return False  # one of several results of a call
    return is_view(node) or is_mark(node)
