"""Calls and captures at another size: tensors cut off or begun again, and numbers where a graph has symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lightcache_fx.calls import Call, CallLayout, TensorType
from lightcache_fx.capture import Capture
from lightcache_fx.graphs import copy_graph, expression
from lightcache_fx.sizes import Sizes, at

_PYTHON: dict[type, Callable[[Any], Any]] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def with_numbers(captured: Capture, sizes: Sizes, layout: CallLayout) -> Capture:
    """The capture as it is at one size: the same nodes, with numbers where symbols were."""
    values = sizes.values(layout)
    graph, _ = copy_graph(captured.graph_module.graph)
    mode = FakeTensorMode()

    def number(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape, stride = (
                [int(at(sympy.sympify(expression(n)), values)) for n in of] for of in (value.shape, value.stride())
            )
            with mode:
                return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            exact = at(sympy.sympify(value.node.expr), values)
            return next(kind for sym, kind in _PYTHON.items() if isinstance(value, sym))(exact)
        return value

    numbers: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda source: numbers.get(source, source))
        if "val" in node.meta:
            symbolic = isinstance(node.meta["val"], tuple(_PYTHON))
            node.meta["val"] = pytree.tree_map(number, node.meta["val"])
            if symbolic:
                numbers[node] = node.meta["val"]
    for node in reversed(numbers):
        graph.erase_node(node)
    return replace(captured, graph_module=fx.GraphModule(captured.graph_module, graph), layout=layout)


def resized(call: Call, layout: CallLayout) -> Call:
    """A call of another size: its tensors cut off, or begun again, and laid out as that call's were."""
    tensors = tuple(
        tensor if tensor.shape == type_.shape else _resized(tensor, type_)
        for tensor, type_ in zip(call.tensors, layout.tensor_types, strict=True)
    )
    return Call(layout, tensors)


def _resized(tensor: torch.Tensor, type_: TensorType) -> torch.Tensor:
    for dim, size in enumerate(type_.shape):
        if tensor.shape[dim] != size:
            places = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, places)
    if type_.strides is None:
        return tensor.contiguous()
    # No view of another tensor, whose sizes a trace would make symbols of as well.
    laid_out = torch.empty_strided(type_.shape, type_.strides, dtype=tensor.dtype, device=tensor.device)
    written = laid_out
    for dim, (size, stride) in enumerate(zip(type_.shape, type_.strides, strict=True)):
        if size > 1 and stride == 0:
            written, tensor = (one.narrow(dim, 0, 1) for one in (written, tensor))
    written.copy_(tensor)
    return laid_out
