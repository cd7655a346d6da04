"""Which of many ways are the best of their speed, each tried on no more inputs than it takes to tell.

A race (as F-Race of Birattari et al., *A racing algorithm for configuring metaheuristics*, 2002, by differences of
pairs): all ways are tried on one input after another, and one that another way beats, which is at least as fast, drops
out. So inputs are spent on ways that are hard to tell apart.

What a way is worth is its interquartile mean, which one input that goes astray does not move and which needs fewer
inputs than a median (Agarwal et al., *Deep reinforcement learning at the edge of the statistical precipice*, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

_TRIED_FIRST = 3
"""Inputs on which every way is tried."""
_SURE = 2.0
"""Standard errors that a way is behind by when it drops out."""


def race(speeds: Sequence[float], score: Callable[[int, int], float], num_inputs: int) -> dict[int, list[float]]:
    """The ways that are not beaten, by number: the score of each on every input.

    Args:
        speeds: of each way.
        score: of a way on an input, by their numbers; the higher, the better.
        num_inputs: how many there are.
    """
    scores: dict[int, list[float]] = {way: [] for way in range(len(speeds))}
    for place in range(num_inputs):
        for way, found in scores.items():
            found.append(score(way, place))
        if _TRIED_FIRST <= place + 1 < num_inputs:
            scores = {way: found for way, found in scores.items() if not _is_beaten(way, scores, speeds)}
    return scores


def _is_beaten(way: int, scores: dict[int, list[float]], speeds: Sequence[float]) -> bool:
    """Whether another way is surely better and not slower."""
    return any(speeds[other] >= speeds[way] and _is_better(scores[other], scores[way]) for other in scores)


def _is_better(some: Sequence[float], others: Sequence[float]) -> bool:
    leads = np.subtract(some, others)
    return bool(leads.mean() > _SURE * leads.std(ddof=1) / math.sqrt(len(leads)))


def interquartile_mean(values: Sequence[float]) -> float:
    """Of the middle half of some values: the mean of those that are left when a quarter is cut off at either end."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return float(np.mean(ordered[cut : len(ordered) - cut]))
