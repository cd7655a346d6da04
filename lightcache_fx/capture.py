"""Capture: a module and one real call -> one flat ATen graph whose weights are inputs.

Routes, in order: an eager warm-up call (it fills lazily computed caches with real tensors), `torch.export` in
non-strict mode, and, where that fails, tracing with real tensors. Real-tensor tracing bakes in Python decisions that
depended on the example, so every capture, whatever its route, is compared with the eager model on other inputs of the
same shapes and refused when it differs. The module is put back as it was afterwards.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind as ExportInput
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from lightcache_fx.calls import Call, CallLayout
from lightcache_fx.errors import ArgumentError, CaptureError, CaptureMismatchError
from lightcache_fx.graphs import GraphInput, drop_unused_inputs, input_of, placeholders, schema_of
from lightcache_fx.marks import Mark, marked_modules
from lightcache_fx.module_state import ModuleState, weight_slots
from lightcache_fx.opaque import bind_opaque_calls, opaque_submodules, suspect_path
from lightcache_fx.verify import check_against_eager

log = logging.getLogger(__name__)

_WRAPPER = "model"
_MAX_OPAQUE = 8


@dataclass(frozen=True)
class Capture:
    """A model's graph for one signature.

    Attributes:
        graph_module: flat ATen graph that returns a tuple; placeholders have a `GraphInput` in their metadata.
        constants: tensor constants of the model's code, by name.
        output_spec: how the returned tensors and `output_constants` make up the model's output.
        output_constants: the leaves of the output that are no tensors, by position.
        marks: what each `lightcache::mark` node in the graph stands for, by its tag.
        route: `export`, `export with ... opaque` or `trace`.
        verified: whether the graph was compared with eager (never for fake tensors).
        layout: the call that it was captured from.
    """

    graph_module: fx.GraphModule
    constants: dict[str, torch.Tensor]
    output_spec: pytree.TreeSpec
    output_constants: tuple[tuple[int, object], ...]
    marks: tuple[Mark, ...]
    route: str
    verified: bool
    layout: CallLayout

    def rebuild_output(self, tensors: Sequence[object]) -> object:
        """The model's own output structure around the tensors that a program returned."""
        flat = list(tensors)
        for position, value in self.output_constants:
            flat.insert(position, value)
        return pytree.tree_unflatten(flat, self.output_spec)


@dataclass
class _OutputRecord:
    """What a traced call returned beside tensors; held outside the module, whose attributes export restores."""

    spec: pytree.TreeSpec | None = None
    constants: tuple[tuple[int, object], ...] = ()
    marks: list[Mark] = field(default_factory=list)


class _FlatCall(nn.Module):
    """The model as a function of flat tensors that returns flat tensors."""

    def __init__(self, model: nn.Module, layout: CallLayout, marked: Sequence[str]) -> None:
        super().__init__()
        self.train(model.training)
        self.model = model
        self.layout = layout
        self.marked = tuple(marked)
        self.record = _OutputRecord()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.layout.rebuild(tensors)
        with marked_modules(self.model, self.marked) as self.record.marks:
            flat, self.record.spec = pytree.tree_flatten(type(self.model).forward(self.model, *args, **kwargs))
        found = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        self.record.constants = tuple((i, leaf) for i, leaf in enumerate(flat) if not isinstance(leaf, torch.Tensor))
        for _, value in self.record.constants:
            if not isinstance(value, type(None) | bool | int | float | str | torch.dtype):
                raise ArgumentError(
                    f"{type(self.model).__name__} returns a {type(value).__qualname__} inside its output; expected"
                    f" tensors, numbers and None in tuples, lists, dicts or registered output classes; pass"
                    f" return_dict=False, or register the class with torch.utils._pytree.register_dataclass"
                )
        return tuple(found)


