"""Which large values are kept, and which are computed again for each pass over them (`passes/recompute_values`).

A value that can be computed in strips need not exist as a whole: every pass can compute its strips again from what is
kept. What is left of the memory is what is kept; what it costs is that a chain is computed once for each pass that
reads any of its links. This is gradient checkpointing's trade (Chen et al. 2016) in inference, where GroupNorms, which
need all of a value before any of the next, take the place of the backward pass.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from lightcache_fx.axis_rules import CannotCut, needs_of
from lightcache_fx.chunk_memory import Memory
from lightcache_fx.graphs import layout_of, module_path, output_node, storage_root
from lightcache_fx.passes.recompute_values import links, passes_over
from lightcache_fx.regions import row_axis

_SHARES = (0.95, 0.8, 0.6)
"""Shares of the budget for what is kept; the rest is for strips."""
_LARGE = 1 / 128
"""Values below this share of the budget are kept."""
_NEARLY = 1.02
"""What is kept at least may be exceeded by so much where that computes less again."""
_MOST_ALONE = 256
"""So many values are decided about one by one; of more, those of blocks that are alike are decided about together."""
_MOST_CALLS = 10_000
"""A program of more calls than this, most of them computed again, is not made."""
_LEVELS = 2
"""So many largest sizes of what is kept are tried."""


def recomputations(memory: Memory, budget: int) -> Iterator[tuple[str, ...]]:
    """Sets of values, by name, that are to be computed again, the cheapest first, for a graph that is not chunked yet.

    The last is the one that keeps least, if the budget leaves no room for a cheaper one. Sets with which the program
    would be too long are left out.
    """
    values = Values.of(memory, int(_LARGE * budget))
    sizes = sorted({values.sizes[root] for root in values.streamable}, reverse=True)
    levels = [{root for root in values.streamable if values.sizes[root] > size} for size in (*sizes[1:], 0)]
    found: list[frozenset[fx.Node]] = []
    for share in _SHARES:
        room = int(share * budget)
        fitting = (level for level in levels if values.kept_peak(level) <= room)
        refined = [values.keep_what_saves(level, room) for level in itertools.islice(fitting, _LEVELS)]
        found += [frozenset(streamed) for streamed in sorted(refined, key=values.seconds)[:1]]
    least = values.kept_peak(values.streamable)
    found += [frozenset(level) for level in levels if values.kept_peak(level) <= _NEARLY * least][:1]
    for streamed in dict.fromkeys(found):
        if streamed and values.num_calls(streamed) <= max(_MOST_CALLS, len(memory.order)):
            yield tuple(node.name for node in memory.order if values.root[node] in streamed)


@dataclass
class Values:
    """A graph as values that are kept or streamed; views count as their storage.

    Attributes:
        memory: of the graph.
        root: for each call, the call that made its storage.
        sizes: bytes of each root.
        streamable: roots that are large and can be computed in strips, as all of their views can.
    """

    memory: Memory
    root: dict[fx.Node, fx.Node]
    sizes: dict[fx.Node, int]
    streamable: set[fx.Node]

    @classmethod
    def of(cls, memory: Memory, least: int) -> Values:
        """Those of a graph; values of up to `least` bytes are always kept."""
        root = {node: storage_root(node) for node in memory.order}
        sizes = {node: memory.size[node] for node in memory.order if root[node] is node}
        returned = {storage_root(node) for node in output_node(memory.graph).all_input_nodes}
        streamable = {node for node, size in sizes.items() if size > least and node not in returned}
        streamable -= {root[node] for node in memory.order if root[node] in streamable and not _in_strips(node)}
        return cls(memory, root, sizes, streamable)

    @cached_property
    def reads(self) -> dict[fx.Node, list[fx.Node]]:
        """For each call and the output, the roots of what it reads; a view of an input has none."""
        readers = (*self.memory.order, output_node(self.memory.graph))
        roots = {node: root for node, root in self.root.items() if root in self.sizes}
        return {node: [roots[source] for source in node.all_input_nodes if source in roots] for node in readers}

    @cached_property
    def layouts(self) -> dict[fx.Node, int]:
        """For each root a number, the same for values of one layout."""
        numbers: dict[Hashable, int] = {}
        return {node: numbers.setdefault(layout_of(node), len(numbers)) for node in self.sizes}

    def kept_peak(self, streamed: set[fx.Node]) -> int:
        """The most bytes that are kept at once: each as long as it, or what is made from it again, is read."""
        order, place, layouts = self.memory.order, self.memory.place, self.layouts
        until = dict.fromkeys(self.sizes, -1)  # the last call for which a value is there
        until.update(dict.fromkeys(self.reads[output_node(self.memory.graph)], len(order)))
        for node in reversed(order):
            root = self.root[node]
            at = until[root] if root in streamed else place[node]
            for source in self.reads[node]:
                if until[source] < at:
                    until[source] = at
        kept = [node for node in order if node in self.sizes and node not in streamed and until[node] >= 0]
        dying: dict[tuple[int, int], int] = {}  # how many values of a layout a call reads for the last time
        for node in kept:
            key = until[node], layouts[node]
            dying[key] = dying.get(key, 0) + 1
        changes = [0] * (len(order) + 2)
        for node in kept:
            key = place[node], layouts[node]
            over = node in self.streamable and dying.get(key, 0) > 0  # written in strips over one that dies then
            dying[key] = dying.get(key, 0) - over
            changes[place[node] + over] += self.sizes[node]
            changes[until[node] + 1] -= self.sizes[node]
        return max(itertools.accumulate(changes))

    def seconds(self, streamed: Collection[fx.Node]) -> float:
        """Predicted time of all calls, each as often as it is made."""
        return math.fsum(self.memory.seconds[node] for node in self._calls(streamed))  # in whatever order sets come

    def num_calls(self, streamed: Collection[fx.Node]) -> int:
        """How many calls there are then."""
        return len(self._calls(streamed))

    def _calls(self, streamed: Collection[fx.Node]) -> list[fx.Node]:
        """All calls, each as often as it is made."""
        calls = {node for node in self.memory.order if self.root[node] in streamed}
        made = (
            {node for reader in readers for node in links(reader, calls)}
            for readers in passes_over(self.memory.graph, calls, num_bytes=self.memory.size.__getitem__)
        )
        again = [node for chain in made for node in chain]
        return [node for node in self.memory.order if node not in calls] + again

    def keep_what_saves(self, streamed: set[fx.Node], room: int) -> set[fx.Node]:
        """Keep what saves most time as long as there is room (greedily, what saved little before is asked last)."""
        streamed = set(streamed)
        now = self.seconds(streamed)
        place = self.memory.place
        units = self._units(streamed)
        queue = [(-math.inf, -place[unit[-1]], unit) for unit in units]
        heapq.heapify(queue)
        while queue:
            _, order, unit = heapq.heappop(queue)
            if self.kept_peak(streamed.difference(unit)) > room:
                continue
            saved = now - self.seconds(streamed.difference(unit))
            if queue and -saved > queue[0][0]:
                heapq.heappush(queue, (-saved, order, unit))
            elif saved > 0:
                streamed.difference_update(unit)
                now -= saved
        return streamed

    def _units(self, streamed: set[fx.Node]) -> list[list[fx.Node]]:
        """What is kept or streamed together: each value by itself or, of very many, those of blocks that are alike.

        Values are asked one by one, each time with all calls of the graph, which takes the square of their number.
        """
        ordered = sorted(streamed, key=self.memory.place.__getitem__)
        if len(ordered) <= _MOST_ALONE:
            return [[root] for root in ordered]
        alike: dict[Hashable, list[fx.Node]] = {}
        for root in ordered:
            place = re.sub(r"\d+", "#", module_path(root))
            alike.setdefault((place, root.target, layout_of(root)), []).append(root)
        return list(alike.values())


def _in_strips(node: fx.Node) -> bool:
    """Whether a call can be computed in strips of rows."""
    axis = row_axis(node)
    if axis is None:
        return False
    try:
        needs_of(node, axis)
    except CannotCut:
        return False
    return True
