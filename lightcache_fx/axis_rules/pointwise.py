"""Operations that compute each element from the elements at its place: any axis, inputs broadcast."""

from __future__ import annotations

import torch
from torch import fx

from lightcache_fx.axis_rules.registry import Call, Local, Needs, Rule, aten, rule
from lightcache_fx.marks import MARK


def _everywhere(call: Call) -> Needs:
    sizes = [call.sizes(source) for source in call.node.all_input_nodes]
    if tuple(torch.broadcast_shapes(*sizes)) != call.shape:
        raise call.refuse(f"inputs of sizes {sizes} are not broadcast to {call.shape}")
    return [call.broadcast(source) for source in call.reads]


# Operators that torch tags as pointwise need no entry: this is their rule.
POINTWISE = Rule(_everywhere)

rule(
    aten._to_copy.default,
    aten._autocast_to_full_precision.default,
    aten._autocast_to_reduced_precision.default,
    aten.__and__.Scalar,
    aten.__and__.Tensor,
    aten.__or__.Scalar,
    aten.__or__.Tensor,
    aten.alias.default,
    aten.alias_copy.default,
    aten.complex.default,
    aten.conj.default,
    aten.contiguous.default,
    aten.copy.default,
    aten.detach.default,
    aten.detach_copy.default,
    aten.divide.Scalar,
    aten.divide.Tensor,
    aten.empty_like.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.floor_divide.default,
    aten.full_like.default,
    aten.greater.Scalar,
    aten.greater.Tensor,
    aten.less.Scalar,
    aten.less.Tensor,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.masked_fill.Tensor,
    aten.multiply.Scalar,
    aten.multiply.Tensor,
    aten.negative.default,
    aten.ones_like.default,
    aten.polar.default,
    aten.rsub.Tensor,
    aten.subtract.Scalar,
    aten.subtract.Tensor,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.prim_Device,
    aten.true_divide.Scalar,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.zeros_like.default,
)(_everywhere)


@rule(aten.to.other, aten.type_as.default)
def _cast_like(call: Call) -> Needs:
    """Of the other tensor only the type counts."""
    return [call.same("self")]


@rule(MARK, local=lambda chunk: chunk["tensor"])
def _mark(call: Call) -> Needs:
    return [call.same("tensor")]


def _unchanged(chunk: Local) -> fx.Node:
    return chunk["input"]


@rule(aten.dropout.default, aten.feature_dropout.default, local=_unchanged)
def _dropout(call: Call) -> Needs:
    """The identity in evaluation mode."""
    if call.args["train"]:
        raise call.refuse("dropout draws random numbers")
    return [call.same("input")]


@rule(aten.native_dropout.default)
def _native_dropout(call: Call) -> Needs:
    if call.args["train"] is not False:
        raise call.refuse("dropout draws random numbers")
    return [call.same("input")]


@rule(aten.view_as_complex.default)
def _view_as_complex(call: Call) -> Needs:
    return [call.same("self")]


@rule(aten.view_as_real.default)
def _view_as_real(call: Call) -> Needs:
    call.forbid(len(call.shape) - 1, "it tells real from imaginary parts")
    return [call.same("self")]
