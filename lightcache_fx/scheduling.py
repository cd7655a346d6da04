"""The full steps that cost least: dynamic programming over what each reuse would cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

Cost = Callable[[int | None, int, int], float]
"""Of reusing at a step what a full step before it computed: the full step before that one, if any, it, and the step."""


def best_schedules(cost: Cost, num_steps: int, most_reused: int) -> dict[int, tuple[int, ...]]:
    """For each number of full steps, those whose reuse steps cost least in all.

    The steps from one full step to the next are a segment, whose cost is the sum over its reuse steps. The cheapest
    partition into `k` segments that ends with one of them extends the cheapest one into `k - 1` (Bellman 1961, for
    segments), each ending with a certain one, because a cost may depend on the full step before: what is extrapolated
    is from two.

    Args:
        cost: asked only for steps that `most_reused` allows.
        num_steps: of a run.
        most_reused: the most reuse steps in a row.

    Returns:
        by their number, the indices of the full steps in ascending order, the first of which is 0. Numbers of full
        steps that `most_reused` does not allow are left out.
    """
    longest = most_reused + 1

    @cache
    def segment(before: int | None, begin: int, end: int) -> float:
        """Of the steps from a full one to the last before `end`."""
        return 0.0 if end == begin + 1 else segment(before, begin, end - 1) + cost(before, begin, end - 1)

    # By the last segment's begin and end, of the steps up to there, in so many segments as the loop has made.
    best = {(0, end): segment(None, 0, end) for end in range(1, min(longest, num_steps) + 1)}
    came_from: list[dict[tuple[int, int], int]] = []
    found: dict[int, tuple[int, ...]] = {}
    for count in range(1, num_steps + 1):
        complete = [last for last in best if last[1] == num_steps]
        if complete:
            found[count] = _steps(min(complete, key=best.__getitem__), came_from)
        after: dict[tuple[int, int], float] = {}
        origin: dict[tuple[int, int], int] = {}
        for (begin, end), total in best.items():
            for until in range(end + 1, min(end + longest, num_steps) + 1):
                more = total + segment(begin, end, until)
                if (end, until) not in after or more < after[end, until]:
                    after[end, until], origin[end, until] = more, begin
        best = after
        came_from.append(origin)
    return found


def _steps(last: tuple[int, int], came_from: list[dict[tuple[int, int], int]]) -> tuple[int, ...]:
    """The begins of all segments up to `last`."""
    begin, end = last
    found = [begin]
    for origin in reversed(came_from):
        begin, end = origin[begin, end], begin
        found.append(begin)
    return tuple(reversed(found))
