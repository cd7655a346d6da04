"""A graph that Dynamo made of a model, as a module that looks like the model.

Its weights stand where they stand in the model, its forward takes the model's own arguments, and its calls know which
submodule they come from. So everything that works on a model works on it: capture, cuts at module paths, rates by
parameter name, the checks of what has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lightcache_fx.dynamo_sources import Frame, Key, Place, Sources
from lightcache_fx.graph_marks import mark_calls
from lightcache_fx.graphs import copy_graph
from lightcache_fx.marks import Mark, MarksItself
from lightcache_fx.module_state import weight_slots


class GraphModel(nn.Module, MarksItself):
    """What `graph_model` makes; each instance has a class of its own, named as the model's and with its signature.

    Attributes:
        graph_module: Dynamo's graph.
        places: of its inputs.
        slots: where each weight among the inputs is looked up, as by `weight_slots`; None for an argument.
        model_class: of the model; None where it is not known.
        method: which of its methods was compiled; this module's of that name computes the graph.
        varying: by an argument's name, the dimensions whose sizes Dynamo has made symbols of.
    """

    graph_module: fx.GraphModule
    places: tuple[Place, ...]
    slots: tuple[tuple[dict[str, Any], str] | None, ...]
    model_class: type[nn.Module] | None
    method: str
    varying: Mapping[str, tuple[int, ...]]

    @contextmanager
    def marked(self, paths: Sequence[str]) -> Iterator[list[Mark]]:
        """While active, what goes into and out of the named submodules is marked; yields what each tag means."""
        cls: Any = type(self)
        plain: fx.GraphModule = cls.graph_module
        marks: list[Mark] = []
        graph, _ = copy_graph(plain.graph)
        for path in paths:
            mark_calls(graph, path, marks)
        cls.graph_module = fx.GraphModule(plain, graph)
        try:
            yield marks
        finally:
            cls.graph_module = plain

    def bind(self, values: Sequence[Any]) -> dict[str, Any]:
        """The keyword arguments of a call for the graph's inputs; weights among them are put into their places."""
        arguments: list[tuple[tuple[Key, ...], Any]] = []
        for place, slot, value in zip(self.places, self.slots, values, strict=True):
            if slot is None:
                if place.kind == "argument":
                    arguments.append((place.path, value))
                continue
            table, name = slot
            if table[name] is not value:
                table[name] = value
        return {str(key): value for key, value in _tree(arguments).items()}

    def values(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The graph's inputs, of the weights as they are and a call's arguments; sizes it asks for itself."""
        found = []
        for place, slot in zip(self.places, self.slots, strict=True):
            if place.kind == "size":
                continue
            value: Any = arguments if slot is None else slot[0][slot[1]]
            for key in place.path if slot is None else ():
                value = value[key]
            found.append(value)
        return found


def graph_model(graph_module: fx.GraphModule, inputs: Sequence[Any], frame: Frame) -> GraphModel:
    """A module that computes what Dynamo's graph does.

    Args:
        graph_module: as a backend gets it.
        inputs: the examples that a backend gets, one for each placeholder.
        frame: that was compiled.
    """
    graph, _ = copy_graph(graph_module.graph)
    sources = Sources(frame, graph_module.graph.find_nodes(op="placeholder"), inputs)
    for node in graph.nodes:
        node.meta["nn_module_stack"] = sources.module_stack(node.meta.get("nn_module_stack") or {})
    placeholders = graph.find_nodes(op="placeholder")
    for node, place in zip(placeholders, sources.places, strict=True):
        node.meta |= {"nn_module_stack": {}, "lightcache_place": place}  # Dynamo has the module that reads it first
        _keep_number_as_tensor(node)
    for node, place in zip(placeholders, sources.places, strict=True):
        if place.kind == "size":
            _ask_for_size(node, placeholders, place)
    signature = sources.signature()

    def forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        with torch.fx.traceback.preserve_node_meta():
            return fx.Interpreter(type(self).graph_module).run(*self.values(arguments))

    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    )
    root = sources.model
    namespace: dict[str, Any] = {
        sources.method: forward,
        "graph_module": fx.GraphModule(graph_module, graph),
        "places": sources.places,
        "model_class": None if root is None else type(root),
        "method": sources.method,
        "varying": sources.varying,
    }
    made: Any = type("Model" if root is None else type(root).__name__, (GraphModel,), namespace)()
    _furnish(made, root, sources.places, inputs)
    found = weight_slots(made)
    # Of the class, as all that is no weight: the checks of what has changed need not look at it.
    type(made).slots = tuple(found[p.name] if p.kind == "weight" else None for p in sources.places)
    return made  # type: ignore[no-any-return]


def _keep_number_as_tensor(node: fx.Node) -> None:
    """A Python float comes as a 0-d float64 tensor, which computes as the number does; its value is not asked for."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64:
        for user in list(node.users):
            if user.op == "call_method" and user.target == "item":
                user.replace_all_uses_with(node)
                node.graph.erase_node(user)


def _ask_for_size(node: fx.Node, placeholders: Sequence[fx.Node], place: Place) -> None:
    """A size of a tensor that is an input too is asked for where it is first needed, and no input itself."""
    index, dim, *_ = place.path
    first = next((user for user in node.graph.nodes if user.op != "placeholder"), None)
    if node.users and first is not None:
        with node.graph.inserting_before(first):
            size = node.graph.call_method("size", (placeholders[int(index)], dim))
        size.meta |= {"nn_module_stack": {}}
        node.replace_all_uses_with(size)
    node.graph.erase_node(node)


def _furnish(made: nn.Module, root: nn.Module | None, places: Sequence[Place], inputs: Sequence[Any]) -> None:
    """Give a module the model's tree, and the weights among a graph's inputs."""
    for path, module in () if root is None else root.named_modules():
        if path:
            _submodule(made, path, is_list=isinstance(module, nn.ModuleList | nn.Sequential))
    for place, value in zip(places, inputs, strict=True):
        if place.kind == "weight":
            path, _, name = place.name.rpartition(".")
            owner = _submodule(made, path)
            if isinstance(value, nn.Parameter):
                owner.register_parameter(name, value)
            else:
                owner.register_buffer(name, value)
    made.train(root.training if root is not None else False)


def _submodule(root: nn.Module, path: str, *, is_list: bool = False) -> nn.Module:
    """The submodule at a path, made where it is not there."""
    found = root
    names = path.split(".") if path else []
    for depth, name in enumerate(names):
        if name not in found._modules:
            found._modules[name] = nn.ModuleList() if is_list and depth == len(names) - 1 else nn.Module()
        child = found._modules[name]
        assert child is not None
        found = child
    return found


def _tree(leaves: Sequence[tuple[tuple[Key, ...], Any]]) -> dict[Key, Any]:
    """A nested dict of values at their paths."""
    found: dict[Key, Any] = {}
    for (*outer, last), value in leaves:
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return found
