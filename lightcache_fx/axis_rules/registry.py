"""The table of rules, and what a rule is given: a call with its arguments by name, and a chunk of it to build.

A rule has two halves. The first says, for a cut of a call's output, what the call needs of each tensor input; the
second appends to a chunk's graph what computes some positions of the output from those parts. Where the operation does
to a part what it does to the whole, the second half is the operation itself (`Local.again`).

    @rule(aten.glu.default)
    def _glu(call: Call) -> Needs:
        call.forbid(call.dim("dim"), "the two halves meet there")
        return [call.same("self")]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from lightcache_fx.axes import Axis, Need

aten = torch.ops.aten
Needs = Iterable[tuple[fx.Node, Need | None]]
_SOURCE = ("nn_module_stack", "stack_trace")  # where in the model a call comes from


class CannotCut(Exception):  # noqa: N818 - control flow, not an error: it never reaches the user
    """A call's output cannot be computed in parts along an axis.

    Attributes:
        reason: which operation it is, and why.
        alternatives: other axes of the same output that may work, such as finer factors of a merged dimension.
    """

    def __init__(self, reason: str, alternatives: Iterable[Axis] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.alternatives = tuple(alternatives)


@dataclass(frozen=True)
class Call:
    """A call whose output is cut along an axis.

    Attributes:
        node: the call.
        axis: how its output is cut.
        args: every argument by its name in the operator's schema, defaults filled in.
    """

    node: fx.Node
    axis: Axis
    args: Mapping[str, Any]

    @property
    def target(self) -> OpOverload:
        """The operator."""
        assert isinstance(self.node.target, OpOverload)
        return self.node.target

    @property
    def reads(self) -> list[fx.Node]:
        """Every node among the arguments, as often as it is there."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), found.append)
        return found

    def refuse(self, why: str, *alternatives: Axis) -> CannotCut:
        """The exception to raise, naming the operation."""
        return CannotCut(f"{self.node.target} cannot be cut along {self.axis}: {why}", alternatives)

    def forbid(self, dims: int | Iterable[int], why: str) -> None:
        """Refuse a cut along any of these dimensions of the output."""
        if self.axis.dim in ([dims] if isinstance(dims, int) else dims):
            raise self.refuse(why)

    def blocks(self, size: int) -> list[Axis]:
        """The axis in blocks of `size` elements of its dimension, to offer in a refusal; none where they do not fit."""
        axis, block = self.axis, math.lcm(self.axis.inner, size)
        count, rest = divmod(axis.size * axis.inner, block)
        return [Axis(axis.dim, count, axis.outer, block)] if not rest and count > 1 else []

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the output; of several results, of the first."""
        return self._sizes(pytree.tree_leaves(self.node.meta["val"])[0])

    def sizes(self, source: str | fx.Node) -> tuple[int, ...]:
        """Sizes of an input, given by its argument's name or as a node."""
        return self._sizes(self.tensor(source).meta["val"])

    def _sizes(self, tensor: torch.Tensor) -> tuple[int, ...]:
        if not all(isinstance(size, int) for size in tensor.shape):
            raise self.refuse(f"a size depends on data: {tuple(tensor.shape)}")
        return tuple(tensor.shape)

    def tensor(self, source: str | fx.Node) -> fx.Node:
        """The node of a tensor argument."""
        node = self.args[source] if isinstance(source, str) else source
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            raise self.refuse(f"its argument {source} is not a tensor")
        return node

    def dim(self, name: str, ndim: int | None = None) -> int:
        """A dimension given as an argument, counted from the front of a value of `ndim` dimensions (the output's)."""
        dim: int = self.args[name]
        return dim % max(len(self.shape) if ndim is None else ndim, 1)

    def same(self, source: str | fx.Node, dim: int | None = None) -> tuple[fx.Node, Need]:
        """The same positions, along dimension `dim` of an input (by default the dimension of the output's axis)."""
        dim = self.axis.dim if dim is None else dim
        return self.need(source, replace(self.axis, dim=dim))

    def need(self, source: str | fx.Node, axis: Axis) -> tuple[fx.Node, Need]:
        """The positions of the same number along an axis of an input."""
        if self.sizes(source)[axis.dim] != axis.extent:
            raise self.refuse(f"dimension {axis.dim} of input {source} has {self.sizes(source)[axis.dim]} elements")
        return self.tensor(source), Need(axis)

    def broadcast(self, source: str | fx.Node, *, ndim: int | None = None) -> tuple[fx.Node, Need | None]:
        """The same positions of an input that is broadcast to the output; the whole where it has no such dimension.

        `ndim` counts the dimensions that take part from the right, if the output has others that do not.
        """
        sizes = self.sizes(source)
        dim = self.axis.dim - (len(self.shape) if ndim is None else ndim) + len(sizes)
        if dim < 0 or (sizes[dim] == 1 and self.axis.extent != 1):
            return self.tensor(source), None
        return self.same(source, dim)

    def optional(self, source: str, dim: int) -> Needs:
        """The same positions along dimension `dim` of an input that may be absent."""
        return [] if self.args[source] is None else [self.same(source, dim)]


