"""Which nodes can run chunk by chunk: a cut of a region's outputs, followed back through its nodes to its inputs.

A region is a set of nodes whose outputs are computed over ranges of one axis, one range after the other. `trace_region`
walks back from the outputs by the rules of `axis_rules`. A value that somebody needs whole (the keys of self-attention
when its queries are cut, a time embedding) stays outside and is computed once, before; cut readers read slices of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.graphs import tensors_of


@dataclass(frozen=True, eq=False)
class Region:
    """A region before its chunks are chosen.

    Attributes:
        body: the nodes that are computed chunk by chunk, in order.
        axes: how each of them is cut.
        outputs: those of them whose values are used outside, in order.
        needs: for each node of the body, what it needs of each of its tensor inputs; None is the whole value.
        inputs: values from outside that the body reads, in order of first use.
    """

    body: tuple[fx.Node, ...]
    axes: Mapping[fx.Node, Axis]
    outputs: tuple[fx.Node, ...]
    needs: Mapping[fx.Node, Mapping[fx.Node, Need | None]]
    inputs: tuple[fx.Node, ...]

    @property
    def seed(self) -> fx.Node:
        """The output whose axis counts the chunks: the last."""
        return self.outputs[-1]

    @property
    def axis(self) -> Axis:
        """How the seed is cut."""
        return self.axes[self.seed]

    def bounds(self, index: int, count: int, node: fx.Node) -> tuple[int, int]:
        """Positions of output `node` that chunk `index` of `count` makes: all are alike but the last, if uneven."""
        size, whole = self.axes[node].size, self.axis.size
        length = -(-whole // count)
        start, stop = index * length, min((index + 1) * length, whole)
        return start * size // whole, stop * size // whole

    def counts(self, wanted: Iterable[int]) -> list[int]:
        """Numbers of chunks near the wanted ones, rising, each with another length, up to one position a chunk."""
        most = min(self.axes[node].size for node in self.outputs)
        lengths = {-(-self.axis.size // count) for count in (*wanted, most) if 1 < count <= most}
        return sorted(-(-self.axis.size // length) for length in lengths)


NeedsOf = Callable[[fx.Node, Axis], dict[fx.Node, Need | None]]


class Blocked(Exception):  # noqa: N818 - control flow, not an error: it never reaches the user
    """The walk met an operation that cannot be cut so: `node`, the `axis` it was asked for, and why."""

    def __init__(self, node: fx.Node, axis: Axis, error: CannotCut) -> None:
        super().__init__(error.reason)
        self.node, self.axis, self.alternatives = node, axis, error.alternatives


@dataclass
class _Walk:
    """The state of a walk back through a stretch of nodes."""

    members: frozenset[fx.Node]
    needs_of: NeedsOf
    axes: dict[fx.Node, Axis] = field(default_factory=dict)
    whole: set[fx.Node] = field(default_factory=set)
    needs: dict[fx.Node, dict[fx.Node, Need | None]] = field(default_factory=dict)

    def cut(self, node: fx.Node, axis: Axis) -> None:
        """Ask for `node` along `axis`; asked for along two axes, it is computed whole."""
        if node in self.whole or node not in self.members:
            return
        if self.axes.setdefault(node, axis) != axis:
            self.keep_whole(node)

    def keep_whole(self, node: fx.Node) -> None:
        """Leave `node` and what it is made from outside."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self.members and node not in self.whole:
                self.whole.add(node)
                self.axes.pop(node, None)
                stack += node.all_input_nodes

    def visit(self, node: fx.Node) -> None:
        """Follow one cut node back to its inputs."""
        try:
            self.needs[node] = self.needs_of(node, self.axes[node])
        except CannotCut as error:
            raise Blocked(node, self.axes[node], error) from error
        for source, need in self.needs[node].items():
            if need is None:
                self.keep_whole(source)
            else:
                self.cut(source, need.axis)


