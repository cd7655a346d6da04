"""The checker of rules: an operation, cut in every way that its rule allows, against the operation itself.

    cuts = check_call(node, inputs)      # every axis, several chunks of each
    assert ways(cuts) == {"dim 0: [4]", "dim 2: [8]"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from graphs import as_module
from torch import fx
from torch.export import export
from torch.utils import _pytree as pytree

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, build_local, needs_of
from lightcache_fx.axis_rules.registry import evaluate
from lightcache_fx.graphs import placeholders, tensors_of

Values = Mapping[fx.Node, Any]


@dataclass
class Report:
    """Which axes of a call were cut, and why the others were not."""

    cut: dict[Axis, dict[fx.Node, Need | None]] = field(default_factory=dict)
    refused: dict[Axis, CannotCut] = field(default_factory=dict)

    @property
    def dims(self) -> set[int]:
        """Dimensions that are cut whole, with no factors."""
        return {axis.dim for axis in self.cut if axis.outer == axis.inner == 1}


def axes_of(sizes: tuple[int, ...]) -> Iterator[Axis]:
    """Every dimension of more than one element, and every factor of it that is not the whole and not one."""
    for dim, size in enumerate(sizes):
        factors = [n for n in range(1, size + 1) if size % n == 0]
        for outer in factors:
            for inner in factors:
                if size % (outer * inner) == 0 and size // (outer * inner) > 1:
                    yield Axis(dim, size // (outer * inner), outer, inner)


def chunks_of(size: int) -> list[tuple[int, int]]:
    """First, middle, last and uneven ranges, of one position and of several, and everything."""
    half = max(size // 2, 1)
    wanted = [(0, 1), (size - 1, size), (half, half + 1), (0, half), (half - 1, size), (1, size - 1), (0, size)]
    return list(dict.fromkeys((a, b) for a, b in wanted if 0 <= a < b <= size))


def run_call(node: fx.Node, values: Values) -> Any:
    """The call itself, on given values of its inputs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def run_chunk(node: fx.Node, axis: Axis, start: int, stop: int, values: Values) -> Any:
    """A chunk of a call, by its rule, on the parts of the inputs that the rule asks for."""
    body, local, parts = fx.Graph(), {}, []
    for source, need in needs_of(node, axis).items():
        part = values[source]
        if need is not None:
            low, high = need.reach.of(start, stop, need.axis.size)
            part = pytree.tree_map(lambda value: need.axis.narrow(value, low, high), part)  # noqa: B023
        local[source] = body.placeholder(source.name)
        local[source].meta["val"] = pytree.tree_map(lambda value: evaluate(torch.clone, (value,), {}), part)
        parts.append(part)
    made = build_local(body, node, axis, start, stop, local)
    body.output(made)
    for new in body.nodes:
        assert "val" in new.meta or new.op == "output"
        if new.op == "call_function":
            assert new.meta.get("nn_module_stack") == node.meta.get("nn_module_stack")
    with torch.no_grad():
        found = fx.GraphModule(torch.nn.Module(), body)(*parts)
    for value, fake in zip(pytree.tree_leaves(found), pytree.tree_leaves(made.meta["val"]), strict=True):
        assert value.shape == fake.shape
        assert value.dtype == fake.dtype
    return found


def check_axis(node: fx.Node, axis: Axis, values: Values, *, exact: bool) -> None:
    """Every chunk of a call along an axis is that part of the whole."""
    whole = run_call(node, values)
    for start, stop in chunks_of(axis.size):
        found = run_chunk(node, axis, start, stop, values)
        for part, full in zip(pytree.tree_leaves(found), pytree.tree_leaves(whole), strict=True):
            expected = axis.narrow(full, start, stop)
            message = f"{node.target} along {axis}, positions {start} to {stop}"
            if exact:
                assert torch.equal(part.nan_to_num() if part.is_floating_point() else part,
                                   expected.nan_to_num() if part.is_floating_point() else expected), message
            else:
                scale = full.abs().max().item() or 1.0
                torch.testing.assert_close(part, expected, rtol=0, atol=2e-6 * scale, equal_nan=True, msg=message)


def check_call(node: fx.Node, values: Values, *, exact: bool = True) -> Report:
    """Cut a call's output along every axis that its rule does not refuse."""
    report = Report()
    for axis in axes_of(tuple(tensors_of(node)[0].shape)):
        try:
            report.cut[axis] = needs_of(node, axis)
        except CannotCut as refusal:
            report.refused[axis] = refusal
            for finer in refusal.alternatives:
                needs_of(node, finer)
        else:
            check_axis(node, axis, values, exact=exact)
    return report


def check_function(function: Callable[..., Any], *inputs: torch.Tensor, exact: bool = True) -> Report:
    """`check_call` on every call of a function, as export captures it; the report is of the last one."""
    with torch.no_grad():
        graph_module = export(as_module(function), inputs, strict=False).module(check_guards=False)
    values: dict[fx.Node, Any] = dict(zip(placeholders(graph_module.graph), inputs, strict=True))
    report = None
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            values[node] = run_call(node, values)
            report = check_call(node, values, exact=exact)
    assert report is not None, "the function calls nothing"
    return report
