"""How each operation can be computed in parts: what a range of its output needs, and the operation on that range.

    needs = needs_of(node, Axis(dim=2, size=72))        # {input: Need(Axis(2, 72), reach with a halo), weight: None}
    part = build_local(body, node, axis, 8, 16, local)  # positions 8 to 15 of the output, from parts of the inputs

An operation without a rule is refused by `CannotCut`, never guessed at; so are operations that draw random numbers,
write to their arguments, or make values from nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from lightcache_fx.axes import Axis, Need
from lightcache_fx.axis_rules import attention, conv, matmul, norm, pointwise, reshape, resize, select, shape
from lightcache_fx.axis_rules.registry import RULES, Call, CannotCut, Local, Rule, bound_arguments
from lightcache_fx.errors import AxisRuleError
from lightcache_fx.graphs import describe, tensors_of

__all__ = ["RULES", "CannotCut", "build_local", "find_rule", "needs_of"]

# Importing a family of operations registers its rules.
_FAMILIES = (attention, conv, matmul, norm, pointwise, reshape, resize, select, shape)


def needs_of(node: fx.Node, axis: Axis, result: int | None = None) -> dict[fx.Node, Need | None]:
    """What a cut of a node's output needs of every tensor input.

    Args:
        node: a call. Of one with several results, every result is cut along the same axis.
        axis: how its output is cut.
        result: which of several results the axis was asked of; only checked.

    Returns:
        For each input that is a tensor (or a tuple of tensors) the positions needed, or None for the whole of it.

    Raises:
        CannotCut: the output cannot be computed in parts along this axis, or no rule knows how.
    """
    if node.op != "call_function":
        raise CannotCut(f"%{node.name} is no operation but a {node.op}: it cannot be computed in parts")
    results = tensors_of(node) if result is None else [*tensors_of(node), tensors_of(node)[result]]
    if node.target is operator.getitem:  # every result of the producer is cut
        results += tensors_of(node.all_input_nodes[0])
    if not results or not all(_has(tensor, axis) for tensor in results):
        raise CannotCut(f"{node.target} cannot be cut along {axis}: its results differ there, or have no such size")
    if node.target is operator.getitem:
        return {node.all_input_nodes[0]: Need(axis)}
    call = Call(node, axis, bound_arguments(node) if isinstance(node.target, OpOverload) else {})
    number = next((source for source in node.all_input_nodes if not tensors_of(source)), None)
    if number is not None:
        raise call.refuse(f"its argument %{number.name} is a number that depends on data")
    stated = list(find_rule(call).needs(call))
    found: dict[fx.Node, Need | None] = {}
    for source in node.all_input_nodes:
        needs = [need for other, need in stated if other is source]
        needs += [None] * (call.reads.count(source) - len(needs))  # what a rule does not name is needed whole
        if any(need != needs[0] for need in needs):
            raise call.refuse(f"%{source.name} is read twice, in different parts")
        found[source] = needs[0]
    return found


def _has(tensor: torch.Tensor, axis: Axis) -> bool:
    """Whether a tensor's dimension is as long as an axis says; a size that depends on data never is."""
    size = tensor.shape[axis.dim] if axis.dim < tensor.dim() else None
    return isinstance(size, int) and size == axis.extent


def find_rule(call: Call) -> Rule:
    """The rule of an operation.

    Raises:
        CannotCut: it has none, or is of a kind that no rule can exist for.
    """
    target = call.node.target
    if not isinstance(target, OpOverload):
        raise CannotCut(f"no rule for {target}: it is no ATen operator")
    if target._schema.is_mutable:
        raise call.refuse("it writes to its arguments")
    found = RULES.get(target)
    if found is None and torch.Tag.nondeterministic_seeded in target.tags:
        raise call.refuse("it draws random numbers")
    if found is None and not call.node.all_input_nodes:
        raise call.refuse("it makes its value from nothing; leave it outside")
    if found is None and torch.Tag.pointwise in target.tags:
        return pointwise.POINTWISE
    if found is None:
        raise CannotCut(f"no rule for {target}")
    return found


def build_local(
    graph: fx.Graph, node: fx.Node, axis: Axis, start: int, stop: int, local: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Append to a chunk's graph what computes positions `[start, stop)` of a node's output.

    Args:
        graph: the body of the chunk.
        node: the call.
        axis: how its output is cut.
        start: first position.
        stop: the position behind the last.
        local: for each input that `needs_of` gives, a node of `graph` that holds exactly the positions
            `need.reach.of(start, stop, need.axis.size)` of it, or the whole where the need is None.

    Returns:
        The node with exactly those positions: one that was there already where nothing is to be done.

    Raises:
        CannotCut: as `needs_of`.
        AxisRuleError: the chunk does not have the shape it must have.
    """
    needs = needs_of(node, axis)
    args = bound_arguments(node) if isinstance(node.target, OpOverload) else {}
    chunk = Local(node, axis, args, graph=graph, start=start, stop=stop, inputs=local, needs=needs)
    made = chunk.emit(operator.getitem, *node.args) if not args else find_rule(chunk).local(chunk)
    for whole, part in zip(tensors_of(node), pytree.tree_leaves(made.meta["val"]), strict=True):
        expected = list(whole.shape)
        expected[axis.dim] = axis.local_extent(stop - start)
        if list(part.shape) != expected or part.dtype != whole.dtype:
            raise AxisRuleError(
                f"{describe(node)}: positions {start} to {stop} along {axis} came as {part.dtype} {list(part.shape)};"
                f" expected {whole.dtype} {expected}; the rule of {node.target} is wrong"
            )
    return made
