"""A slot that is read by its Taylor expansion: the sums in the graph, and their numbers."""

from __future__ import annotations

from functools import partial

import torch

from golden import check_golden
from graphs import captured
from lightcache_fx import diff
from lightcache_fx.cuts import depth_cut
from lightcache_fx.graphs import input_of, placeholders
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
