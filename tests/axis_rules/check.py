"""The checker of rules: an operation, cut in every way that its rule allows, against the operation itself.

cuts = check_call(node, inputs)      # every axis, several chunks of each
assert ways(cuts) == {"dim 0: [4]", "dim 2: [8]"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import CannotCut, build_local, needs_of
from lightcache_fx.graphs import tensors_of

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
    body = fx.Graph()
    local: dict[fx.Node, fx.Node] = {}
    found: dict[fx.Node, Any] = {}
    for source, need in needs_of(node, axis).items():
        part = values[source]
        if need is not None:
            low, high = need.reach.of(start, stop, need.axis.size)
            part = pytree.tree_map(partial(need.axis.narrow, start=low, stop=high), part)
        local[source] = body.placeholder(source.name)
        local[source].meta["val"] = pytree.tree_map(_fake, part)
        found[local[source]] = part
    made = build_local(body, node, axis, start, stop, local)
    for new in body.nodes:
        if new.op == "call_function":
            found[new] = run_call(new, found)
            assert new.meta.get("nn_module_stack") == node.meta.get("nn_module_stack")
        for value, fake in zip(pytree.tree_leaves(found[new]), pytree.tree_leaves(new.meta["val"]), strict=True):
            assert isinstance(fake, FakeTensor)
            assert (value.shape, value.dtype) == (fake.shape, fake.dtype)
    return found[made]


def _fake(value: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():  # each value of its own: build_local must bring them together
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def check_axis(node: fx.Node, axis: Axis, values: Values, whole: Any, *, exact: bool) -> None:
    """Every chunk of a call along an axis is that part of the whole."""
    for start, stop in chunks_of(axis.size):
        found = run_chunk(node, axis, start, stop, values)
        for part, full in zip(pytree.tree_leaves(found), pytree.tree_leaves(whole), strict=True):
            expected = axis.narrow(full, start, stop)
            where = f"{node.target} along {axis}, positions {start} to {stop}"
            if exact:
                torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True, msg=where)
            else:
                scale = full.nan_to_num().abs().max().item() or 1.0
                torch.testing.assert_close(part, expected, rtol=0, atol=2e-6 * scale, equal_nan=True, msg=where)


def check_call(node: fx.Node, values: Values, *, exact: bool = True) -> Report:
    """Cut a call's output along every axis that its rule does not refuse."""
    report, whole = Report(), run_call(node, values)
    for axis in axes_of(tuple(tensors_of(node)[0].shape)):
        try:
            report.cut[axis] = needs_of(node, axis)
        except CannotCut as refusal:
            report.refused[axis] = refusal
            for finer in refusal.alternatives:
                needs_of(node, finer)
        else:
            check_axis(node, axis, values, whole, exact=exact)
    return report


def call_of(target: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.Node, dict[fx.Node, Any]]:
    """A graph of one call: each tensor among its arguments is a placeholder; one that comes twice is the same."""
    graph = fx.Graph()
    known: dict[int, fx.Node] = {}
    values: dict[fx.Node, Any] = {}

    def as_node(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in known:
            node = known[id(leaf)] = graph.placeholder(f"input_{len(known)}")
            values[node], node.meta["val"] = leaf, leaf
        return known[id(leaf)]

    call = graph.call_function(target, *pytree.tree_map(as_node, (tuple(args), kwargs)))
    call.meta["nn_module_stack"] = {"": ("block.0", torch.nn.Module)}
    call.meta["val"] = run_call(call, values)
    return call, values


def check(target: Callable[..., Any], *args: Any, exact: bool = True, **kwargs: Any) -> Report:
    """`check_call` on one call of an operator with these arguments."""
    return check_call(*call_of(target, *args, **kwargs), exact=exact)
