"""The search for a region around one peak: stretches that begin and end where little is live, along every axis.

Distances double: near the peak the choice is fine, far from it coarse, up to the whole program (frame by frame, say).
The search is AutoChunk's (Zhao et al. 2024) with halos and factors of dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Chosen, Memory, Stretch, profile
from lightcache_fx.chunk_trials import chunk_seconds, estimated, exactly, fits_in_bodies
from lightcache_fx.chunked import build_region, copied_bytes
from lightcache_fx.regions import Blocked, axes_of, finer_axes, ranges_of, trace_region

if TYPE_CHECKING:
    from lightcache_fx.chunk_planner import ChunkPlan

PlanBody = Callable[[fx.Graph, int], "ChunkPlan"]

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_NEAR = 3
_NESTED_TRIES = 1
_TRIES = 6
_PASS_TRIES = 3
"""Of passes, whose bodies are long, fewer are looked at exactly."""
_SMALLER = 8
"""Every other of so many larger numbers of chunks is looked at for a faster one."""
_SAME = 0.01
"""Times that differ by less, as a share of what the region takes uncut, are the same: then fewer chunks are better.

So are peaks where none fits, as a share of the peak. Prices are rough; and the last chunk to be halved is one position,
which oneDNN and GroupNorm round otherwise than two.
"""
_ENOUGH = 3
"""So many stretches that fit end the search for longer ones."""
_COARSE = 4
"""Where no number of chunks can fit, one of so many is looked at."""


class Search:
    """Regions around one peak, in a graph where some have been chosen already."""

    def __init__(
        self,
        memory: Memory,
        chosen: Sequence[Chosen],
        item: fx.Node | Chosen,
        at: int,
        budget: int,
        plan_body: PlanBody | None,
    ) -> None:
        self.memory, self.at, self.budget, self.plan_body = memory, at, budget, plan_body
        whole = profile(memory, chosen)
        self.peak = whole.during[whole.items.index(item)]
        self.before = dict(zip(whole.items, whole.before, strict=True))
        """Bytes live before each call and each region."""
        self.taken: dict[int, Chosen] = {i: region for region in chosen for i in range(region.begin, region.end + 1)}
        """The calls that are in a region; a new region holds such a region altogether or not at all."""
        self._lowest: list[int] = []
        """The least that candidates reach so far, as many as will be looked at exactly, rising."""

    def may_begin(self, index: int) -> bool:
        """Whether a region may begin with a call."""
        return index >= 0 and (index not in self.taken or self.taken[index].begin == index)

    def may_end(self, index: int) -> bool:
        """Whether a region may end with a call."""
        return index < len(self.memory.order) and (index not in self.taken or self.taken[index].end == index)

    def best(self) -> Chosen | None:
        """The fastest region that fits the budget, else the one that lowers the peak most."""
        passes = list(self.passes())
        return self.best_pass(passes) if passes else self.best_of_all()

    def passes(self) -> Iterator[tuple[int, int, Axis]]:
        """Where values are computed again: stretches around the peak from what is kept to what is kept next."""
        order = [None, *self.memory.order, None]
        streamed = [node is not None and "lightcache_streamed" in node.meta for node in order]
        begins = [i for i in range(self.at, -1, -1) if streamed[i + 1] and not streamed[i]]
        ends = [i for i in range(self.at, len(order) - 2) if streamed[i] and not streamed[i + 1]]
        if not (streamed[self.at] or streamed[self.at + 1]):
            return
        stretches = itertools.product(filter(self.may_begin, begins[:_NEAR]), filter(self.may_end, ends[:_NEAR]))
        for begin, end in sorted(stretches, key=lambda pair: pair[1] - pair[0]):
            for axis in axes_of(self.memory.leaving(begin, end)[-1]):
                yield begin, end, axis

    def best_pass(self, passes: Iterable[tuple[int, int, Axis]]) -> Chosen | None:
        """The shortest that fits the budget, the fastest of its axes, else the one that lowers the peak most."""
        found = []
        for _, along in itertools.groupby(passes, key=lambda entry: entry[:2]):
            fitting = []
            for begin, end, axis in along:
                try:
                    sized = self.sized(self.stretch(begin, end, axis))
                except Blocked:
                    continue
                if sized is not None:
                    exact = self.fitted(sized[0].stretch, sized[0].count)
                    fitting += [exact] if exact is not None else []
                    found.append(sized)
            if fitting:
                return min(fitting, key=lambda candidate: candidate.seconds)
        lowest = sorted(found, key=lambda entry: entry[1])[:_PASS_TRIES]
        lowering = [entry for entry in (self.exactly(c) for c, _ in lowest) if entry[1] < 0.99 * self.peak]
        return min(lowering, key=lambda entry: entry[1])[0] if lowering else None

    def best_of_all(self) -> Chosen | None:
        """Of every stretch around the peak, along every axis."""
        found = list(self.candidates())
        fitting = sorted((c for c, reached in found if reached <= self.budget), key=lambda c: c.seconds)
        for candidate in fitting:
            exact = self.fitted(candidate.stretch, candidate.count)
            if exact is not None:
                return exact
        lowering = sorted(found, key=lambda entry: (entry[1], entry[0].seconds))
        exactly = [self.exactly(candidate) for candidate, _ in lowering[:_TRIES]]
        exactly = sorted((e for e in exactly if e[1] < 0.99 * self.peak), key=lambda entry: entry[1])
        nested = [self.nested(exact, reached) for exact, reached in exactly[:_NESTED_TRIES]]
        return min([*exactly, *nested], key=lambda entry: entry[1])[0] if exactly else None

    def nested(self, candidate: Chosen, reached: int) -> tuple[Chosen, int]:
        """A region whose chunks are too large by themselves, their bodies cut in turn to what is left of the budget."""
        beside = reached - candidate.body_peak
        if self.plan_body is None or beside >= self.budget or not _one_by_one(candidate):
            return candidate, reached
        candidates, rounding = candidate.stretch.replaceable, self.memory.timeline.rounding
        module = build_region(candidate.region, candidate.count, {}, candidates=candidates, rounding=rounding)
        waiting = max(module.waiting_bytes(index, rounding) for index in range(len(module.bodies)))
        bodies, peak, added = [], 0, 0.0
        for index in range(len(module.bodies)):
            graph = module.body(index).graph
            held = copied_bytes(graph) + waiting
            plan = self.plan_body(graph, self.budget - beside - held)
            bodies.append(plan.chunking)
            peak = max(peak, plan.peak_after + held)
            added = max(added, plan.seconds_added)
        if peak >= 0.99 * candidate.body_peak:
            return candidate, reached
        seconds = candidate.seconds + candidate.count * added
        exact = replace(candidate, body_peak=peak, seconds=seconds, bodies=tuple(bodies))
        return exact, beside + peak

    def stretch(self, begin: int, end: int, axis: Axis) -> Stretch:
        """The region of a stretch; raises `Blocked` where there is none."""
        memory = self.memory
        wanted = memory.leaving(begin, end)
        region = trace_region(memory.order[begin : end + 1], axis, needs_of=memory.needs_of, wanted=wanted)
        return Stretch(memory, region, begin, end)

    def fitted(self, stretch: Stretch, least: int = 2) -> Chosen | None:
        """The region that fits by its bodies' own liveness, in the fewest chunks or faster ones; None if none does."""
        counts = iter([count for count in self.counts(stretch) if count >= least])
        for count in counts:
            trial, reached = self.estimate(stretch, count)
            if reached <= self.budget:
                trial, reached = self.exactly(trial)
                if reached <= self.budget:
                    fastest, _ = self.fastest((trial, reached), counts)
                    if fastest is trial:
                        return trial
                    exact, reached = self.exactly(fastest)
                    return exact if reached <= self.budget else trial
        return None

    def exactly(self, candidate: Chosen) -> tuple[Chosen, int]:
        """A candidate with its bodies' own peak and its time, and the highest that its stretch reaches."""
        exact = exactly(candidate)
        return exact, self.reached(exact)

    def candidates(self) -> Iterator[tuple[Chosen, int]]:
        """Regions around the peak, each with the highest that its stretch then reaches."""
        last = len(self.memory.order)
        self._lowest = []
        begins = self.narrow_points(filter(self.may_begin, range(self.at, -1, -1)), self.live_before)
        ends = self.narrow_points(filter(self.may_end, range(self.at, last)), lambda index: self.live_before(index + 1))
        fits = 0
        for end in ends:
            if not self.helps(self.live_before(end + 1)):
                continue
            outputs = self.memory.leaving(self.at, end)
            queue = axes_of(outputs[-1]) if outputs else []
            tried: set[Axis] = set()
            fits_here = 0
            while queue:
                axis = queue.pop(0)
                if axis not in tried:
                    tried.add(axis)
                    for found, reached in self.along(begins, end, axis, queue):
                        fits_here += reached <= self.budget
                        yield found, reached
            fits += fits_here > 0
            if fits >= _ENOUGH:
                return

    def along(self, begins: Sequence[int], end: int, axis: Axis, queue: list[Axis]) -> Iterator[tuple[Chosen, int]]:
        """Regions that end at `end`, from the shortest to the longest that the rules allow."""
        memory, fits = self.memory, 0
        for begin in begins:
            if fits >= _ENOUGH or self.live_before(begin) >= 0.99 * self.peak:
                return
            if not self.helps(self.live_before(begin)):
                continue
            try:
                stretch = self.stretch(begin, end, axis)
            except Blocked as blocked:
                queue += finer_axes(axis, blocked)
                if memory.place[blocked.node] <= self.at:
                    return
                continue
            found = self.sized(stretch)
            if found is not None:
                fits += found[1] <= self.budget
                self._lowest = sorted([*self._lowest, found[1]])[:_TRIES]
                yield found

    def helps(self, reached: int) -> bool:
        """Whether a candidate that reaches so much may fit, or is among those that lower the peak most so far."""
        worth = self._lowest[-1] if len(self._lowest) == _TRIES else 0.99 * self.peak
        return reached <= max(self.budget, worth)

    def estimate(self, stretch: Stretch, count: int) -> tuple[Chosen, int]:
        """A region in `count` chunks, its time left open, and the highest that its stretch then reaches."""
        trial = estimated(stretch, count)
        return trial, self.reached(trial)

    def reached(self, candidate: Chosen) -> int:
        """The most that is live within a region's stretch."""
        return candidate.stretch.reached(candidate, self.live_before(candidate.begin))

    def sized(self, stretch: Stretch) -> tuple[Chosen, int] | None:
        """The fewest chunks that fit the budget, or faster ones, or else of a few numbers what lowers the peak most."""
        counts = self.counts(stretch)
        if not counts:
            return None
        first, _ = self.estimate(stretch, counts[0])
        beside = self.reached(replace(first, body_peak=0))  # in more chunks it is never less
        if not self.helps(beside):
            return None
        rest = iter(counts if beside <= self.budget else [*counts[:-1:_COARSE], counts[-1]])
        tried: list[tuple[Chosen, int]] = []
        for count in rest:
            tried.append(self.estimate(stretch, count))
            if tried[-1][1] <= self.budget:
                break
        lowest = min(reached for _, reached in tried)
        if lowest >= 0.99 * self.peak:
            return None
        enough = lowest if lowest <= self.budget else lowest + _SAME * self.peak
        trial, reached = next(entry for entry in tried if entry[1] <= enough)
        return self.fastest((replace(trial, seconds=chunk_seconds(trial)), reached), rest)

    def counts(self, stretch: Stretch) -> list[int]:
        """The numbers of chunks that are looked at, rising."""
        counts = stretch.region.counts(_COUNTS)
        while counts and not fits_in_bodies(stretch, counts[-1]):
            counts.pop()
        return counts

    def fastest(self, fewest: tuple[Chosen, int], counts: Iterable[int]) -> tuple[Chosen, int]:
        """Of a region in the fewest chunks that fit and in more, the fewest that take the least time: caches may help.

        Args:
            fewest: the region with its time, and the highest that its stretch reaches.
            counts: larger numbers of chunks, rising.
        """
        stretch = fewest[0].stretch
        larger = list(itertools.islice(counts, _SMALLER))
        tried = {fewest[0].count: fewest}

        def best() -> tuple[Chosen, int]:
            least = min(candidate.seconds for candidate, _ in tried.values())
            return next(tried[n] for n in sorted(tried) if tried[n][0].seconds <= least + _SAME * stretch.seconds)

        def attempt(count: int) -> None:
            trial, reached = self.estimate(stretch, count)
            if reached <= self.budget:
                tried[count] = replace(trial, seconds=chunk_seconds(trial)), reached

        for count in larger[1::2]:
            attempt(count)
        for skipped, chosen in itertools.pairwise(larger):
            if chosen == best()[0].count and skipped not in tried:
                attempt(skipped)
                break
        return best()

    def live_before(self, index: int) -> int:
        """Bytes live before a call, or before the region that it is in; 0 behind the last."""
        if index >= len(self.memory.order):
            return 0
        return self.before[self.taken[index] if index in self.taken else self.memory.order[index]]

    def narrow_points(self, indices: Iterable[int], live: Callable[[int], int]) -> list[int]:
        """Where least is live, once for each doubling of the distance, and the nearest few."""
        points: list[int] = []
        group: list[int] = []
        limit = 1
        for distance, index in enumerate(indices):
            if distance >= limit:
                points.append(min(group, key=live))
                group, limit = [], limit * 2
            group.append(index)
        return [*points, min(group, key=live)] if group else points


def _one_by_one(candidate: Chosen) -> bool:
    """Whether each chunk is one position, of every value, so that nothing is computed twice: images, frames, heads."""
    ranges = ranges_of(candidate.region, candidate.count // 2, candidate.count)
    return all(stop - start == 1 for start, stop in ranges.values())
