"""A slot that is read by its Taylor expansion: the sums in the graph, and their numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import fx

from golden import check_golden
from graphs import captured
from lightcache_fx import diff
from lightcache_fx.cuts import depth_cut
from lightcache_fx.errors import PassError
from lightcache_fx.extrapolation import COEFFICIENTS, older_name
from lightcache_fx.graphs import input_of, placeholders
from lightcache_fx.passes.base import PassResult, typed_call
from lightcache_fx.passes.extrapolate import extrapolate
from lightcache_fx.passes.read_cache import read_cache
from toys import Denoiser, latent, prompt

MODEL = Denoiser()
CALL = (latent(0), torch.tensor(900), prompt(0))


def test_golden() -> None:
    given = captured(MODEL, *CALL)
    slots = depth_cut(given.facts, 0).slots
    before, _ = given.apply(partial(read_cache, slots=slots))
    after, result = given.apply(partial(read_cache, slots=slots), partial(extrapolate, slots=slots, order=2))
    check_golden(diff(before, after), "extrapolate", __file__)
    assert result.modified
    kinds = [input_of(node).kind for node in placeholders(after.graph)]
    assert kinds[-4:] == ["slot", "coefficients", "history", "history"]


def test_order_0_changes_nothing() -> None:
    given = captured(MODEL, *CALL)
    slots = depth_cut(given.facts, 0).slots
    _, result = given.apply(partial(read_cache, slots=slots), partial(extrapolate, slots=slots, order=0))
    assert not result.modified


def sums(values: list[torch.Tensor], gaps: list[float], weights: list[float]) -> torch.Tensor:
    """Newton's table, written out: `values` are of the newest step first."""
    level, total = values, values[0]
    for weight in weights:
        level = [(level[i] - level[i + 1]) / gaps[i] for i in range(len(level) - 1)]
        total = total + level[0] * weight
    return total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_numbers(order: int) -> None:
    """As if the slot held the sum: the graph that reads slots is the reference."""
    given = captured(MODEL, *CALL)
    slots = depth_cut(given.facts, 0).slots
    reads, _ = given.apply(partial(read_cache, slots=slots))
    after, _ = given.apply(partial(read_cache, slots=slots), partial(extrapolate, slots=slots, order=order))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 8, generator=generator) for _ in range(order + 1)]
    gaps, weights = [2.0, 3.0, 1.0][:order], [1.5, 1.125, 0.5625][:order]
    state = {"slot_0": values[0], COEFFICIENTS: torch.tensor([*gaps, *weights])}
    state |= {older_name("slot_0", age): values[age] for age in range(1, order + 1)}
    expected = given.run(reads, state={"slot_0": sums(values, gaps, weights)})
    assert torch.equal(given.run(after, state=state)[0], expected[0])
    assert not torch.equal(expected[0], given.run(reads, state={"slot_0": values[0]})[0])


def test_a_graph_without_slots_is_left_alone() -> None:
    given = captured(MODEL, *CALL)
    _, result = given.apply(partial(extrapolate, slots=depth_cut(given.facts, 0).slots, order=2))
    assert not result.modified


def test_a_slot_that_is_not_read_is_left_alone() -> None:
    """As in programs of several caches, one of which saves all that reads what another one keeps."""
    given = captured(MODEL, *CALL)
    slots = depth_cut(given.facts, 0).slots

    def unread(graph: fx.Graph) -> PassResult:
        (slot,) = (node for node in placeholders(graph) if input_of(node).kind == "slot")
        with graph.inserting_after(placeholders(graph)[-1]):
            zeros = typed_call(graph, torch.ops.aten.zeros.default, list(slot.meta["val"].shape))
        slot.replace_all_uses_with(zeros)
        return PassResult(graph, True)

    before, _ = given.apply(partial(read_cache, slots=slots), unread)
    after, result = given.apply(partial(read_cache, slots=slots), unread, partial(extrapolate, slots=slots, order=1))
    assert not result.modified
    assert after.code == before.code


def test_not_twice() -> None:
    given = captured(MODEL, *CALL)
    slots = depth_cut(given.facts, 0).slots
    twice = partial(extrapolate, slots=slots, order=1)
    with pytest.raises(PassError, match="extrapolate: this graph reads the history of its slots already"):
        given.apply(partial(read_cache, slots=slots), twice, twice)
