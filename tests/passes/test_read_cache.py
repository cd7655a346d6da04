"""A reuse step takes the cut from the state; what only the cut needed is gone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from golden import check_golden
from graphs import captured, operators
from lightcache_fx import diff
from lightcache_fx.cuts import depth_cut, module_cut, residual_cut
from lightcache_fx.errors import LightcacheError
from lightcache_fx.graphs import input_of, placeholders
from lightcache_fx.passes.base import run_passes
from lightcache_fx.passes.read_cache import read_cache
from lightcache_fx.passes.remove_marks import remove_marks
from oracle import HookOracle
from toys import Denoiser, latent, prompt

MODEL = Denoiser()
FIRST = (latent(0), torch.tensor(900), prompt(0))
SECOND = (latent(1), torch.tensor(800), prompt(0))
NAMES = ("sample", "timestep", "encoder_hidden_states")


def test_golden_of_a_value() -> None:
    given = captured(MODEL, *FIRST)
    slots = depth_cut(given.facts, 0).slots
    after, result = given.apply(partial(read_cache, slots=slots), remove_marks)
    check_golden(diff(given.graph_module, after), "read_cache_value", __file__)
    assert not result.modified  # of remove_marks: a depth needs no marks


def test_golden_of_a_residual() -> None:
    given = captured(MODEL, *FIRST, mark=["middle"])
    slots = residual_cut(given.facts, "middle", "middle", MODEL).slots
    after, _ = given.apply(partial(read_cache, slots=slots), remove_marks)
    before, _ = given.apply(remove_marks)
    check_golden(diff(before, after), "read_cache_residual", __file__)


@pytest.mark.parametrize("paths", [["middle"], ["middle.layer"], ["inner", "middle"], ["middle.layer", "outer"]])
def test_numbers(paths: list[str]) -> None:
    """Against forward hooks that replace the modules' outputs."""
    given = captured(MODEL, *FIRST, mark=paths)
    slots = module_cut(given.facts, paths, MODEL).slots
    after, _ = given.apply(partial(read_cache, slots=slots), remove_marks)
    oracle = HookOracle(MODEL, paths)
    oracle.step(True, **dict(zip(NAMES, FIRST, strict=True)))
    kept = {
        slot.name: tensor for slot, tensor in zip(slots, [oracle._kept[i, 0] for i in range(len(paths))], strict=True)
    }
    expected = oracle.step(False, **dict(zip(NAMES, SECOND, strict=True)))
    tensors = [t for t, leaf in zip(SECOND, given.capture.layout.leaves, strict=True) if leaf]
    assert torch.equal(given.run(after, tensors, kept)[0], expected[0])


def test_numbers_of_a_residual() -> None:
    given = captured(MODEL, *FIRST, mark=["middle"])
    slots = residual_cut(given.facts, "middle", "middle", MODEL).slots
    after, _ = given.apply(partial(read_cache, slots=slots), remove_marks)
    skip = MODEL.inner(SECOND[0])
    residual = torch.randn(2, 8)
    expected = MODEL.outer(torch.cat([skip + residual, skip], dim=-1))
    assert torch.equal(given.run(after, SECOND, {"slot_0": residual})[0], expected)


def test_state_comes_last_and_dead_inputs_go() -> None:
    given = captured(MODEL, *FIRST)
    after, _ = given.apply(partial(read_cache, slots=depth_cut(given.facts, 0).slots))
    bindings = [input_of(node) for node in placeholders(after.graph)]
    assert [b.name for b in bindings if b.kind == "user"] == ["sample"]
    assert {b.name for b in bindings if b.kind == "weight"} == {
        "inner.weight",
        "inner.bias",
        "outer.weight",
        "outer.bias",
    }
    assert (bindings[-1].kind, bindings[-1].name) == ("slot", "slot_0")


def test_not_without_slots() -> None:
    given = captured(MODEL, *FIRST)
    after, result = given.apply(partial(read_cache, slots=()))
    assert not result.modified
    assert operators(after) == operators(given.graph_module)


def test_second_application_refuses() -> None:
    """The cut is gone, so there is nothing to replace: the plan belongs to another graph."""
    given = captured(MODEL, *FIRST)
    apply = partial(read_cache, slots=depth_cut(given.facts, 0).slots)
    after, _ = given.apply(apply)
    with pytest.raises(LightcacheError, match="read_cache"):
        run_passes(after.graph, [("read_cache", apply)])
