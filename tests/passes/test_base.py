"""The runner holds passes to their contract, and its messages say which pass broke what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from graphs import Captured, captured, operators
from lightcache_fx.errors import PassError
from lightcache_fx.graphs import calls, output_node, placeholders
from lightcache_fx.passes.base import PassResult, run_passes

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def _given() -> Captured:
    return captured(lambda sample, timestep: (sample * timestep).sin() + 1, X, torch.tensor(3))


def _nothing(graph: fx.Graph) -> PassResult:
    return PassResult(graph, modified=False)


def _sin_to_cos(graph: fx.Graph) -> PassResult:
    found = [node for node in calls(graph) if node.target is torch.ops.aten.sin.default]
    for node in found:
        node.target = torch.ops.aten.cos.default
    return PassResult(graph, bool(found), {"sines": len(found)})


def _broken_order(graph: fx.Graph) -> PassResult:
    first, *_, last = calls(graph)
    first.replace_input_with(placeholders(graph)[0], last)
    return PassResult(graph, modified=True)


def _another_output(graph: fx.Graph) -> PassResult:
    output_node(graph).args = ((placeholders(graph)[1],),)
    return PassResult(graph, modified=True)


def _untyped(graph: fx.Graph) -> PassResult:
    (returned,) = output_node(graph).args[0]  # type: ignore[misc]
    with graph.inserting_after(returned):
        new = graph.call_function(torch.ops.aten.exp.default, (returned,))
    output_node(graph).args = ((new,),)
    new.meta["val"] = returned.meta["val"]
    with graph.inserting_after(new):
        graph.call_function(torch.ops.aten.tanh.default, (new,), name="without_type")
    return PassResult(graph, modified=True)


def _lies(graph: fx.Graph) -> PassResult:
    _sin_to_cos(graph)
    return PassResult(graph, modified=False)


def _boasts(graph: fx.Graph) -> PassResult:
    return PassResult(graph, modified=True)


def test_results_come_by_name_and_in_order() -> None:
    graph_module = _given().copy()
    results = run_passes(graph_module.graph, [("one", _nothing), ("two", _sin_to_cos)], check_modified=True)
    assert list(results) == ["one", "two"]
    assert not results["one"].modified
    assert results["two"].counts == {"sines": 1}
    assert "aten.cos.default" in operators(graph_module)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (_broken_order, ["pass broken left an ill-formed graph", "before it has been defined", "before it: first"]),
        (_untyped, ["pass broken left %without_type without a type", "passes before it: first"]),
        (_another_output, ["pass broken changed the outputs", "expected", "(2, 4)", "float32", "int64", "first"]),
        (_lies, ["pass broken says modified=False"]),
        (_boasts, ["pass broken says modified=True"]),
    ],
)  # fmt: skip
def test_messages(broken: Any, words: list[str]) -> None:
    graph = _given().copy().graph
    with pytest.raises(PassError) as error:
        run_passes(graph, [("first", _nothing), ("broken", broken)], check_modified=True)
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message


def test_an_ill_formed_graph_is_found_where_no_pass_ran_before() -> None:
    with pytest.raises(PassError, match="passes before it: none"):
        run_passes(_given().copy().graph, [("broken", _broken_order)])


def test_outputs_may_change_where_the_caller_says_so() -> None:
    graph = _given().copy().graph
    results = run_passes(graph, [("another_output", _another_output)], keeps_outputs=False, check_modified=True)
    assert results["another_output"].modified


def test_truth_of_modified_is_checked_only_on_request() -> None:
    assert not run_passes(_given().copy().graph, [("lies", _lies)])["lies"].modified


def test_an_error_of_a_pass_itself_passes_through() -> None:
    def fails(graph: fx.Graph) -> PassResult:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_passes(_given().copy().graph, [("fails", fails)])
