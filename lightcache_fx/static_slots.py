"""Slots at fixed addresses, for CUDA graphs: one graph writes them where others read them.

What a CUDA graph returns lies in memory that its next replay overwrites, and what it is given is copied into its own
first, unless its address is known to stay. So a slot, which one graph makes and others read, would be held three times.
Here each guidance branch under way has buffers of its own as long as its run lasts, and the next run has them again,
since a graph is recorded for addresses.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from lightcache_fx.graphs import copy_graph, output_node, outputs, placeholders

_WRITE = torch.ops.aten.copy_.default


def writing_to_buffers(graph_module: fx.GraphModule, places: Sequence[int]) -> fx.GraphModule:
    """A program that writes some of its results to buffers, which are more arguments at its end, and returns these.

        return (%out, %h)          ->   %b = placeholder
                                        %s = aten.copy_(%b, %h)
                                        return (%out, %s)

    Args:
        graph_module: it is left as it is.
        places: of these results, in ascending order.
    """
    graph, _ = copy_graph(graph_module.graph)
    results: list[fx.Node] = list(outputs(graph))
    for place in places:
        value = results[place]
        with graph.inserting_after(placeholders(graph)[-1]):
            buffer = graph.placeholder(f"slot_buffer_{place}")
        with graph.inserting_before(output_node(graph)):
            results[place] = graph.call_function(_WRITE, (buffer, value))
        for node in (buffer, results[place]):
            node.meta["val"] = value.meta["val"]
    output_node(graph).args = (tuple(results),)
    graph.set_codegen(graph_module.graph._codegen)  # noqa: SLF001 - there is no getter
    return fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)


def written_arguments(graph: fx.Graph) -> dict[int, int]:
    """The place of the argument that a result was written to, by the place of the result."""
    order: dict[object, int] = {node: place for place, node in enumerate(placeholders(graph))}
    return {
        place: order[node.args[0]]
        for place, node in enumerate(outputs(graph))
        if isinstance(node, fx.Node) and node.target is _WRITE and node.args[0] in order
    }


def without_results(graph_module: fx.GraphModule, places: Mapping[int, int]) -> fx.GraphModule:
    """The graph without these results, which it writes to its arguments all the same."""
    graph, _ = copy_graph(graph_module.graph)
    output = output_node(graph)
    output.args = (tuple(node for place, node in enumerate(outputs(graph)) if place not in places),)
    return fx.GraphModule(graph_module, graph)


class SlotBuffers:
    """The buffers for what one program keeps: a set for each branch that is under way.

    Args:
        likes: fake tensors like the slots.
    """

    def __init__(self, likes: Sequence[torch.Tensor]) -> None:
        self._likes = list(likes)
        self._held: dict[int, tuple[int, list[torch.Tensor]]] = {}
        self._free: list[tuple[int, list[torch.Tensor]]] = []
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # a branch may be collected while another one's buffers are made

    def of(self, owner: object) -> list[torch.Tensor]:
        """The buffers of a branch, by what it keeps; when that is gone, the next branch may have them."""
        with self._lock:
            if id(owner) not in self._held:
                # The first made goes first, so that branches of the next run find theirs by their order.
                self._held[id(owner)] = heapq.heappop(self._free) if self._free else self._made()
                weakref.finalize(owner, self._take_back, id(owner)).atexit = False
            return self._held[id(owner)][1]

    def num_bytes(self) -> int:
        """Bytes of all sets."""
        sets = [*self._free, *self._held.values()]
        return sum(buffer.untyped_storage().nbytes() for _, buffers in sets for buffer in buffers)

    def _made(self) -> tuple[int, list[torch.Tensor]]:
        from torch._dynamo import mark_static_address  # a second to import

        with torch.inference_mode(False):  # whose tensors could not be written to outside of it
            buffers = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in self._likes]
        for buffer in buffers:
            mark_static_address(buffer, guard=False)
        return next(self._numbers), buffers

    def _take_back(self, owner: int) -> None:
        with self._lock:
            heapq.heappush(self._free, self._held.pop(owner))
