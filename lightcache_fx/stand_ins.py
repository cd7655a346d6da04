"""Fake tensors in the places of weights, so that a module can be traced for a device that its weights are not on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightcache_fx.fetching import FETCH
from lightcache_fx.module_state import weight_slots


@contextmanager
def stand_ins(
    module: nn.Module, tensors: Sequence[torch.Tensor], device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Let a module have fake parameters and buffers on a device while this is entered, and its own ones afterwards.

    Each has the shape, strides, dtype and kind of the weight that it stands for, and none of its values. Weights that
    are one tensor stay one. Nothing is allocated.

    Args:
        module: to be traced; what the trace adds to its tables of weights is removed again.
        tensors: of the call, on whichever devices.
        device: where the module computes.

    Yields:
        fake tensors like `tensors`, to trace with.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tables = list({id(table): table for table, _ in weight_slots(module).values()}.values())
    own = [(table, dict(table)) for table in tables]
    made: dict[int, torch.Tensor] = {}

    def like(weight: torch.Tensor) -> torch.Tensor:
        if id(weight) not in made:
            fake = _like(weight, mode, device)
            made[id(weight)] = (
                nn.Parameter(fake, requires_grad=weight.requires_grad) if isinstance(weight, nn.Parameter) else fake
            )
        return made[id(weight)]

    try:
        for table, weights in own:
            table.update({key: like(weight) for key, weight in weights.items() if weight is not None})
        yield tuple(_like(tensor, mode, tensor.device) for tensor in tensors)
    finally:
        for table, weights in own:
            table.clear()
            table.update(weights)


def _like(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def forget_fetches(graph: fx.Graph) -> None:
    """Make of a trace in which operations read copies of weights one in which they read the weights.

        %copy = lightcache.fetch(%w, device); %y = linear(%x, %copy)    ->    %y = linear(%x, %w)

    The types of weights and of views of them are those on the device already: asked for theirs, they name it.
    """
    for node in list(graph.nodes):
        if node.target is FETCH:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node.meta.get("val") is None:  # it was stopped
            graph.erase_node(node)
