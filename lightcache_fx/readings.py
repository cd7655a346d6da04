"""What a model's Python code reads of tensors and decides by: a capture for calls in which it reads the same.

`if torch.all(image_embeds == 0):`, or slices by lengths that `mask.sum(1).tolist()` gives, leave no trace in a graph.
So the eager model is run to note what is read, and traced with these values in the place of those that fake tensors do
not have. The tensors that were read become a graph of their own, which is asked whether the capture holds for a call:
specialisation with guards, as `torch.compile` has it for what is no tensor.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode

from lightcache_fx.errors import CaptureError
from lightcache_fx.graphs import (
    copy_graph,
    describe,
    drop_unused_inputs,
    eliminate_dead_code,
    input_of,
    output_node,
    outputs,
    placeholders,
)
from lightcache_fx.rates import rates_of
from lightcache_fx.stores import version_of

log = logging.getLogger(__name__)

_READS = frozenset(
    {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__"}
)
_LIST = "tolist"
_NONE_LEFT = object()
_REMEMBERED = 8
"""Calls of which it is known whether a capture holds for them."""


class _Watch(TorchFunctionMode):
    """Sees what is read of tensors; with `given`, these values are what is read."""

    def __init__(self, given: Sequence[object] | None) -> None:
        super().__init__()
        self.values: list[object] = []
        self.tensors: list[torch.Tensor] = []
        self._given = iter(given) if given is not None else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _READS:
            return func(*args, **(kwargs or {}))
        if self._given is None:
            value = func(*args, **(kwargs or {}))
            self.values.append(copy.deepcopy(value))
            return value
        value = next(self._given, _NONE_LEFT)
        if value is _NONE_LEFT:
            raise CaptureError("a trace reads more of its tensors than a run does")
        self.tensors.append(args[0])
        return copy.deepcopy(value)


@contextmanager
def noted() -> Iterator[list[object]]:
    """Yields what is read of tensors while this is open, in order."""
    with _Watch(None) as watch:
        yield watch.values


@contextmanager
def repeated(values: Sequence[object] | None) -> Iterator[list[torch.Tensor]]:
    """While this is open these values are what is read of tensors, in order; yields the tensors. None: nothing is."""
    if values is None:
        yield []
        return
    with _lists_are_read(), _Watch(values) as watch:
        yield watch.tensors


@contextmanager
def _lists_are_read() -> Iterator[None]:
    """The tensors of a trace make lists number by number; in this thread they are read as others are, at once."""
    me = threading.get_ident()
    kinds: tuple[type[torch.Tensor], ...] = (FakeTensor, FunctionalTensor)
    own: dict[type[torch.Tensor], Callable[[torch.Tensor], Any]] = {
        kind: vars(kind)[_LIST] for kind in kinds if _LIST in vars(kind)
    }

    def read(kind: type[torch.Tensor]) -> Callable[[torch.Tensor], Any]:
        def tolist(self: torch.Tensor) -> Any:
            return torch.Tensor.tolist(self) if threading.get_ident() == me else own[kind](self)

        return tolist

    try:
        for kind in own:
            setattr(kind, _LIST, read(kind))
        yield
    finally:
        for kind, method in own.items():
            setattr(kind, _LIST, method)


@dataclass(eq=False)
class Readings:
    """What a capture takes for granted of the values of a call's tensors.

    Attributes:
        graph_module: computes what is read.
        values: of the call that was captured, on the CPU.
    """

    graph_module: fx.GraphModule
    values: tuple[torch.Tensor, ...] = ()
    _asked: OrderedDict[object, tuple[Sequence[torch.Tensor], bool]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def arguments(self) -> frozenset[str]:
        """The names of the call's tensors that anything is read of."""
        given = map(input_of, placeholders(self.graph_module.graph))
        return frozenset(given_.name for given_ in given if given_.kind == "user")

    @property
    def key(self) -> tuple[object, ...]:
        """The values, to look up by."""
        return tuple((str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist())) for value in self.values)

    def read(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What is read of other tensors; each read waits for the device."""
        with torch.no_grad():
            return tuple(tensor.detach().cpu().clone() for tensor in self.graph_module(*arguments))

    def hold_for(self, arguments: Sequence[torch.Tensor]) -> bool:
        """Whether the same is read of other tensors; of the very same ones it is not read again."""
        versions = tuple(map(version_of, arguments))
        with self._lock:
            if versions in self._asked:
                return self._asked[versions][1]
            same = self._is_the_same(arguments)
            if None not in versions:
                self._asked[versions] = (arguments, same)  # held, so that no other tensor gets their identity
                if len(self._asked) > _REMEMBERED:
                    self._asked.popitem(last=False)
            return same

    def _is_the_same(self, arguments: Sequence[torch.Tensor]) -> bool:
        try:
            found = self.read(arguments)
        except (RuntimeError, IndexError) as error:  # it holds sizes that the call's own values do not lead to
            log.debug("what a capture reads cannot be read of other values: %s", error)
            return False
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, self.values, strict=True))


def split_readings(graph: fx.Graph, count: int, root: fx.GraphModule) -> Readings | None:
    """Take what is read, the outputs behind the first `count`, out of a graph into one of its own.

    Returns:
        None where only constants are read.

    Raises:
        CaptureError: what is read changes from step to step.
    """
    rates = rates_of(graph)
    found = [node for node in outputs(graph)[count:] if isinstance(node, fx.Node) and rates[node] != "const"]
    changing = next((node for node in found if rates[node] != "run"), None)
    if changing is not None:
        raise CaptureError(
            f"forward decides by the value of {describe(changing)}, which changes from step to step"
            f" (it is of rate {rates[changing]!r})"
        )
    read = list(dict.fromkeys(found))
    apart, mapping = copy_graph(graph)
    output_node(apart).args = (tuple(mapping[node] for node in read),)
    kept = outputs(graph)[:count]
    output_node(graph).args = (kept,)
    for one in (graph, apart):
        eliminate_dead_code(one)
    drop_unused_inputs(apart, ("user", "weight", "constant"))
    return Readings(fx.GraphModule(root, apart, class_name="Readings")) if read else None