def leaving(stretch: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls of a run of nodes whose values are used outside of it, in order."""
    members = frozenset(stretch)
    return [node for node in stretch if tensors_of(node) and any(user not in members for user in node.users)]


def trace_region(
    stretch: Sequence[fx.Node], axis: Axis, *, needs_of: NeedsOf = needs_of, wanted: Sequence[fx.Node] | None = None
) -> Region:
    """The region that computes the values that leave `stretch`, a run of nodes in graph order, cut along `axis`.

    Args:
        stretch: nodes that may be computed chunk by chunk.
        axis: how the last value that leaves the stretch is cut. Others that leave are cut as the walk finds them, or
            along an axis of as many positions that agrees with what they are made from.
        needs_of: the rules, or something that remembers what they said.
        wanted: the values that leave the stretch, if they are known.

    Raises:
        Blocked: an operation cannot be cut so, or an output can only be computed whole from values that are cut.
    """
    wanted = leaving(stretch) if wanted is None else wanted
    seed, leave = wanted[-1], set(wanted)
    several = next((node for node in wanted if not isinstance(node.meta["val"], torch.Tensor)), None)
    if several is not None:
        raise Blocked(several, axis, CannotCut("an operation with several results is parted from them"))
    walk = _Walk(frozenset(stretch), needs_of)
    walk.cut(seed, axis)
    for node in reversed(stretch):  # so that an output is left alone until nothing after it can have asked for it
        if node in leave and node not in walk.axes and node not in walk.whole:
            _cut_output(walk, node, axis.size)
        if node in walk.axes:
            walk.visit(node)
    cut = set(walk.axes)
    # One of several results of a call outside is taken out of them outside.
    body = tuple(n for n in stretch if n in cut and (n.target is not operator.getitem or n.all_input_nodes[0] in cut))
    if seed not in body:
        raise Blocked(seed, axis, CannotCut("it is needed whole"))
    inside = set(body)
    outputs = tuple(node for node in wanted if node in inside)
    for node in stretch:
        if node not in inside and any(source in inside for source in node.all_input_nodes):
            raise Blocked(node, axis, CannotCut("it is needed whole, but made from values that are cut"))
    inputs = dict.fromkeys(source for node in body for source in walk.needs[node] if source not in inside)
    return Region(
        body=body,
        axes={node: walk.axes[node] for node in body},
        outputs=outputs,
        needs={node: walk.needs[node] for node in body},
        inputs=tuple(inputs),
    )


def _cut_output(walk: _Walk, node: fx.Node, size: int) -> None:
    """Cut a further output along an axis on which it agrees with what is cut already."""
    for axis in axes_of(node):
        try:
            needs = walk.needs_of(node, axis)
        except CannotCut:
            continue
        asked = {source: need for source, need in needs.items() if source in walk.members and source not in walk.whole}
        agrees = all(
            need is not None and walk.axes.get(source, need.axis) == need.axis for source, need in asked.items()
        )
        if agrees and (axis.size == size or any(source in walk.axes for source in asked)):
            walk.cut(node, axis)
            return
    walk.keep_whole(node)


def finer_axes(seed: Axis, blocked: Blocked) -> list[Axis]:
    """The seed's axes that cut only a factor of its positions, as the operation that blocked the walk suggests.

    `(batch height width)` cannot be cut where it becomes `(batch, height width)`; `batch` or `height width` alone can.
    """
    if seed.size != blocked.axis.size:
        return []
    found = []
    for finer in blocked.alternatives:
        outer, inner = finer.outer // blocked.axis.outer, finer.inner // blocked.axis.inner
        if finer.dim == blocked.axis.dim and outer * finer.size * inner == seed.size and 1 < finer.size < seed.size:
            found.append(Axis(seed.dim, finer.size, seed.outer * outer, inner * seed.inner))
    return found


def axes_of(node: fx.Node) -> list[Axis]:
    """Every whole dimension of a value that has more than one position, outermost first."""
    tensors = tensors_of(node)
    if not _alike(tensors):
        return []
    return [Axis(dim, size) for dim, size in enumerate(tensors[0].shape) if isinstance(size, int) and size > 1]  # type: ignore[redundant-expr]


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether there are tensors, all of one shape; sizes may be symbolic."""
    return len({str(tensor.shape) for tensor in tensors}) == 1


def row_axis(node: fx.Node) -> Axis | None:
    """The rows of an image or video, or the tokens of a sequence: the last dimension but one; None where there is none.

    Of the moments of rows it is the first (`norm_stats`).
    """
    tensors = tensors_of(node)
    if not _alike(tensors) or tensors[0].dim() < 3:
        return None
    dim = 0 if node.target is torch.ops.lightcache.row_moments.default else tensors[0].dim() - 2
    return next((axis for axis in axes_of(node) if axis.dim == dim), None)


def ranges_of(region: Region, index: int, count: int) -> dict[fx.Node, tuple[int, int]]:
    """For one chunk, the positions of each value of the body that must be computed, halos included."""
    ranges: dict[fx.Node, tuple[int, int]] = {}
    outputs = set(region.outputs)
    for node in reversed(region.body):
        if node in outputs:
            _widen(ranges, node, region.bounds(index, count, node))
        start, stop = ranges[node]
        for source, need in region.needs[node].items():
            if need is not None and source in region.axes:
                _widen(ranges, source, need.reach.of(start, stop, need.axis.size))
    for node in region.body:  # one of several results is not narrowed before it is taken out
        if node.target is operator.getitem:
            ranges[node] = ranges[node.all_input_nodes[0]]
    return ranges


Reads = Mapping[tuple[fx.Node, Axis | None], tuple[int, int]]
"""Ranges of inputs of a region by input and axis; the axis of one that is read whole is None."""


def reads_of(region: Region, ranges: Mapping[fx.Node, tuple[int, int]]) -> Reads:
    """Which slices of the inputs a chunk reads; one that is read along two axes, or also whole, is read so often."""
    reads: dict[tuple[fx.Node, Axis | None], tuple[int, int]] = {}
    for node in region.body:
        for source, need in region.needs[node].items():
            if source in region.axes:
                continue
            if need is None:
                reads[source, None] = (0, 0)
                continue
            low, high = need.reach.of(*ranges[node], need.axis.size)
            known = reads.get((source, need.axis), (low, high))
            reads[source, need.axis] = (min(low, known[0]), max(high, known[1]))
    return reads


def _widen(ranges: dict[fx.Node, tuple[int, int]], node: fx.Node, wanted: tuple[int, int]) -> None:
    start, stop = ranges.get(node, wanted)
    ranges[node] = (min(start, wanted[0]), max(stop, wanted[1]))


def full_value(node: fx.Node) -> torch.Tensor:
    """The one (fake) tensor that a node makes."""
    (tensor,) = tensors_of(node)
    return tensor
