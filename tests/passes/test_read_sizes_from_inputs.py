"""Sizes are read from the inputs of the call, and no value is computed to be asked for its size."""

from __future__ import annotations

import operator
import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx

from golden import check_golden
from graphs import Captured, apply_to, as_module, operators
from lightcache_fx import capture as capture_module
from lightcache_fx import diff
from lightcache_fx.calls import CallReader
from lightcache_fx.errors import PassError
from lightcache_fx.graphs import GraphInput
from lightcache_fx.passes.read_sizes_from_inputs import read_sizes_from_inputs
from lightcache_fx.passes.remove_dead_code import remove_dead_code

aten = torch.ops.aten

X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(3.0)


def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([x.sin(), x.cos()])
    return torch.ops.aten.add.Tensor(x, torch.full((rows.shape[0] + 1, 4), 2.0)[: x.shape[0]]) * timestep


def with_symbols() -> Captured:
    """As it is captured, but for the pass."""
    module = as_module(model)
    call = CallReader(module, rates={}).read((X, T), {})
    with mock.patch.object(capture_module, "_read_sizes_from_inputs"):
        return Captured(module, call, capture_module.capture(module, call, varying={0: (0,)}))


def asked(given: Captured) -> fx.GraphModule:
    """The same, where a size is asked of a value that a step computes; export reads sizes of inputs where it can."""
    graph_module = given.copy()
    graph = graph_module.graph
    x = next(iter(graph.nodes))
    (add,) = [node for node in graph.nodes if node.target is operator.add]

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda source: source.meta["val"]))
        return node

    with graph.inserting_before(add):
        rows = call(aten.cat.default, [call(aten.sin.default, x), call(aten.cos.default, x)])
        size = call(aten.sym_size.int, rows, 0)
    add.args = (size, add.args[1])
    graph_module.recompile()
    return graph_module


def test_golden() -> None:
    given = with_symbols()
    before, after = asked(given), asked(given)
    result = apply_to(after, read_sizes_from_inputs, remove_dead_code)
    assert result.modified
    text = re.sub(r"\bs\d+\b", "s0", diff(before, after))  # torch numbers symbols by their source's name
    check_golden(text, "read_sizes_from_inputs", __file__)


def test_numbers() -> None:
    given = with_symbols()
    after = asked(given)
    assert apply_to(after, read_sizes_from_inputs).counts == {"sizes": 1}
    for batch in (2, 3, 5):
        tensors = (torch.randn(batch, 4), T)
        assert torch.equal(given.run(after, tensors)[0], given.eager(tensors)[0])


def test_not_where_sizes_are_those_of_inputs() -> None:
    given = with_symbols()
    after, result = given.apply(read_sizes_from_inputs)
    assert not result.modified
    assert operators(after) == operators(given.graph_module)


def test_second_application_does_nothing() -> None:
    after = asked(with_symbols())
    assert apply_to(after, read_sizes_from_inputs).modified
    assert not apply_to(after, read_sizes_from_inputs).modified


def test_a_size_that_no_input_has_is_refused() -> None:
    after = asked(with_symbols())
    (x, *_) = after.graph.nodes
    x.meta["lightcache_input"] = GraphInput("slot", "slot_0", "latent")
    with pytest.raises(PassError, match=r"s\d+ is the size of no input, so .* cannot be computed"):
        read_sizes_from_inputs(after.graph)
