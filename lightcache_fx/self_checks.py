"""A compiled graph compared with itself uncompiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2, torch.float32: 1e-4, torch.float64: 1e-9}
"""How far a compiled graph's results may be from the graph's own, over the largest element: Inductor fuses, and keeps
half-precision intermediates in float32, so it rounds elsewhere. What lies beyond is no rounding."""

_UNDEFINED = frozenset(
    {
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.empty_permuted,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided,
    }
)


class _Filled(fx.Interpreter):
    """Runs a graph with a value of one's own where it leaves memory as it is found."""

    def __init__(self, graph_module: fx.GraphModule, value: int) -> None:
        super().__init__(graph_module)
        self._value = value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        return result.fill_(self._value) if _leaves_undefined(target) else result


def _leaves_undefined(target: object) -> bool:
    return isinstance(target, OpOverload) and target.overloadpacket in _UNDEFINED


def own_results(graph_module: fx.GraphModule, args: Sequence[Any]) -> list[tuple[Any, torch.Tensor | None]]:
    """What a graph computes itself, and which elements of each result are defined by it; None: all of them.

    A piece may end between the allocation of a tensor and the last write to it (rotary embeddings fill two halves).
    """
    if not any(_leaves_undefined(node.target) for node in graph_module.graph.nodes):
        return [(copied(value), None) for value in graph_module(*args)]
    one, other = (list(map(copied, _Filled(graph_module, value).run(*args))) for value in (0, 1))
    return [(a, _same(a, b) if isinstance(a, torch.Tensor) else None) for a, b in zip(one, other, strict=True)]


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def copied(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Difference:
    """A result that is further off than rounding accounts for.

    Attributes:
        index: of the result.
        off: the largest difference, over the largest element of what is expected.
        bound: what rounding accounts for.
    """

    index: int
    off: float
    bound: float


def first_difference(results: Sequence[Any], own: Sequence[tuple[Any, torch.Tensor | None]]) -> Difference | None:
    """The first result that is not what the graph computes itself.

    Args:
        results: of the compiled graph.
        own: as `own_results` gives them.
    """
    for index, (result, (expected, defined)) in enumerate(zip(results, own, strict=True)):
        if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
            continue
        bound = _TOLERANCE.get(expected.dtype, 0.1)
        off = _distance(result, expected) if defined is None else _distance(result[defined], expected[defined])
        if not off <= bound:
            return Difference(index, off, bound)
    return None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest element; infinities and NaN must be in the same places."""
    both = torch.isfinite(expected)
    if not torch.equal(both, torch.isfinite(found)):
        return float("inf")
    one, other = found[both].double(), expected[both].double()
    largest = float(other.abs().max()) if other.numel() else 0.0
    return float((one - other).abs().max()) / largest if largest else float(one.abs().max() if one.numel() else 0.0)
