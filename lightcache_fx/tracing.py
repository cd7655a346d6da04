"""The two ways to trace a module's call into a graph: `torch.export`, non-strict, and `make_fx` on real tensors."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.export import _trace as export_trace
from torch.export.graph_signature import InputKind as ExportInput
from torch.export.graph_signature import OutputKind
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from lightcache_fx.calls import CallLayout, method_of
from lightcache_fx.errors import ArgumentError, CaptureError
from lightcache_fx.graphs import GraphInput, writes_in_place
from lightcache_fx.marks import Mark, marked_modules
from lightcache_fx.quiet import quiet_logs
from lightcache_fx.readings import repeated

WRAPPER = "model"

Varying = Mapping[int, Sequence[int]]
"""Dimensions whose sizes vary from call to call, by the place of the input."""


@dataclass
class OutputRecord:
    """What a traced call returned beside tensors; held outside the module, whose attributes export restores."""

    spec: pytree.TreeSpec | None = None
    constants: tuple[tuple[int, object], ...] = ()
    marks: list[Mark] = field(default_factory=list)


class FlatCall(nn.Module):
    """The model as a function of flat tensors that returns flat tensors.

    What the caller gave as a Python integer comes as float64; `whole_numbers` passes it on as int64. `read` is what the
    model reads of tensors' values, in order; the tensors come behind the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: CallLayout,
        marked: Sequence[str],
        *,
        whole_numbers: bool = False,
        read: Sequence[object] | None = None,
    ) -> None:
        super().__init__()
        self.train(model.training)
        self.model = model
        self.layout = layout
        self.marked = tuple(marked)
        self.whole = layout.integers if whole_numbers else frozenset()
        self.read = read
        self.record = OutputRecord()
        self._untraced = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the model with the tensors where they belong; what else it returns goes to the record."""
        own = [tensor.to(torch.int64) if i in self.whole else tensor for i, tensor in enumerate(tensors)]
        args, kwargs = self.layout.rebuild(own)
        method = method_of(self.model, self.layout.method)
        with (
            _confined_to_thread(self._untraced),
            marked_modules(self.model, self.marked) as self.record.marks,
            repeated(self.read) as read,
        ):
            flat, self.record.spec = pytree.tree_flatten(method(self.model, *args, **kwargs))
        found = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        self.record.constants = tuple((i, leaf) for i, leaf in enumerate(flat) if not isinstance(leaf, torch.Tensor))
        for _, value in self.record.constants:
            if not isinstance(value, type(None) | bool | int | float | str | torch.dtype):
                raise ArgumentError(
                    f"{type(self.model).__name__} returns a {type(value).__qualname__} inside its output; expected"
                    f" tensors, numbers and None in tuples, lists, dicts or registered output classes; pass"
                    f" return_dict=False, or register the class with torch.utils._pytree.register_dataclass"
                )
        return (*found, *read)


@contextmanager
def _confined_to_thread(untraced: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """What a tracer has patched into `nn.Module` for the whole process holds in this thread alone.

    Args:
        untraced: what stands there for all other threads: the methods as they were before the trace began.
    """
    me = threading.get_ident()
    patched = {name: vars(nn.Module)[name] for name in untraced}

    def confined(name: str) -> Callable[..., Any]:
        @functools.wraps(untraced[name])
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (patched if threading.get_ident() == me else untraced)[name](*args, **kwargs)

        return choose

    try:
        for name in patched:
            setattr(nn.Module, name, confined(name))
        yield
    finally:
        for name, method in patched.items():
            setattr(nn.Module, name, method)


@dataclass(frozen=True)
class Traced:
    """What a route yields: a graph, what each placeholder is, and tensor constants by name."""

    graph_module: fx.GraphModule
    inputs: list[GraphInput]
    constants: dict[str, torch.Tensor]


def trace_by_export(
    flat: FlatCall, tensors: tuple[torch.Tensor, ...], *, fake: bool = False, varying: Varying = MappingProxyType({})
) -> Traced:
    """`torch.export`, non-strict; functionalised where the model writes in place, as a whole only where that needs it.

    Args:
        flat: the model; its weights may be fake.
        tensors: of the call; likewise.
        fake: whether constants may be fake too, because nothing will ever be computed with them.
        varying: dimensions that become symbols, as far as the trace leaves them open.
    """
    from lightcache_fx.passes.functionalize_writes import functionalize_writes

    shapes = tuple(dict.fromkeys(varying.get(index, ()), Dim.AUTO) for index in range(len(tensors)))
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,) if varying else None, strict=False)
        functionalize_writes(program.graph_module.graph)
        if writes_in_place(program.graph_module.graph):
            program = program.run_decompositions({})
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"forward writes to {spec.target or spec.arg.name} ({spec.kind.name.lower()}); a step must be pure"
            )
    inputs, constants = [], {}
    leaves = iter(flat.layout.leaves)
    for spec in signature.input_specs:
        if spec.kind in (ExportInput.PARAMETER, ExportInput.BUFFER):
            inputs.append(GraphInput("weight", str(spec.target).removeprefix(f"{WRAPPER}."), "const"))
        elif spec.kind is ExportInput.CONSTANT_TENSOR:
            name = str(spec.target).removeprefix(f"{WRAPPER}.")
            value = program.constants[str(spec.target)]
            if isinstance(value, FakeTensor) and not fake:
                raise CaptureError(
                    f"tensor constant {name} was made inside forward from Python data and has no value in the trace"
                )
            constants[name] = value
            inputs.append(GraphInput("constant", name, "const"))
        elif spec.kind is ExportInput.USER_INPUT:
            leaf = next(leaves)
            inputs.append(GraphInput("user", leaf.name, leaf.rate))
        else:
            raise CaptureError(f"forward uses a {spec.kind.name.lower()} input, which has no place in a static program")
    return Traced(program.graph_module, inputs, constants)


@contextmanager
def _quiet() -> Iterator[None]:
    """What export prints and logs of a trace that fails is kept back: another route may do, and ours say why not."""
    vars(export_trace)["print"] = lambda *_, **__: None  # it prints the graph so far
    try:
        with quiet_logs():
            yield
    finally:
        vars(export_trace).pop("print")


def trace_real_tensors(flat: FlatCall, tensors: tuple[torch.Tensor, ...]) -> Traced:
    """Tracing with real tensors through `make_fx`: handles whatever runs, sees only what this example did."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names, weights = [], []
    for name, weight in (*flat.named_parameters(), *flat.named_buffers()):
        names.append(name)
        weights.append(weight)

    def run(*everything: torch.Tensor) -> tuple[torch.Tensor, ...]:
        swapped = dict(zip(names, everything[: len(names)], strict=True))
        result: tuple[torch.Tensor, ...] = torch.func.functional_call(flat, swapped, everything[len(names) :])
        return result

    with _module_stacks(flat), torch.fx.traceback.preserve_node_meta():
        graph_module = make_fx(run, tracing_mode="real", pre_dispatch=True)(*weights, *tensors)
    if writes_in_place(graph_module.graph):
        _make_functional(graph_module, (*weights, *tensors))
    inputs = [GraphInput("weight", name.removeprefix(f"{WRAPPER}."), "const") for name in names]
    inputs += [GraphInput("user", leaf.name, leaf.rate) for leaf in flat.layout.leaves]
    constants = _lift_constants(graph_module, inputs)
    return Traced(graph_module, inputs, constants)


