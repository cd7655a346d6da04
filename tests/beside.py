"""A way to cache beside the other passes: compiled, chunked, swapped, and all of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from oracle import assert_bitwise, plain_step

OTHERS = [
    pytest.param({"compile": lc.Compile(backend="aot_eager")}, id="compile"),
    pytest.param({"chunk": lc.Chunk(budget="80%")}, id="chunk", marks=pytest.mark.slow),
    pytest.param({"swap": lc.Swap(budget="75%")}, id="swap", marks=pytest.mark.slow),
    pytest.param(
        {"chunk": lc.Chunk(budget="80%"), "swap": lc.Swap(), "compile": lc.Compile(backend="eager")}, id="all"
    ),
]
TOLERANCE = 1e-4
"""Of chunks, whose sums are taken in another order."""


def check_beside(
    model: nn.Module, cache: lc.Cache, others: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The outputs are those without the others: bitwise, or as near as chunks are. Returns the programs that ran."""
    plain = lc.transform(model, lc.Policy(cache=cache))
    fast = lc.transform(copy.deepcopy(model), lc.Policy(cache=cache, **others))
    for step, inputs in enumerate(steps):
        expected, got = plain_step(plain, **inputs), plain_step(fast, **inputs)
        if "chunk" in others:
            torch.testing.assert_close(got[0], expected[0], rtol=TOLERANCE, atol=TOLERANCE, msg=f"step {step}")
        else:
            assert_bitwise(got, expected, f"step {step}")
    ran = [[run.program.partition("_")[0] for run in lc.inspect(one).timeline] for one in (plain, fast)]
    assert ran[0] == ran[1]
    lc.restore(fast)
    return ran[0]
