"""Scaled dot-product attention: batch, heads and query tokens can be cut; keys and values are needed whole.

Layouts: query `*B H L D`, key and value `*B H S D`, mask broadcast to `*B H L S`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from lightcache_fx.axes import Need
from lightcache_fx.axis_rules.registry import Call, Needs, aten, rule


@rule(aten.scaled_dot_product_attention.default)
def _attention(call: Call) -> Needs:
    if call.args["dropout_p"]:
        raise call.refuse("dropout draws random numbers")
    ndim = len(call.shape)
    if call.axis.dim == ndim - 1:
        raise call.refuse("the features of a head are computed together")
    mask: Needs = [] if call.args["attn_mask"] is None else [call.broadcast("attn_mask")]
    if call.axis.dim == ndim - 2:
        if call.args["is_causal"]:
            raise call.refuse("which keys a query sees depends on where it is in the whole")
        return [call.broadcast("query"), (call.tensor("key"), None), (call.tensor("value"), None), *mask]
    if call.args["enable_gqa"] and call.axis.dim == ndim - 3:
        return [call.same("query"), _grouped(call, "key"), _grouped(call, "value"), *mask]
    return [call.broadcast("query"), call.broadcast("key"), call.broadcast("value"), *mask]


def _grouped(call: Call, source: str) -> tuple[fx.Node, Need]:
    """Heads of keys or values that several heads of queries share: a position must hold whole groups."""
    axis, group = call.axis, call.axis.extent // call.sizes(source)[call.axis.dim]
    if axis.inner % group:
        raise call.refuse(f"{group} heads of queries share one of keys", *call.blocks(group))
    return call.need(source, replace(axis, inner=axis.inner // group))
