"""From what a policy says to nodes of a captured graph: which values stand in for recomputing them.

A cut is a tuple of slots. A `value` slot keeps a node's value; on a reuse step every use of the node reads the slot. A
`residual` slot keeps `node - base`; on a reuse step the node's uses read `base + slot`, with the new `base`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from lightcache_fx.caching import Auto, Cache, Cut, Residual
from lightcache_fx.errors import CutError, NotCalledError, nearest
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import ancestors, describe, expression, input_of, is_view, num_bytes, outputs, placeholders
from lightcache_fx.joins import find_joins
from lightcache_fx.marks import MARK, Mark, marked_nodes
from lightcache_fx.policy import Rate
from lightcache_fx.rates import changes_within_run, rates_of


@dataclass(frozen=True)
class Slot:
    """One piece of state kept between steps.

    Attributes:
        name: unique within a plan.
        node: name of the graph node that is kept.
        base: for a residual, the name of the node that the difference is taken to; None for a value.
        num_bytes: bytes of the kept tensor.
        cache: the place of the cache, among those of the policy, that keeps it.
    """

    name: str
    node: str
    base: str | None
    num_bytes: int
    cache: int = 0


@dataclass(frozen=True)
class CutChoice:
    """A resolved cut, with what it keeps and what it leaves to do.

    Attributes:
        label: how the cut was found, for tables.
        slots: what is kept.
        kept_bytes: the slots' bytes.
        reuse_flops: FLOPs of a reuse step.
        reuse_weight_bytes: bytes of the weights that a reuse step reads.
        reads_latent: whether a reuse step still depends on the current latent.
    """

    label: str
    slots: tuple[Slot, ...]
    kept_bytes: int
    reuse_flops: int
    reuse_weight_bytes: int
    reads_latent: bool


@dataclass
class GraphFacts:
    """A captured graph and the analyses that cutting needs, each made once."""

    graph: fx.Graph
    marks: tuple[Mark, ...] = ()
    known_flops: Mapping[str, int] | None = None
    flops: Mapping[fx.Node, int] = field(init=False)
    rates: Mapping[fx.Node, Rate] = field(init=False)

    def __post_init__(self) -> None:
        known = self.known_flops
        self.flops = count_flops(self.graph) if known is None else {n: known.get(n.name, 0) for n in self.graph.nodes}
        self.rates = rates_of(self.graph)

    def total_flops(self) -> int:
        """FLOPs of the whole graph."""
        return sum(self.flops.values())

    def weight_bytes(self) -> int:
        """Bytes of all weights that the graph reads."""
        return sum(num_bytes(node) for node in placeholders(self.graph) if input_of(node).kind == "weight")


def choose_cut(facts: GraphFacts, cut: Cut, module: nn.Module) -> tuple[CutChoice, list[CutChoice]]:
    """Resolve what a policy asks for.

    Returns:
        the cut, and for `Auto` the table of candidates it was chosen from (empty otherwise).

    Raises:
        CutError: the depth, path or range is not in the graph, cannot be kept, or does not reach the output; the
        message
            names what there is instead.
    """
    match cut:
        case Residual():
            choice = residual_cut(facts, cut.first, cut.last, module)
        case Auto():
            from lightcache_fx.cut_search import search_cuts

            return search_cuts(facts, module, cut.max_kept_bytes)
        case int():
            choice = depth_cut(facts, cut)
        case str():
            choice = module_cut(facts, [cut], module)
        case _:
            choice = module_cut(facts, cut, module)
    return choice, []


def choose_cuts(
    facts: GraphFacts, caches: Sequence[Cache], module: nn.Module
) -> tuple[CutChoice | None, list[CutChoice]]:
    """Resolve what all caches of a policy keep, as one cut whose slots know which of them they are of.

    Returns:
        as `choose_cut`; None without caches.

    Raises:
        CutError: as `choose_cut`, or two caches keep the same value.
    """
    if not caches:
        return None, []
    choices = [choose_cut(facts, cache.cut, module) for cache in caches]
    if len(choices) == 1:
        return choices[0]
    nodes = {node.name: node for node in facts.graph.nodes}
    owners: dict[str, int] = {}
    for place, (choice, _) in enumerate(choices):
        for slot in choice.slots:
            if slot.node in owners:
                raise CutError(
                    f"cache {place} keeps {describe(nodes[slot.node])} of cut {choice.label}, and so does cache"
                    f" {owners[slot.node]}; name each module in one of them"
                )
            owners[slot.node] = place
    kept = [pair for choice, _ in choices for pair in kept_nodes(choice.slots, nodes)]
    whole = measure_cut(facts, " and ".join(choice.label for choice, _ in choices), kept)
    slots = tuple(replace(slot, cache=owners[slot.node]) for slot in whole.slots)
    return replace(whole, slots=slots), []


def kept_nodes(slots: Sequence[Slot], nodes: Mapping[str, fx.Node]) -> list[tuple[fx.Node, fx.Node | None]]:
    """The nodes of slots, and their bases."""
    return [(nodes[slot.node], nodes[slot.base] if slot.base is not None else None) for slot in slots]


def depth_cut(facts: GraphFacts, depth: int) -> CutChoice:
    """The up-path value that skip connection number `depth`, counted from the outermost, joins."""
    joins = find_joins(facts.graph, facts.flops, facts.rates)
    if not joins:
        raise CutError(
            f"cut={depth}: the graph has no skip connections that join an up path, so there is no depth to cut at;"
            f" cut at a"
            f" module path, at Residual(first=..., last=...) or with 'auto'"
        )
    if depth >= len(joins):
        raise CutError(f"cut={depth}: the model has {_skips(len(joins))}")
    return measure_cut(facts, f"branch {depth}", [(joins[depth], None)])


def _skips(count: int) -> str:
    return (
        f"{count} skip connections, so branch 0 to {count - 1} exist"
        if count > 1
        else "1 skip connection, so only branch 0 exists"
    )


def module_cut(facts: GraphFacts, paths: Sequence[str], module: nn.Module) -> CutChoice:
    """Everything that the named modules return, as far as it changes within a run.

    Of the modules that a pattern stands for, those that keep nothing are left out, as long as any keeps something.
    """
    found = marked_nodes(facts.graph, facts.marks)
    kept: list[tuple[fx.Node, fx.Node | None]] = []
    for path in paths:
        check_path(module, path)
        if "*" in path:
            kept += _of_pattern(facts, path, module)
            continue
        marked = [mark for mark in facts.marks if mark.path == path and mark.side == "out"]
        if not marked:
            raise NotCalledError(
                f"cut={path!r}: the module is never called in this forward, or returns no tensor; cut at its caller"
            )
        alive = [node for mark, node in found.items() if mark in marked]
        if not alive:
            raise CutError(
                f"cut={path!r}: nothing that the module returns reaches the output; cut at a module that does"
            )
        moving = [node for node in alive if changes_within_run(facts.rates[node])]
        if not moving:
            raise CutError(
                f"cut={path!r}: what the module returns does not change within a run, so keeping it saves nothing"
            )
        kept += [(node, None) for node in moving]
    return measure_cut(facts, ", ".join(paths), list(dict.fromkeys(kept)))  # a pattern may name what a path does


def _of_pattern(facts: GraphFacts, pattern: str, module: nn.Module) -> list[tuple[fx.Node, None]]:
    """What the modules that a pattern stands for return, as far as it changes within a run and reaches the output."""
    paths = set(matching(pattern, module))
    found = marked_nodes(facts.graph, facts.marks)
    moving = [n for m, n in found.items() if m.path in paths and m.side == "out" and changes_within_run(facts.rates[n])]
    if not moving:
        raise CutError(
            f"cut={pattern!r}: nothing that these {len(paths)} modules return changes within a run and reaches the"
            f" output; name modules that do"
        )
    return [(node, None) for node in dict.fromkeys(moving)]


def residual_cut(facts: GraphFacts, first: str, last: str, module: nn.Module) -> CutChoice:
    """`out - in` of each stream that goes through the modules `first` to `last`."""
    for path in (first, last):
        check_path(module, path)
    return measure_cut(facts, f"residual {first} .. {last}", residual_streams(facts, first, last))


def residual_streams(
    facts: GraphFacts, first: str, last: str, *, proven: bool = False
) -> list[tuple[fx.Node, fx.Node | None]]:
    """Pairs of a stream's value after `last` and before `first`.

    A stream's input is the argument of `first` that the result is reached from by additions alone; where no chain of
    additions shows it, and `proven` is false, the one argument of the same type that the result depends on.
    """
    found = marked_nodes(facts.graph, facts.marks)
    label = f"Residual(first={first!r}, last={last!r})"
    entries = [n for m, n in found.items() if m.path == first and m.side == "in"]
    exits = [n for m, n in found.items() if m.path == last and m.side == "out" and changes_within_run(facts.rates[n])]
    if not entries or not exits:
        raise CutError(f"{label}: no stream that changes with the latent enters {first!r} and leaves {last!r}")
    streams: list[tuple[fx.Node, fx.Node | None]] = []
    for node in exits:
        before = ancestors([node])
        alike = [e for e in entries if e in before and _type_of(e) == _type_of(node)]
        summed = [e for e in alike if e in _addends(node)]
        fitting = summed if proven else summed or alike
        if len(fitting) > 1:  # a position embedding is added too; the stream is what changes with the latent
            fitting = [e for e in fitting if facts.rates[e] == "latent"] or fitting
        if len(fitting) != 1:
            names = ", ".join(map(describe, fitting)) or "none"
            raise CutError(
                f"{label}: cannot tell which input of {first!r} is the stream of {describe(node)}; expected one of"
                f" its type,"
                f" found {names}; name the first and last block of one stack, first before last"
            )
        streams.append((node, fitting[0]))
    return streams


def _addends(node: fx.Node) -> set[fx.Node]:
    """What a value is a sum of: additions, marks, views and concatenations of streams are walked through."""
    linear = (MARK, torch.ops.aten.add.Tensor, torch.ops.aten.cat.default)

    def leaf(n: fx.Node) -> bool:
        return n.op != "call_function" or not (n.target in linear or is_view(n))

    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        found.add(current)
        if not leaf(current):
            stack += current.all_input_nodes
    return found


def _type_of(node: fx.Node) -> tuple[object, ...]:
    value = node.meta["val"]
    return tuple(map(expression, value.shape)), value.dtype, value.device


def measure_cut(facts: GraphFacts, label: str, kept: Sequence[tuple[fx.Node, fx.Node | None]]) -> CutChoice:
    """Number the slots of a cut and count what a reuse step keeps, computes and reads.

    Raises:
        CutError: a kept value does not reach the output.
    """
    nodes = {node for node, _ in kept}
    live = ancestors([n for n in outputs(facts.graph) if isinstance(n, fx.Node)])
    for node in nodes - live:
        raise CutError(f"cut {label}: {describe(node)} does not reach the output, so keeping it changes nothing")
    remaining = reuse_nodes(facts.graph, kept)
    weights = [n for n in remaining if n.op == "placeholder" and input_of(n).kind == "weight"]
    slots = tuple(
        Slot(f"slot_{i}", node.name, base.name if base is not None else None, num_bytes(node))
        for i, (node, base) in enumerate(kept)
    )
    return CutChoice(
        label=label,
        slots=slots,
        kept_bytes=sum(slot.num_bytes for slot in slots),
        reuse_flops=sum(facts.flops.get(node, 0) for node in remaining),
        reuse_weight_bytes=sum(map(num_bytes, weights)),
        reads_latent=any(n.op == "placeholder" and input_of(n).rate == "latent" for n in remaining),
    )


def reuse_nodes(
    graph: fx.Graph, kept: Sequence[tuple[fx.Node, fx.Node | None]], made: Sequence[tuple[fx.Node, fx.Node | None]] = ()
) -> set[fx.Node]:
    """The nodes that still run on a step that reuses what is `kept`, and computes what is `made` for later ones."""
    bases = dict(kept)
    roots = [n for n in outputs(graph) if isinstance(n, fx.Node)]
    roots += [node for pair in made for node in pair if node is not None]
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in bases:
            base = bases[node]
            if base is not None and base not in found:
                stack.append(base)
            continue
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def matching(pattern: str, module: nn.Module) -> list[str]:
    """The module paths that a pattern stands for: `*` is one part of a path, or some of it, and `**` any number."""
    either = {"**": ".*", "*": "[^.]*"}
    expression = "".join(either.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*)", pattern))
    return [name for name, _ in module.named_modules() if name and re.fullmatch(expression, name)]


def check_path(module: nn.Module, path: str, argument: str = "cut") -> None:
    """Raise a `CutError` with the nearest names where `path` is no submodule, or a pattern that no submodule has."""
    known = [name for name, _ in module.named_modules() if name]
    if "*" in path and argument == "cut":
        if not matching(path, module):
            raise CutError(
                f"{argument}={path!r}: {type(module).__name__} has no modules of such paths; * stands for one part of a"
                f" path and ** for any number of them, as in 'blocks.*.attn1' or '**.attn1'"
            )
    elif path not in known:
        raise CutError(f"{argument}={path!r}: {type(module).__name__} has no such module{nearest(path, known)}")


def paths_to_mark(caches: Sequence[Cache], module: nn.Module) -> list[str]:
    """The module paths whose arguments and results a capture must mark: of cuts, and of what steps decide by.

    Raises:
        CutError: a path is no submodule.
    """
    return list(dict.fromkeys(path for cache in caches for path in _paths_of(cache, module)))


def _paths_of(cache: Cache, module: nn.Module) -> list[str]:
    match cache.cut:
        case Residual():
            paths = [cache.cut.first, cache.cut.last]
        case Auto():
            paths = [path for blocks in block_lists(module) for path in blocks]
        case str():
            paths = [cache.cut]
        case list():
            paths = cache.cut
        case _:
            paths = []
    for path in paths:
        check_path(module, path)
    if cache.adaptive is not None and cache.adaptive.indicator is not None:
        check_path(module, cache.adaptive.indicator, "indicator")
        paths = [*paths, cache.adaptive.indicator]
    return [found for path in paths for found in (matching(path, module) if "*" in path else [path])]


def block_lists(module: nn.Module) -> list[list[str]]:
    """The model's own stacks of blocks: `ModuleList`s of at least two members directly below it."""
    return [
        [f"{name}.{index}" for index in range(len(child))]
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 1
    ]