@dataclass(frozen=True)
class Local(Call):
    """A chunk of a call: what is there of its inputs, and the graph to append to."""

    graph: fx.Graph
    start: int
    stop: int
    inputs: Mapping[fx.Node, fx.Node]
    needs: Mapping[fx.Node, Need | None]

    def __getitem__(self, source: str | fx.Node) -> fx.Node:
        """The part of an input that is there."""
        return self.inputs[self.tensor(source)]

    @property
    def length(self) -> int:
        """Elements of the chunk along the output's dimension."""
        return self.axis.local_extent(self.stop - self.start)

    @property
    def local_shape(self) -> list[int]:
        """Sizes of the chunk; of several results, of the first."""
        shape = list(self.shape)
        shape[self.axis.dim] = self.length
        return shape

    def ranges(self, source: str | fx.Node) -> tuple[tuple[int, int], tuple[int, int]]:
        """What a chunk reaches for in an input, and the part of it that is there."""
        need = self.needs[self.tensor(source)]
        assert need is not None
        reach = need.reach
        return reach.unclamped(self.start, self.stop), reach.of(self.start, self.stop, need.axis.size)

    def again(self, **changes: Any) -> fx.Node:
        """The same operation on the parts that are there, with some arguments changed."""
        positional = [argument.name for argument in self.target._schema.arguments if not argument.kwarg_only]
        args = [changes.pop(name, value) for name, value in zip(positional, self.node.args, strict=False)]
        return self.emit(self.target, *args, **{**self.node.kwargs, **changes})

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call; inputs of the original call stand for the parts of them that are there."""
        args, kwargs = fx.map_arg((args, kwargs), lambda node: self.inputs.get(node, node))
        new = self.graph.call_function(target, tuple(args), kwargs)
        new.meta["val"] = evaluate(target, args, kwargs)
        new.meta.update((key, self.node.meta[key]) for key in _SOURCE if key in self.node.meta)
        return new

    def take(self, node: fx.Node, dim: int, start: int, length: int) -> fx.Node:
        """`length` elements of a node of the chunk from `start` on: the node itself where that is all of it."""
        if (start, length) == (0, node.meta["val"].shape[dim]):
            return node
        return self.emit(aten.slice.Tensor, node, dim, start, start + length)

    def pad(self, node: fx.Node, pads: Mapping[int, tuple[int, int]], value: float = 0.0) -> fx.Node:
        """A node of the chunk with `pads[dim]` elements before and after it; negative counts take elements away."""
        if not any(any(pair) for pair in pads.values()):
            return node
        ndim = node.meta["val"].dim()
        flat = [count for dim in range(ndim - 1, min(pads) - 1, -1) for count in pads.get(dim, (0, 0))]
        return self.emit(aten.constant_pad_nd.default, node, flat, value)


@dataclass(frozen=True)
class Rule:
    """What a call needs for a cut of its output, and how a chunk of it is computed."""

    needs: Callable[[Call], Needs]
    local: Callable[[Local], fx.Node] = Local.again


RULES: dict[OpOverload, Rule] = {}


def rule(
    *targets: OpOverload, local: Callable[[Local], fx.Node] = Local.again
) -> Callable[[Callable[[Call], Needs]], Callable[[Call], Needs]]:
    """Register the decorated function as the needs of these operators, with how a chunk of them is computed."""

    def register(needs: Callable[[Call], Needs]) -> Callable[[Call], Needs]:
        for target in targets:
            assert target not in RULES, f"{target} has two rules"
            RULES[target] = Rule(needs, local)
        return needs

    return register


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    bound = {argument.name: argument.default_value for argument in arguments}
    bound.update(zip(bound, node.args, strict=False))
    return {**bound, **node.kwargs}


def evaluate(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a call gives, by its inputs' fake tensors: shapes and strides, nothing is computed."""
    flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, fx.Node))
    values = [leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf for leaf in flat]
    mode = next((leaf.fake_mode for leaf in pytree.tree_leaves(values) if isinstance(leaf, FakeTensor)), None)
    mode = mode or FakeTensorMode()

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or (isinstance(leaf, FakeTensor) and leaf.fake_mode is mode):
            return leaf
        device = leaf.fake_device if isinstance(leaf, FakeTensor) else leaf.device
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)

    with torch.no_grad(), mode:
        args, kwargs = pytree.tree_unflatten([pytree.tree_map(fake, value) for value in values], spec)
        return target(*args, **kwargs)
