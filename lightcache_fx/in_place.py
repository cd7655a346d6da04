"""Outputs of a region that are written where an input was: chunk after chunk reads the one for the last time.

Without this, what a region reads and what it makes stand side by side while it runs: three values of full size in the
second half of a residual block, where two will do. Where later chunks' halos still read the positions that a chunk
makes, its part waits until they have.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lightcache_fx.graphs import is_mark, is_view
from lightcache_fx.regions import Region, ranges_of, reads_of

_DELAYS = (0, 1)


@dataclass(frozen=True)
class Overwrite:
    """Output number `output` is written over input number `input`, each part `delay` chunks after it was computed."""

    output: int
    input: int
    delay: int = 0


def overwrites(
    region: Region, count: int, candidates: Sequence[tuple[int, int]], indices: Iterable[int]
) -> tuple[Overwrite, ...]:
    """Which outputs can be written over which inputs so that no chunk reads what is written already.

    Args:
        region: to be run in `count` chunks.
        count: number of chunks.
        candidates: pairs of output and input of one layout, the input read by nobody after the region.
        indices: the chunks that are looked at: all of them, to be sure.
    """
    if not candidates:
        return ()
    reads = {index: reads_of(region, ranges_of(region, index, count)) for index in indices}
    found: dict[int, Overwrite] = {}
    for delay, (output, source) in itertools.product(_DELAYS, candidates):
        if output in found or any(known.input == source for known in found.values()):
            continue
        node = region.outputs[output]
        if all(
            axis == region.axes[node] and low >= _written(region, count, node, index - delay)
            for index, ranges in reads.items()
            for (value, axis), (low, _) in ranges.items()
            if value is region.inputs[source]
        ):
            found[output] = Overwrite(output, source, delay)
    return tuple(found[output] for output in sorted(found))


def _written(region: Region, count: int, output: fx.Node, chunks: int) -> int:
    """How many positions of an output the first `chunks` chunks make."""
    return region.bounds(chunks, count, output)[0] if chunks > 0 else 0


def allocated_by(node: fx.Node) -> fx.Node:
    """The node whose storage a value may live in, by the operators' own alias annotations."""
    while _may_share(node):
        node = node.all_input_nodes[0]
    return node


def _may_share(node: fx.Node) -> bool:
    """Whether a value may live in the storage of what it is made from; of several results each has its own."""
    if node.target is operator.getitem:
        return _may_share(node.all_input_nodes[0])
    return is_mark(node) or (node.op == "call_function" and is_view(node))


def why_not(source: fx.Node, region: Region, place: Mapping[fx.Node, int], last: int) -> str:
    """Why an input of a region must not be written over, by the operators' alias annotations; empty if it may be.

    Args:
        source: the input.
        region: reads it.
        place: of every node of the graph.
        last: the place of the last call of the region's stretch.
    """
    root = allocated_by(source)
    if root.op in ("placeholder", "get_attr"):
        return "it may be the caller's"
    sharing = [root]
    for node in sharing:  # grows as it goes
        sharing += [user for user in node.users if _may_share(user) and user.all_input_nodes[0] is node]
    users = [user for node in sharing for user in node.users if user not in region.axes]
    if any(user.op == "output" or place[user] > last for user in users):
        return "it is read later"
    if any(node in sharing for node in region.inputs if node is not source):
        return "the region reads it as another input too"
    return ""


def laid_out_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the one can stand where the other is, every stride included."""
    layouts = [(value.shape, value.stride(), value.dtype, value.device) for value in (one, other)]
    return layouts[0] == layouts[1]
