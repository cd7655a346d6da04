"""Programs whose sizes are symbols, handed to a compiler: Dynamo's guards decide for which sizes its code is valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from lightcache_fx.graphs import expression, placeholders
from lightcache_fx.policy import Compile

_MARKS = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")

Varying = Mapping[int, Sequence[int]]
"""Dimensions by the place of the argument."""


def varying_arguments(graph: fx.Graph) -> dict[int, list[int]]:
    """The dimensions of a graph's inputs whose sizes are symbols."""
    found: dict[int, list[int]] = {}
    for index, node in enumerate(placeholders(graph)):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            dims = [dim for dim, size in enumerate(map(expression, value.shape)) if not isinstance(size, int)]
            if dims:
                found[index] = dims
    return found


def compiled_for_sizes(
    graph_module: fx.GraphModule, settings: Compile, note: Callable[[], None]
) -> Callable[..., Sequence[Any]]:
    """What `torch.compile` makes of a graph, to be called first inside `marked`.

    Args:
        graph_module: it may be rewritten.
        settings: by what compiler, and how.
        note: called whenever something is compiled.
    """
    from torch._dynamo import lookup_backend  # a second to import
    from torch._inductor import list_mode_options

    backend, options = lookup_backend(settings.backend), dict(settings.options)
    if settings.backend == "inductor":
        patches = {**list_mode_options(settings.mode, dynamic=True), **options}
        options = {"config_patches": patches} if patches else {}

    def counted(given: fx.GraphModule, inputs: Sequence[Any], **_: object) -> Callable[..., Any]:
        made: Callable[..., Any] = backend(given, list(inputs), **options)
        note()
        return made

    made: Callable[..., Sequence[Any]] = torch.compile(graph_module, fullgraph=True, backend=counted)
    return made


@contextmanager
def marked(arguments: Sequence[Any], varying: Varying) -> Iterator[None]:
    """While active, these dimensions of the arguments are marked as dynamic; the caller's tensors keep no mark."""
    from torch._dynamo import maybe_mark_dynamic

    marked_here = {id(arguments[i]): arguments[i] for i in varying if not hasattr(arguments[i], _MARKS[0])}.values()
    for index, dims in varying.items():
        maybe_mark_dynamic(arguments[index], list(dims))
    try:
        yield
    finally:
        for tensor in marked_here:
            for name in _MARKS:
                vars(tensor).pop(name, None)
