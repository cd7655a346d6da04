"""Generated code that takes its arguments as a list lets go of each after its last use."""

from __future__ import annotations

import weakref

import torch
from torch import fx

from lightcache_fx.boxed import BoxedCodeGen


def boxed(graph: fx.Graph) -> fx.GraphModule:
    graph.set_codegen(BoxedCodeGen())
    return fx.GraphModule({}, graph)


def test_an_argument_dies_after_its_last_use() -> None:
    alive = []
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = graph.call_function(torch.add, (x, y))
    seen = graph.call_function(lambda value: alive.append([ref() is not None for ref in refs]) or value, (total,))
    graph.output(graph.call_function(torch.mul, (seen, y)))
    arguments = [torch.ones(2), torch.full((2,), 3.0)]
    refs = [*map(weakref.ref, arguments)]
    result = boxed(graph).forward(arguments)
    assert result.tolist() == [12, 12]
    assert alive == [[False, True]]
    assert arguments == []
    assert [ref() for ref in refs] == [None, None]


def test_no_arguments_defaults_and_types() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ones, (2,)))
    assert boxed(graph).forward([]).tolist() == [1, 1]

    graph = fx.Graph()
    one = graph.placeholder("x", type_expr=torch.Tensor, default_value=None)
    graph.output(graph.call_function(torch.neg, (one,)))
    assert boxed(graph).forward([torch.ones(2)]).tolist() == [-1, -1]