def capture(module: nn.Module, call: Call, *, mark: Sequence[str] = ()) -> Capture:
    """Capture `module` for the shapes, dtypes, devices and constants of `call`.

    Args:
        module: in evaluation mode; its weights may be real, fake or on the meta device.
        call: as `CallReader.read` gives it, with real or fake tensors.
        mark: module paths whose arguments and returned values must be found in the graph (`Capture.marks`).

    Raises:
        CaptureError: the module is in training mode, writes to its own buffers or inputs, or no route can trace it; the
            message has the operation and the source line where each route stopped.
        CaptureMismatchError: it was traced, but computes something else than the eager model.
    """
    if module.training:
        raise CaptureError(
            f"{type(module).__name__} is in training mode (dropout and batch statistics on); call .eval() first"
        )
    refuse_autocast(call)
    fake = detect_fake_mode((call.tensors, *module.parameters())) is not None or any(
        tensor.device.type == "meta" for tensor in (*call.tensors, *module.parameters())
    )
    # Inference tensors cannot be versioned or exported, so everything here runs outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        call = Call(call.layout, tuple(_own(call.tensors)))
        before = ModuleState.take(module)
        weights = {name: table[key] for name, (table, key) in weight_slots(module).items()}
        buffers = [(name, buffer, buffer._version, buffer.clone()) for name, buffer in module.named_buffers()]
        vars(module).pop("forward", None)  # an offload hook around the drop-in, which is what calls us
        try:
            if not fake:
                _run_eager(module, call)
            written = [name for name, buffer, version, _ in buffers if buffer._version != version]
            if written:
                raise CaptureError(
                    f"forward of {type(module).__name__} writes to its buffer {written[0]}; a step must be pure"
                )
            attempt = _Attempt(module, call, tuple(mark), fake, weights)
            captured = (
                attempt.by("export", _export) or attempt.by_opaque_submodules() or attempt.by("trace", _trace_real)
            )
        finally:
            for _, buffer, version, content in buffers:
                if buffer._version != version:
                    buffer.copy_(content)
            before.restore()
    if captured is not None:
        return captured
    if attempt.mismatch is not None:
        raise type(attempt.mismatch)("; ".join(attempt.failures)) from attempt.mismatch
    raise CaptureError(
        f"{type(module).__name__} cannot be captured as one static graph: {'; '.join(attempt.failures)}; make that line"
        f" independent of tensor values, or leave this model untransformed"
    )


_Trace = Callable[["_FlatCall", tuple[torch.Tensor, ...]], "_Traced"]


class _Attempt:
    """The routes tried for one capture, and why each failed."""

    def __init__(
        self, module: nn.Module, call: Call, mark: tuple[str, ...], fake: bool, weights: dict[str, torch.Tensor | None]
    ) -> None:
        self.module, self.call, self.mark, self.fake, self.weights = module, call, mark, fake, weights
        self.state = ModuleState.take(module)
        self.failures: list[str] = []
        self.mismatch: CaptureMismatchError | None = None
        self.last_error: BaseException | None = None

    def by(self, route: str, trace: _Trace, *, around: AbstractContextManager[None] | None = None) -> Capture | None:
        """The verified capture of one route, or None with the reason noted; the module is as it was either way."""
        if self.fake and route != "export":
            return None
        flat = _FlatCall(self.module, self.call.layout, self.mark)
        try:
            with around or nullcontext():
                traced = _own_lazy_weights(trace(flat, self.call.tensors), self.module, self.weights)
                captured = _finish(flat, traced, route=route, verified=not self.fake)
            if not self.fake:
                check_against_eager(captured, self.module, self.call)
        except ArgumentError:
            raise
        except CaptureMismatchError as error:
            self.mismatch = self.last_error = error
            self.failures.append(str(error))
        except Exception as error:  # noqa: BLE001 - whatever stops a route is reported, and the next route is tried
            self.last_error = error
            self.failures.append(f"by {route}: {explain_failure(error)}")
        else:
            return captured
        finally:
            touched = self.state.restore()
            log.debug("capture by %s touched %d containers of the module", route, touched)
        log.info("capture of %s failed %s", type(self.module).__name__, self.failures[-1])
        return None

    def by_opaque_submodules(self) -> Capture | None:
        """Export with the innermost module that stopped the trace as one operation; again while others stop it."""
        paths: list[str] = []
        while not self.fake and len(paths) < _MAX_OPAQUE and self.last_error is not None:
            path = suspect_path(self.module, self.last_error)
            if path is None or path in paths:
                return None
            paths.append(path)
            regions = opaque_submodules(self.module, paths, lambda: _run_eager(self.module, self.call))
            captured = self.by(f"export with {', '.join(paths)} opaque", _export, around=regions)
            if captured is not None:
                return captured
        return None


def refuse_autocast(call: Call) -> None:
    """Raise a `CaptureError` where `torch.autocast` is on: a program holds one precision."""
    if any(torch.is_autocast_enabled(kind) for kind in {t.device.type for t in call.tensors} - {"meta"}):
        raise CaptureError(
            "torch.autocast is on; lightcache_fx captures one precision: load the model in it and leave autocast"
        )


