"""Workloads to plan: drawn ones, and small ones to compute by hand; runs that are interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import lightcache_fx as lc
from lightcache_fx.errors import BudgetError
from lightcache_fx.swapping import SwapSchedule
from lightcache_fx.transfers import ThreadEngine
from lightcache_fx.workload import Link, Movable, Op, Stay, Step, Workload

SLOW = Link(1.0, 1.0, 0.0)
"""A byte a second."""


def small_weights(model: nn.Module, swap: SwapSchedule) -> int:
    """Bytes of the weights that never leave the device, which no run allocates."""
    return sum(weight.nbytes for name, weight in model.named_parameters() if name not in swap.weights)


def least_budget(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> int:
    """The fewest bytes that swapping keeps to; the settings are those of the policy beside."""
    with pytest.raises(BudgetError) as refused:
        lc.plan(model, kwargs=inputs, policy=lc.Policy(swap=lc.Swap(budget=1), **settings))
    assert refused.value.reached is not None
    return refused.value.reached


def workload(*steps: str, sizes: dict[str, int], cyclic: bool = True) -> Workload:
    """Steps as text, a call a line: `name seconds live reads writes`, names joined by commas, `-` for none.

    What begins with `s` is a slot.
    """

    def names(text: str) -> tuple[str, ...]:
        return () if text == "-" else tuple(text.split(","))

    def call(line: str) -> Op:
        name, seconds, live, reads, writes = line.split()
        return Op(name, float(seconds), int(live), names(reads), names(writes))

    movables = {k: Movable(k, size, "slot" if k.startswith("s") else "weight") for k, size in sizes.items()}
    found = tuple(Step(f"p{i}", tuple(map(call, text.strip().splitlines()))) for i, text in enumerate(steps))
    return Workload(found, movables, cyclic)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    total, cyclic = sum(counts), draw(st.booleans())
    sizes = st.integers(1, 9)
    movables = {f"w{i}": Movable(f"w{i}", draw(sizes)) for i in range(draw(st.integers(1, 5)))}
    reads: list[list[str]] = [[] for _ in range(total)]
    writes: list[list[str]] = [[] for _ in range(total)]
    places = st.sets(st.integers(0, total - 1), max_size=4)
    for name in list(movables):
        for index in draw(places):
            reads[index].append(name)
    for number in range(draw(st.integers(0, 2))):
        slot = Movable(f"s{number}", draw(sizes), "slot")
        movables[slot.name] = slot
        made = draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=2))
        for index in made:
            writes[index].append(slot.name)
        for index in draw(places) - made:
            if cyclic or index > min(made):
                reads[index].append(slot.name)
    ops = [
        Op(f"op{i}", float(draw(st.integers(0, 5))), draw(st.integers(0, 6)), tuple(reads[i]), tuple(writes[i]))
        for i in range(total)
    ]
    steps, begin = [], 0
    for number, count in enumerate(counts):
        steps.append(Step(f"p{number}", tuple(ops[begin : begin + count])))
        begin += count
    return Workload(tuple(steps), movables, cyclic)


rates = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 8.0])
links = st.builds(Link, rates, rates, st.sampled_from([0.0, 0.5]))


def covers(stay: Stay, index: int, count: int, *, since: int | None = None) -> bool:
    """Whether a stay has a call of the period in it, from `since` on."""
    begin = stay.begin if since is None else since
    return any(begin <= index + turn * count <= stay.end for turn in (0, 1))


@contextmanager
def interrupted_at(wait: int) -> Iterator[None]:
    """Ctrl-C in the place of the so-manieth wait for a copy; what is run inside must be stopped by it."""
    waits, original = itertools.count(), ThreadEngine.wait

    def interrupted(self: ThreadEngine, arriving: torch.Tensor) -> None:
        if next(waits) == wait:
            raise KeyboardInterrupt
        original(self, arriving)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadEngine, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
