"""The search behind `cut="auto"`: the cheapest reuse step within a limit on kept bytes."""

from __future__ import annotations

import itertools
import logging

import networkx as nx
from torch import fx, nn

from lightcache_fx.cuts import CutChoice, GraphFacts, block_lists, measure_cut, residual_streams
from lightcache_fx.errors import CutError
from lightcache_fx.graphs import describe, input_of, module_path, num_bytes, tensors_of
from lightcache_fx.joins import find_joins
from lightcache_fx.marks import MARK, marked_nodes
from lightcache_fx.rates import changes_within_run

log = logging.getLogger(__name__)

_NUM_SINGLE = 16
_MARGINS = (0, 1, 2)


def search_cuts(facts: GraphFacts, module: nn.Module, max_kept_bytes: int | None) -> tuple[CutChoice, list[CutChoice]]:
    """The candidate with the fewest reuse FLOPs that keeps at most `max_kept_bytes`, and all candidates by reuse FLOPs.

    Candidates: single values, by the post-dominator tree (below); the up-path values at skip connections; everything
    that a block of the model's own stacks returns; residual ranges over these stacks. Only cuts after which a reuse
    step still reads the current latent are considered.

    Raises:
        CutError: no candidate, or none within the limit (the message has the smallest).
    """
    candidates = [*_single_values(facts), *_depths(facts), *_blocks(facts, module), *_residuals(facts, module)]
    total = facts.total_flops()
    useful = {
        choice.slots: choice for choice in reversed(candidates) if choice.reads_latent and choice.reuse_flops < total
    }
    ranked = sorted(useful.values(), key=lambda c: (c.reuse_flops, c.kept_bytes, c.label))
    if not ranked:
        raise CutError("cut='auto': no value can be kept that saves FLOPs and leaves the step depending on the latent")
    fitting = [c for c in ranked if max_kept_bytes is None or c.kept_bytes <= max_kept_bytes]
    if not fitting:
        least = min(ranked, key=lambda c: c.kept_bytes)
        raise CutError(
            f"cut='auto': max_kept_bytes={max_kept_bytes} is below the smallest cut, {least.kept_bytes} bytes"
            f" ({least.label})"
        )
    return fitting[0], ranked


def _single_values(facts: GraphFacts) -> list[CutChoice]:
    """The values whose replacement kills most FLOPs.

    Keeping a value saves exactly the nodes that it post-dominates: those from which every path to the output leads
    through it. They are its subtree in the dominator tree of the reversed graph (Cooper, Harvey and Kennedy 2001).
    """
    flow = nx.DiGraph()
    for node in facts.graph.nodes:
        flow.add_edges_from((node, source) for source in node.all_input_nodes)
    end = next(node for node in facts.graph.nodes if node.op == "output")
    parents = {**nx.immediate_dominators(flow, end), end: end}
    saved = {node: facts.flops.get(node, 0) for node in parents}
    holds_latent = {node: node.op == "placeholder" and input_of(node).rate == "latent" for node in parents}
    for node in facts.graph.nodes:  # inputs come first, so a subtree is complete before its root is added to its parent
        parent = parents.get(node)
        if parent is not None and parent is not node:
            saved[parent] += saved[node]
            holds_latent[parent] |= holds_latent[node]
    usable = [
        node
        for node in parents
        if node.op == "call_function"
        and node.target is not MARK
        and len(tensors_of(node)) == 1
        and saved[node] > 0
        and not holds_latent[node]
        and changes_within_run(facts.rates[node])
    ]
    usable.sort(key=lambda node: (-saved[node], num_bytes(node)))
    best = usable[:_NUM_SINGLE]
    least = min(map(num_bytes, best), default=0)
    for node in usable[_NUM_SINGLE:]:  # those that save less are of interest only where they keep less
        if num_bytes(node) < least:
            best.append(node)
            least = num_bytes(node)
    return [measure_cut(facts, describe(node), [(node, None)]) for node in best]


def _depths(facts: GraphFacts) -> list[CutChoice]:
    joins = find_joins(facts.graph, facts.flops, facts.rates)
    return [measure_cut(facts, f"branch {i} ({module_path(node)})", [(node, None)]) for i, node in enumerate(joins)]


def _blocks(facts: GraphFacts, module: nn.Module) -> list[CutChoice]:
    found = marked_nodes(facts.graph, facts.marks)
    choices = []
    for path in itertools.chain.from_iterable(block_lists(module)):
        nodes = [
            n for m, n in found.items() if m.path == path and m.side == "out" and changes_within_run(facts.rates[n])
        ]
        if nodes:
            choices.append(_measured(facts, path, [(node, None) for node in nodes]))
    return [choice for choice in choices if choice is not None]


def _residuals(facts: GraphFacts, module: nn.Module) -> list[CutChoice]:
    choices: list[CutChoice | None] = []
    stacks = block_lists(module)
    for first_stack, last_stack in itertools.combinations_with_replacement(stacks, 2):
        for skip_first, skip_last in itertools.product(_MARGINS, _MARGINS):
            if skip_first >= len(first_stack) or skip_last >= len(last_stack):
                continue
            first, last = first_stack[skip_first], last_stack[len(last_stack) - 1 - skip_last]
            try:
                streams = residual_streams(facts, first, last, proven=True)
            except CutError as reason:
                log.debug("no candidate: %s", reason)
                continue
            choices.append(_measured(facts, f"residual {first} .. {last}", streams))
    return [choice for choice in choices if choice is not None]


def _measured(facts: GraphFacts, label: str, kept: list[tuple[fx.Node, fx.Node | None]]) -> CutChoice | None:
    try:
        return measure_cut(facts, label, kept)
    except CutError as reason:
        log.debug("no candidate: %s", reason)
        return None
