"""GroupNorm in two: statistics over the whole value, then a scale and a shift that can be cut along any axis."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from lightcache_fx import norm_stats  # noqa: F401 registers the operators
from lightcache_fx.axis_rules.registry import bound_arguments, evaluate
from lightcache_fx.passes.base import PassResult

aten = torch.ops.aten


def split_group_norm(graph: fx.Graph, *, names: Iterable[str]) -> PassResult:
    """Replace GroupNorms by their statistics and what is done with them (Wu and He 2018, in two passes).

        %n = aten.group_norm(%x, 32, %w, %b, eps)    ->   %m = lightcache.row_moments(%x, 32, rows)
                                                          %s = lightcache.join_moments(%m, eps)    # mean, rstd
                                                          %scale = rstd * w; %shift = b - mean * scale   # [N, C, 1, 1]
                                                          %n = aten.addcmul(%shift, %x, %scale)

    Tier: float rounding. Invariants: statistics are over all of the value; half precision is widened to float32 and the
    result rounded once, as the fused kernel does. Names that are no GroupNorm in this graph are passed over.
    """
    wanted = set(names)
    found = [n for n in graph.nodes if n.name in wanted and n.target is aten.group_norm.default]
    for node in found:
        _split(graph, node)
    return PassResult(graph, bool(found), {"group norms": len(found)})


def group_norms(graph: fx.Graph) -> list[str]:
    """The names of the GroupNorms of images and videos: of sequences, a row would be one token."""
    return [n.name for n in graph.nodes if n.target is aten.group_norm.default and n.meta["val"].dim() > 3]


def _split(graph: fx.Graph, node: fx.Node) -> None:
    args = bound_arguments(node)
    value, num_groups, weight, bias, eps = (args[name] for name in ("input", "num_groups", "weight", "bias", "eps"))
    tensor: torch.Tensor = value.meta["val"]
    samples, channels = tensor.shape[:2]
    ones = [1] * (tensor.dim() - 2)

    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        # Named after the norm, so that plans hold whichever other norms are split.
        new = graph.create_node("call_function", target, args, kwargs, name=f"{node.name}_{_short(target)}")  # type: ignore[arg-type]
        new.meta["val"] = evaluate(target, args, kwargs)  # type: ignore[arg-type]
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        new.meta["lightcache_split_norm"] = node.name
        return new

    def wide(source: fx.Node) -> fx.Node:
        if source.meta["val"].dtype == torch.float32:
            return source
        return call(aten._to_copy.default, source, dtype=torch.float32)

    with graph.inserting_before(node):
        moments = call(torch.ops.lightcache.row_moments.default, value, num_groups, _row_dim(tensor))
        stats = call(torch.ops.lightcache.join_moments.default, moments, eps)
        mean, rstd = (call(operator.getitem, stats, index) for index in range(2))

        def per_channel(source: fx.Node) -> fx.Node:
            """(samples, groups) -> (samples, channels, 1, ...)."""
            each = call(aten.repeat_interleave.self_int, source, channels // num_groups, 1)
            return call(aten.reshape.default, each, [samples, channels, *ones])

        def of_weights(source: fx.Node) -> fx.Node:
            return call(aten.reshape.default, wide(source), [1, channels, *ones])

        scale = per_channel(rstd)
        if isinstance(weight, fx.Node):
            scale = call(aten.mul.Tensor, scale, of_weights(weight))
        shift = call(aten.neg.default, call(aten.mul.Tensor, per_channel(mean), scale))
        if isinstance(bias, fx.Node):
            shift = call(aten.add.Tensor, shift, of_weights(bias))
        result = call(aten.addcmul.default, shift, wide(value), scale)
        if tensor.dtype != torch.float32:
            result = call(aten._to_copy.default, result, dtype=tensor.dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _short(target: object) -> str:
    return target.__name__.partition(".")[0].strip("_") if hasattr(target, "__name__") else str(target)


def _row_dim(tensor: torch.Tensor) -> int:
    """The dimension that is cut into strips: height, the last but one, or the only one of a sequence."""
    return max(2, tensor.dim() - 2)
