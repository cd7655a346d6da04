"""Normalisation and reductions: any dimension that no statistic, sum or softmax goes over."""

from __future__ import annotations

import torch

from lightcache_fx import norm_stats  # noqa: F401 registers the operators
from lightcache_fx.axis_rules.registry import Call, Needs, aten, rule


@rule(aten.native_group_norm.default, local=lambda chunk: chunk.again(N=chunk.length))
@rule(aten.group_norm.default)
def _group_norm(call: Call) -> Needs:
    """`B C *S`, each group of channels normalised over space."""
    if call.axis.dim != 0:
        raise call.refuse("the statistics of a group of channels need all of its channels and all of space")
    return [call.same("input")]


@rule(torch.ops.lightcache.row_moments.default)
def _row_moments(call: Call) -> Needs:
    call.forbid((2, 3), "a row's moments are those of all channels of a group")
    return [call.same("value", call.args["dim"] if call.axis.dim == 0 else 0)]


@rule(torch.ops.lightcache.join_moments.default)
def _join_moments(call: Call) -> Needs:
    """(rows, samples, groups, 2) -> (samples, groups), twice."""
    return [call.same("moments", call.axis.dim + 1)]


@rule(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default)
def _layer_norm(call: Call) -> Needs:
    if call.axis.dim >= len(call.sizes("input")) - len(call.args["normalized_shape"]):
        raise call.refuse("the statistics need this dimension whole")
    return [call.same("input")]


@rule(aten.instance_norm.default)
def _instance_norm(call: Call) -> Needs:
    if call.axis.dim != 0 or not call.args["use_input_stats"]:
        raise call.refuse("the statistics of a channel need all of space")
    return [call.same("input")]


@rule(aten.batch_norm.default)
def _batch_norm(call: Call) -> Needs:
    """In evaluation mode, a scale and a shift of each channel."""
    if call.args["training"] or call.args["running_mean"] is None:
        raise call.refuse("the statistics are the batch's")
    if call.axis.dim != 1:
        return [call.same("input")]
    channels = [pair for name in ("weight", "bias", "running_mean", "running_var") for pair in call.optional(name, 0)]
    return [call.same("input"), *channels]


@rule(
    aten.softmax.int,
    aten.log_softmax.int,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
)
def _along(call: Call) -> Needs:
    call.forbid(call.dim("dim"), "each element depends on the others along it")
    return [call.same("self")]


@rule(aten.glu.default)
def _glu(call: Call) -> Needs:
    call.forbid(call.dim("dim"), "the two halves meet there")
    return [call.same("self")]


@rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.prod.dim_int,
    aten.amax.default,
    aten.amin.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.dim,
    aten.all.dims,
    aten.argmax.default,
    aten.argmin.default,
    aten.logsumexp.default,
    aten.max.dim,
    aten.min.dim,
    aten.norm.ScalarOpt_dim,
    aten.std.dim,
    aten.std.correction,
    aten.var.dim,
    aten.var.correction,
    aten.var_mean.correction,
    aten.std_mean.correction,
    aten.linalg_vector_norm.default,
)
def _reduce(call: Call) -> Needs:
    """Dimensions that are reduced are gone from the output, or of size 1 in it."""
    ndim, dims = len(call.sizes("self")), call.args["dim"]
    if dims is None or dims == []:
        raise call.refuse("everything is reduced")
    gone = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = list(range(ndim)) if call.args["keepdim"] else [dim for dim in range(ndim) if dim not in gone]
    if kept[call.axis.dim] in gone:
        raise call.refuse("it is reduced")
    return [call.same("self", kept[call.axis.dim])]