def _own(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors that can be traced: versioned, and each argument another one, since tracers know inputs by identity."""
    seen: set[int] = set()
    for tensor in tensors:
        yield tensor.clone() if tensor.is_inference() or id(tensor) in seen else tensor
        seen.add(id(tensor))


def _run_eager(module: nn.Module, call: Call) -> object:
    args, kwargs = call.layout.rebuild(call.tensors)
    return type(module).forward(module, *args, **kwargs)  # hooks of the root run around the drop-in


@dataclass(frozen=True)
class _Traced:
    """What a route yields: a graph, what each placeholder is, and tensor constants by name."""

    graph_module: fx.GraphModule
    inputs: list[GraphInput]
    constants: dict[str, torch.Tensor]


def _export(flat: _FlatCall, tensors: tuple[torch.Tensor, ...]) -> _Traced:
    """`torch.export`, non-strict; functionalised only where the model writes in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(flat, tensors, strict=False)
        if any((schema := schema_of(node)) is not None and schema.is_mutable for node in program.graph.nodes):
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
            inputs.append(GraphInput("weight", str(spec.target).removeprefix(f"{_WRAPPER}."), "const"))
        elif spec.kind is ExportInput.CONSTANT_TENSOR:
            name = str(spec.target).removeprefix(f"{_WRAPPER}.")
            value = program.constants[str(spec.target)]
            if isinstance(value, FakeTensor) and not isinstance(tensors[0], FakeTensor):
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
    return _Traced(program.graph_module, inputs, constants)


def _trace_real(flat: _FlatCall, tensors: tuple[torch.Tensor, ...]) -> _Traced:
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
    inputs = [GraphInput("weight", name.removeprefix(f"{_WRAPPER}."), "const") for name in names]
    inputs += [GraphInput("user", leaf.name, leaf.rate) for leaf in flat.layout.leaves]
    constants = _lift_constants(graph_module, inputs)
    return _Traced(graph_module, inputs, constants)


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


def _own_lazy_weights(traced: _Traced, module: nn.Module, weights: dict[str, torch.Tensor | None]) -> _Traced:
    """Buffers that only the warm-up call made, and that go with it, become constants of the capture."""
    now = {name: table[key] for name, (table, key) in weight_slots(module).items()}
    for index, binding in enumerate(traced.inputs):
        if binding.kind == "weight" and weights.get(binding.name) is not now[binding.name]:
            traced.inputs[index] = GraphInput("constant", binding.name, "const")
            traced.constants[binding.name] = now[binding.name]
    return traced


def _finish(flat: _FlatCall, traced: _Traced, *, route: str, verified: bool) -> Capture:
    """One clean graph: typed inputs, module paths as the user knows them, normalised."""
    from lightcache_fx.passes import normalize

    source = traced.graph_module.graph
    bind_opaque_calls(traced.graph_module)
    names = iter(traced.inputs)
    bindings = {node: next(names) for node in source.nodes if node.op == "placeholder"}
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    returned: tuple[Any, ...] = ()
    for node in source.nodes:
        if node.op == "placeholder":
            binding = bindings[node]
            new = graph.placeholder(_identifier(binding.name))
            new.meta = {"val": node.meta.get("val"), "lightcache_input": binding}
        elif node.op == "output":
            returned = tuple(fx.map_arg(node.args[0], mapping.__getitem__))
            continue
        else:
            new = graph.node_copy(node, mapping.__getitem__)
            new.meta = {key: node.meta[key] for key in ("val", "stack_trace", "lightcache_flops") if key in node.meta}
            new.meta["nn_module_stack"] = _strip_wrapper(node.meta.get("nn_module_stack") or {})
        mapping[node] = new
    graph.output(returned)
    graph_module = normalize(fx.GraphModule(traced.graph_module, graph, class_name="Capture"))
    drop_unused_inputs(graph_module.graph, ("weight", "constant"))
    graph_module.recompile()
    used = {input_of(node).name for node in placeholders(graph_module.graph)}
    constants = {name: value for name, value in traced.constants.items() if name in used}
    record = flat.record
    assert record.spec is not None
    return Capture(
        graph_module, constants, record.spec, record.constants, tuple(record.marks), route, verified, flat.layout
    )


def _identifier(name: str) -> str:
    """A Python name for a weight or argument: `0.weight` -> `_0_weight`."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "input"
    return f"_{plain}" if plain[0].isdigit() else plain


def _strip_wrapper(stack: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Module paths as the user knows them: the flat-call wrapper and its `model.` prefix are gone."""
    stripped = {}
    for key, (path, kind) in stack.items():
        if path.startswith(f"{_WRAPPER}.") or path.partition("@")[0] == _WRAPPER:
            stripped[key] = (path.removeprefix(_WRAPPER).removeprefix("."), kind)
    return stripped


def explain_failure(error: BaseException) -> str:
    """One line: what stopped a route, and the innermost line of model code it was at."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = _model_line(error)
    return f"{type(error).__name__}: {first[:300]}{f' at {where}' if where else ''}"


def _model_line(error: BaseException) -> str:
    """`file.py:123, in forward: source line` of the innermost frame that is neither torch's nor ours."""
    import traceback

    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not re.search(r"[/\\](torch|lightcache_fx)[/\\]", frame.filename):
            file = re.split(r"[/\\]", frame.filename)[-1]
            found = f"{file}:{frame.lineno}, in {frame.name}: {frame.line}"
    return found
