"""One submodule as one opaque operation: the route for code that no tracer follows.

Some forwards compute constants from Python lists, write through `.data`, or branch on tensor values. The innermost
module that does so stays a call of the user's own module inside the graph; everything around it is captured as usual.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightcache_fx.errors import CaptureError
from lightcache_fx.fetching import WeightsAway


@dataclass
class _Region:
    """A submodule being traced around: how its call is put together and what it returns."""

    module: nn.Module
    input_spec: pytree.TreeSpec | None = None
    input_constants: tuple[tuple[int, object], ...] = ()
    output_spec: pytree.TreeSpec | None = None
    outputs: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...] = ()
    flops: int = 0


_regions: dict[int, _Region] = {}  # only filled while a trace is under way
_keys = itertools.count()


@torch.library.custom_op("lightcache::opaque", mutates_args=())
def opaque(tensors: list[torch.Tensor], key: int) -> list[torch.Tensor]:  # noqa: ARG001 - a schema only
    """Stands for the call of a submodule while a graph is traced; captures replace it by the call itself."""
    raise CaptureError("lightcache::opaque has a meaning only inside a capture")


@opaque.register_fake
def _(tensors: list[torch.Tensor], key: int) -> list[torch.Tensor]:  # noqa: ARG001 - shapes are the region's
    return [torch.empty_strided(shape, stride, dtype=d, device=dev) for shape, stride, d, dev in _regions[key].outputs]


class OpaqueCall(nn.Module):
    """Calls the user's submodule, whose weights it shares without owning them.

    Shapes: takes the submodule's tensor arguments in flattened order, returns its output tensors as a list.
    """

    def __init__(self, region: _Region) -> None:
        super().__init__()
        self._region = (region,)  # in a tuple, so that the submodule's weights stay registered in one place
        self.train(False)

    def forward(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call the submodule with the tensors where they belong."""
        (region,) = self._region
        args, kwargs = _rebuild(region, tensors)
        with _fetched_where_away(region):
            returned = region.module(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]


def _fetched_where_away(region: _Region) -> AbstractContextManager[object]:
    """Weights that no program reads are in no plan: where they are away, operations of the submodule fetch them."""
    away = WeightsAway(region.outputs[0][3]) if region.outputs else None
    weights = (*region.module.parameters(), *region.module.buffers())
    return away.fetched(region.module) if away is not None and any(map(away.is_away, weights)) else nullcontext()


def _rebuild(region: _Region, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    flat: list[object] = list(tensors)
    for position, value in region.input_constants:
        flat.insert(position, value)
    assert region.input_spec is not None
    args, kwargs = pytree.tree_unflatten(flat, region.input_spec)
    return args, kwargs


@contextmanager
def opaque_submodules(model: nn.Module, paths: Sequence[str], run_eager: Any) -> Iterator[None]:
    """While active, calls of the named submodules of `model` are traced as single operations.

    `run_eager` is called once before, to see what the submodules are given and return.
    """
    regions = {path: _Region(model.get_submodule(path)) for path in paths}
    handles = [region.module.register_forward_hook(_note(region), with_kwargs=True) for region in regions.values()]
    try:
        with FlopCounterMode(display=False) as counter:
            run_eager()
    finally:
        for handle in handles:
            handle.remove()
    keys = {path: next(_keys) for path in paths}
    for path, region in regions.items():
        counted = counter.get_flop_counts()
        region.flops = next((sum(c.values()) for name, c in counted.items() if name.endswith(f".{path}")), 0)
        _regions[keys[path]] = region
        vars(region.module)["forward"] = _traced_forward(region, keys[path])
    try:
        yield
    finally:
        for path, region in regions.items():
            vars(region.module).pop("forward", None)
            del _regions[keys[path]]


def _note(region: _Region) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        flat, region.input_spec = pytree.tree_flatten((args, kwargs))
        region.input_constants = tuple((i, x) for i, x in enumerate(flat) if not isinstance(x, torch.Tensor))
        leaves, region.output_spec = pytree.tree_flatten(output)
        if any(not isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise CaptureError(
                f"{type(region.module).__name__} returns more than tensors, so it cannot stay one opaque operation"
            )
        region.outputs = tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)

    return hook


def _traced_forward(region: _Region, key: int) -> Any:
    def forward(*args: Any, **kwargs: Any) -> object:
        flat, spec = pytree.tree_flatten((args, kwargs))
        constants = tuple((i, x) for i, x in enumerate(flat) if not isinstance(x, torch.Tensor))
        if spec != region.input_spec or constants != region.input_constants:
            raise CaptureError(
                f"{type(region.module).__name__} is called in two different ways, so it cannot stay opaque"
            )
        results = opaque([x for x in flat if isinstance(x, torch.Tensor)], key)
        assert region.output_spec is not None
        return pytree.tree_unflatten(results, region.output_spec)

    return forward


def bind_opaque_calls(graph_module: fx.GraphModule) -> None:
    """Replace each `lightcache::opaque` operation by a call of its submodule. Must run while the trace is under way."""
    bound: dict[int, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.lightcache.opaque.default:
            continue
        tensors, key = node.args
        if key not in bound:
            bound[key] = f"opaque_{len(bound)}"
            graph_module.add_submodule(bound[key], OpaqueCall(_regions[key]))
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(bound[key], (tensors,))
        call.meta = {**node.meta, "lightcache_flops": _regions[key].flops}
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)


def suspect_path(model: nn.Module, error: BaseException) -> str | None:
    """The innermost submodule that was being traced when `error` was raised, or that its message blames."""
    paths = {id(module): path for path, module in model.named_modules() if path}
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        found = paths.get(id(owner), found)
        traceback = traceback.tb_next
    words = str(error).replace(":", " ").replace(",", " ").split()
    blamed = [path for path in paths.values() if any(word.startswith(f"model.{path}.lifted_tensor") for word in words)]
    return max(blamed, key=len) if blamed else found
