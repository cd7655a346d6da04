"""The full steps that cost least: dynamic programming over a table of what each reuse would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_schedules(costs: Sequence[Sequence[float]], most_reused: int) -> dict[int, tuple[int, ...]]:
    """For each number of full steps, those whose reuse steps cost least in all.

    The steps from one full step to the next are a segment, whose cost is the sum over its reuse steps of what taking
    the segment's first value there costs. The cheapest partition into `k` segments that ends at a step extends the
    cheapest one into `k - 1` that ends before (Bellman 1961, for segments).

    Args:
        costs: `costs[i][j]` of reusing at step `j` what step `i` computed, for `i < j`; the rest is not read.
        most_reused: the most reuse steps in a row.

    Returns:
        by their number, the indices of the full steps in ascending order, the first of which is 0. Numbers of full
        steps that `most_reused` does not allow are left out.
    """
    num_steps = len(costs)
    longest = most_reused + 1
    segments = [[0.0] * (num_steps + 1) for _ in range(num_steps)]  # of steps i .. j - 1, the first of them full
    for i in range(num_steps):
        for j in range(i + 2, min(i + longest, num_steps) + 1):
            segments[i][j] = segments[i][j - 1] + costs[i][j - 1]
    best = [0.0] + [math.inf] * num_steps  # of the first j steps, in so many segments as the loop has made
    came_from: list[list[int]] = []
    found: dict[int, tuple[int, ...]] = {}
    for count in range(1, num_steps + 1):
        after, origin = [math.inf] * (num_steps + 1), [-1] * (num_steps + 1)
        for j in range(count, num_steps + 1):
            for i in range(max(count - 1, j - longest), j):
                total = best[i] + segments[i][j]
                if total < after[j]:
                    after[j], origin[j] = total, i
        best = after
        came_from.append(origin)
        if best[num_steps] < math.inf:
            found[count] = _steps(came_from, num_steps)
    return found


def _steps(came_from: Sequence[Sequence[int]], num_steps: int) -> tuple[int, ...]:
    found, j = [], num_steps
    for origin in reversed(came_from):
        j = origin[j]
        found.append(j)
    return tuple(reversed(found))