def _make_functional(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> None:
    """Turn writes into values of their own, which takes fake values that share memory as the real ones do."""
    from lightcache_fx.passes.functionalize_writes import functionalize_writes

    FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*arguments)
    functionalize_writes(graph_module.graph)
    graph_module.recompile()


@contextmanager
def _module_stacks(flat: nn.Module) -> Iterator[None]:
    """Give every node traced inside the modules whose calls it was made in, as export does."""
    from torch.fx.traceback import current_meta

    stacks: list[dict[str, tuple[str, Any]]] = [{}]
    counts: dict[str, int] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: object) -> None:
            call = counts[path] = counts.get(path, -1) + 1
            name = f"{path}@{call}" if call else path
            stacks.append({**stacks[-1], name: (name, type(module))})
            current_meta["nn_module_stack"] = stacks[-1]

        return hook

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        stacks.pop()
        current_meta["nn_module_stack"] = stacks[-1]

    handles: list[Any] = []
    try:
        for path, module in flat.named_modules():
            handles += [
                module.register_forward_pre_hook(enter(path)),
                module.register_forward_hook(leave, prepend=False),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        current_meta.pop("nn_module_stack", None)


def _lift_constants(graph_module: fx.GraphModule, inputs: list[GraphInput]) -> dict[str, torch.Tensor]:
    """Turn tensor attributes that the trace left in the graph into inputs."""
    graph = graph_module.graph
    constants: dict[str, torch.Tensor] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(graph_module, str(node.target))
        if not isinstance(value, torch.Tensor):
            continue
        name = str(node.target)
        if name not in constants:
            constants[name] = value
            inputs.append(GraphInput("constant", name, "const"))
            with graph.inserting_after(last[-1]) if last else graph.inserting_before(None):
                placeholder = graph.placeholder(f"constant_{name}")
            placeholder.meta["val"] = value
            last.append(placeholder)
        node.replace_all_uses_with(next(p for p in last if p.target == f"constant_{name}"))
        graph.erase_node(node)
    return constants
