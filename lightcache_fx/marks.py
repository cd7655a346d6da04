"""Finding a module's arguments and results in its captured graph, exactly.

A graph does not say which values a module returned: a module may hand its input through, or share a value with its
caller. While a capture is traced, forward hooks on the modules of interest pass their tensors through
`lightcache::mark`, an identity that stays in the graph as a named place to cut and is erased from every program.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Mark:
    """One marked tensor: argument or result number `index` (in flattened order) of a module's `call`-th call."""

    path: str
    side: Literal["in", "out"]
    call: int
    index: int


@torch.library.custom_op("lightcache::mark", mutates_args=())
def mark(tensor: torch.Tensor, tag: int) -> torch.Tensor:  # noqa: ARG001 - the tag is data of the node
    """The identity, with a tag to find it by."""
    return tensor.clone()


@mark.register_fake
def _(tensor: torch.Tensor, tag: int) -> torch.Tensor:  # noqa: ARG001 - as above
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


MARK = torch.ops.lightcache.mark.default


class MarksItself(ABC):
    """Mixin of a model that knows where its submodules' calls are."""

    @abstractmethod
    def marked(self, paths: Sequence[str]) -> AbstractContextManager[list[Mark]]:
        """As `marked_modules`."""


@contextmanager
def marked_modules(model: nn.Module, paths: Sequence[str]) -> Iterator[list[Mark]]:
    """While active, tensors going into and out of the named submodules are marked; yields what each tag means.

    A model whose forward does not call its submodules marks them itself.
    """
    if isinstance(model, MarksItself):
        with model.marked(paths) as own:
            yield own
        return
    marks: list[Mark] = []
    handles: list[Any] = []
    try:
        for path in paths:
            before, after = _hooks(path, marks)
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _hooks(path: str, marks: list[Mark]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    calls = {"in": 0, "out": 0}

    def pass_through(tree: object, side: Literal["in", "out"]) -> object:
        flat, spec = pytree.tree_flatten(tree)
        marked: dict[int, torch.Tensor] = {}  # a tensor that is there twice stays one: it may be written to
        for index, leaf in enumerate(flat):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in marked:
                    marked[id(leaf)] = mark(leaf, len(marks))
                    marks.append(Mark(path, side, calls[side], index))
                flat[index] = marked[id(leaf)]
        calls[side] += 1
        return pytree.tree_unflatten(flat, spec)

    def before(_module: nn.Module, args: object, kwargs: object) -> Any:
        return pass_through((args, kwargs), "in")

    def after(_module: nn.Module, _args: object, output: object) -> object:
        return pass_through(output, "out")

    return before, after


def place_marks(graph: fx.Graph) -> None:
    """Put each mark right behind what it marks, so that a graph does not depend on the order of marking."""
    latest: dict[fx.Node, fx.Node] = {}
    inputs = graph.find_nodes(op="placeholder")
    for node in [node for node in graph.nodes if node.target is MARK]:
        value = node.args[0]
        anchor = latest.get(value) or (inputs[-1] if value.op == "placeholder" else value)
        anchor.append(node)
        latest[value] = node


def marked_nodes(graph: fx.Graph, marks: Sequence[Mark]) -> dict[Mark, fx.Node]:
    """The node of each mark that is still alive in the graph, in the order in which the marked values are computed."""
    return {marks[int(node.args[1])]: node for node in graph.nodes if node.target is MARK}
