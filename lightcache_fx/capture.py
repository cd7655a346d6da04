"""Capture: a module and one real call -> one flat ATen graph whose weights are inputs.

Routes, in order: an eager warm-up call (it fills lazily computed caches with real tensors), `torch.export` in
non-strict mode, the same with modules that stop it opaque, tracing with real tensors, and export with the values that
a run reads of tensors (`readings.py`). Real-tensor tracing bakes in Python decisions that depended on the example, so
every capture, whatever its route, is compared with the eager model on other inputs of the same shapes and refused when
it differs. The module is put back as it was afterwards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from lightcache_fx.calls import Call, CallLayout
from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.data_sizes import note_sizes
from lightcache_fx.errors import ArgumentError, CaptureError, CaptureMismatchError, SwapError
from lightcache_fx.fetching import WeightsAway, aliases
from lightcache_fx.graphs import (
    GraphInput,
    describe,
    drop_unused_inputs,
    input_of,
    placeholders,
    written_by,
    written_input,
)
from lightcache_fx.marks import Mark, place_marks
from lightcache_fx.module_state import ModuleState, weight_slots
from lightcache_fx.opaque import bind_opaque_calls, opaque_submodules, suspect_path
from lightcache_fx.rates import draws_random_numbers
from lightcache_fx.readings import Readings, noted, split_readings
from lightcache_fx.stand_ins import forget_fetches, stand_ins
from lightcache_fx.tracing import WRAPPER, FlatCall, Traced, Varying, trace_by_export, trace_real_tensors
from lightcache_fx.verify import check_against_eager, graph_arguments

log = logging.getLogger(__name__)

_MAX_OPAQUE = 8
"""Exports that are tried with another opaque submodule each, or with all of a class."""
_MAX_NAMED = 4
_ADVICE = "make that line independent of tensor values, or leave this model untransformed"


@dataclass(frozen=True)
class Capture:
    """A model's graph for one signature.

    Attributes:
        graph_module: flat ATen graph that returns a tuple; placeholders have a `GraphInput` in their metadata.
        constants: tensor constants of the model's code, by name.
        output_spec: how the returned tensors and `output_constants` make up the model's output.
        output_constants: the leaves of the output that are no tensors, by position.
        marks: what each `lightcache::mark` node in the graph stands for, by its tag.
        route: `export`, `export with ... opaque`, `trace` or `export by values`.
        verified: whether the graph was compared with eager (never for fake tensors).
        layout: the call that it was captured from.
        readings: what it takes for granted of the values of the call's tensors; None where that is nothing.
    """

    graph_module: fx.GraphModule
    constants: dict[str, torch.Tensor]
    output_spec: pytree.TreeSpec
    output_constants: tuple[tuple[int, object], ...]
    marks: tuple[Mark, ...]
    route: str
    verified: bool
    layout: CallLayout
    readings: Readings | None = None

    def rebuild_output(self, tensors: Sequence[object]) -> object:
        """The model's own output structure around the tensors that a program returned."""
        flat = list(tensors)
        for position, value in self.output_constants:
            flat.insert(position, value)
        return pytree.tree_unflatten(flat, self.output_spec)

    def holds_for(self, module: nn.Module, call: Call) -> bool:
        """Whether what was taken for granted of the values of tensors is so in a call of the same layout."""
        return self.readings is None or self.readings.hold_for(self.read_of(module, call.tensors))

    def read_of(self, module: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `readings` reads."""
        assert self.readings is not None
        return graph_arguments(self, self.readings.graph_module.graph, module, tensors)


def capture(
    module: nn.Module,
    call: Call,
    *,
    mark: Sequence[str] = (),
    away: WeightsAway | None = None,
    varying: Varying = MappingProxyType({}),
) -> Capture:
    """Capture `module` for the shapes, dtypes, devices and constants of `call`.

    Args:
        module: in evaluation mode; its weights may be real, fake or on the meta device.
        call: as `CallReader.read` gives it, with real or fake tensors.
        mark: module paths whose arguments and returned values must be found in the graph (`Capture.marks`).
        away: weights that stay where they are, elsewhere than where the module computes. The module is then traced with
            stand-ins for all of its weights, on the device, and every run that is needed copies what each operation
            reads. By default all weights are where the module computes. Of no effect where tensors are fake.
        varying: dimensions whose sizes the graph may leave open. Only `torch.export` says what it takes for granted of
            them, so no other route is tried.

    Raises:
        CaptureError: the module is in training mode, writes to its own weights or inputs, or no route can trace it; the
            message has the operation and the source line where each route stopped.
        CaptureMismatchError: it was traced, but computes something else than the eager model.
        SwapError: the weights of one operation, or its activations, do not fit the device, or cannot be read.
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
    with CAPTURE_LOCK.capturing(), torch.inference_mode(False), torch.no_grad(), _random_state(call):
        call = Call(call.layout, tuple(_own(call.tensors)))
        weights = {name: table[key] for name, (table, key) in weight_slots(module).items()}
        with _put_back(module) as buffers:
            if not fake:
                with away.fetched(module) if away is not None else nullcontext():
                    call.run(module)
            written = [name for name, buffer, version, _ in buffers if buffer._version != version]
            if written:
                raise CaptureError(
                    f"{call.layout.method} of {type(module).__name__} writes to its buffer {written[0]}; a step must be"
                    f" pure"
                )
            attempt = _Attempt(module, call, tuple(mark), fake, weights, away, varying=varying)
            captured = attempt.by_all_routes()
            if captured is None and call.layout.integers:  # an index, say, which a float64 tensor cannot be
                attempt = _Attempt(module, call, tuple(mark), fake, weights, away, whole_numbers=True, varying=varying)
                captured = attempt.by_all_routes()
    if captured is not None:
        if call.layout.has_generator and any(map(draws_random_numbers, captured.graph_module.graph.nodes)):
            raise CaptureError(
                f"{call.layout.method} of {type(module).__name__} draws random numbers from the torch.Generator that"
                f" it is given; a program cannot: draw them outside and pass them as a tensor"
            )
        return captured
    if attempt.mismatch is not None:
        raise type(attempt.mismatch)("; ".join((*attempt.failures, _ADVICE))) from attempt.mismatch
    raise CaptureError(
        f"{type(module).__name__} cannot be captured as one static graph: {'; '.join((*attempt.failures, _ADVICE))}"
    )


def check_at_another_size(captured: Capture, module: nn.Module, call: Call) -> None:
    """Compare a graph whose sizes are symbols with the eager model, for a call of other sizes than it was captured for.

    The module is left as it was.

    Raises:
        CaptureMismatchError: it computes something else.
    """
    refuse_autocast(call)
    with CAPTURE_LOCK.capturing(), torch.inference_mode(False), torch.no_grad(), _random_state(call), _put_back(module):
        call = Call(call.layout, tuple(_own(call.tensors)))
        check_against_eager(replace(captured, layout=call.layout), module, call)


def _random_state(call: Call) -> AbstractContextManager[None]:
    """Put torch's random generators back behind a capture, so that the call draws what it would have without."""
    devices = {tensor.device for tensor in call.tensors if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices, key=str))


_Buffer = tuple[str, torch.Tensor, int, torch.Tensor]


@contextmanager
def _put_back(module: nn.Module) -> Iterator[list[_Buffer]]:
    """Put a module back as it was, its buffers with it; yields each one's name, version and content."""
    before = ModuleState.take(module)
    buffers = [(name, buffer, buffer._version, buffer.clone()) for name, buffer in module.named_buffers()]
    vars(module).pop("forward", None)  # an offload hook around the drop-in, which is what calls us
    try:
        yield buffers
    finally:
        for _, buffer, version, content in buffers:
            if buffer._version != version:
                buffer.copy_(content)
        before.restore()


_Trace = Callable[[FlatCall, tuple[torch.Tensor, ...]], Traced]


class _Attempt:
    """The routes tried for one capture, and why each failed."""

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        mark: tuple[str, ...],
        fake: bool,
        weights: dict[str, torch.Tensor | None],
        away: WeightsAway | None = None,
        *,
        whole_numbers: bool = False,
        varying: Varying = MappingProxyType({}),
    ) -> None:
        self.module, self.call, self.mark, self.fake, self.weights = module, call, mark, fake, weights
        self.away = away if not fake else None
        self.whole_numbers, self.varying = whole_numbers, varying
        self.state = ModuleState.take(module)
        self.failures: list[str] = []
        self.mismatch: CaptureMismatchError | None = None
        self.last_error: BaseException | None = None

    def by_all_routes(self) -> Capture | None:
        """The first route's capture that passes the check."""
        if self.varying:
            return self.by("export", self._export)
        return (
            self.by("export", self._export)
            or self.by_opaque_submodules()
            or self.by("trace", self._trace_runs)
            or self.by_readings()
        )

    def by(
        self,
        route: str,
        trace: _Trace,
        *,
        around: AbstractContextManager[None] | None = None,
        read: Sequence[object] | None = None,
    ) -> Capture | None:
        """The verified capture of one route, or None with the reason noted; the module is as it was either way."""
        if self.fake and route != "export":
            return None
        flat = self._flat_call(read)
        try:
            with around or nullcontext():
                traced = _own_lazy_weights(trace(flat, self.call.tensors), self.module, self.weights)
                self._check_constants(traced)
                captured = _finish(flat, traced, route=route, verified=not self.fake)
                if self.varying:
                    _read_sizes_from_inputs(captured.graph_module)
            if not self.fake:
                with self._fetched():
                    if captured.readings is not None:
                        arguments = captured.read_of(self.module, self.call.tensors)
                        captured.readings.values = captured.readings.read(arguments)
                    check_against_eager(captured, self.module, self.call)
                    graph = captured.graph_module.graph
                    note_sizes(captured.graph_module, graph_arguments(captured, graph, self.module, self.call.tensors))
        except (ArgumentError, SwapError):
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

    def _fetched(self) -> AbstractContextManager[object]:
        return self.away.fetched(self.module) if self.away is not None else nullcontext()

    def _run(self) -> None:
        with self._fetched():
            self._flat_call()(*self.call.tensors)

    def _export(self, flat: FlatCall, tensors: tuple[torch.Tensor, ...]) -> Traced:
        if self.away is None:
            return trace_by_export(flat, tensors, fake=self.fake, varying=self.varying)
        with stand_ins(self.module, tensors, self.away.device) as fakes:
            return trace_by_export(flat, fakes)

    def _trace_runs(self, flat: FlatCall, tensors: tuple[torch.Tensor, ...]) -> Traced:
        with self._fetched():
            traced = trace_real_tensors(flat, tensors)
        if self.away is not None:
            forget_fetches(traced.graph_module.graph)
        return traced

    def _check_constants(self, traced: Traced) -> None:
        weights = [weight for weight in self.weights.values() if weight is not None]
        if self.away is not None and aliases(traced.constants.values(), weights):
            raise CaptureError(
                f"{type(self.module).__name__} reads a weight through a tensor that is no parameter or buffer of it, so"
                f" it would be read where it is kept"
            )

    def _flat_call(self, read: Sequence[object] | None = None) -> FlatCall:
        return FlatCall(self.module, self.call.layout, self.mark, whole_numbers=self.whole_numbers, read=read)

    def by_readings(self) -> Capture | None:
        """Export with what a run reads of tensors' values; what was read is checked before the capture is used."""
        if self.fake:
            return None
        try:
            with noted() as read:
                self._run()
        except Exception as error:  # noqa: BLE001 - by other arguments, a number as a float, say: other routes tell of it
            log.debug("a run of %s failed: %s", type(self.module).__name__, error)
            return None
        return self.by("export by values", self._export, read=read) if read else None

    def by_opaque_submodules(self) -> Capture | None:
        """Export with the innermost module that stopped the trace as one operation; again while others stop it."""
        paths: list[str] = []
        for number in range(_MAX_OPAQUE):
            path = suspect_path(self.module, self.last_error) if self.last_error is not None else None
            if self.fake or path is None or path in paths:
                return None
            kind = type(self.module.get_submodule(path))
            if any(type(self.module.get_submodule(other)) is kind for other in paths):  # a block's, so every block's
                alike = (name for name, part in self.module.named_modules() if type(part) is kind)
                paths += [name for name in alike if name not in paths]
            else:
                paths.append(path)
            if number:
                self.failures.pop()  # of fewer opaque ones
            regions = opaque_submodules(self.module, paths, self._run)
            names = ", ".join(paths) if len(paths) <= _MAX_NAMED else f"{paths[0]} and {len(paths) - 1} more"
            captured = self.by(f"export with {names} opaque", self._export, around=regions)
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


def _own_lazy_weights(traced: Traced, module: nn.Module, weights: dict[str, torch.Tensor | None]) -> Traced:
    """Buffers that only the warm-up call made, and that go with it, become constants of the capture."""
    now = {name: table[key] for name, (table, key) in weight_slots(module).items()}
    for index, binding in enumerate(traced.inputs):
        if binding.kind == "weight" and weights.get(binding.name) is not now[binding.name]:
            traced.inputs[index] = GraphInput("constant", binding.name, "const")
            traced.constants[binding.name] = now[binding.name]
    return traced


def _finish(flat: FlatCall, traced: Traced, *, route: str, verified: bool) -> Capture:
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
    written = written_input(graph)
    if written is not None:
        binding = input_of(written)
        kind = {"user": "argument"}.get(binding.kind, binding.kind)
        raise CaptureError(f"forward writes to its {kind} {binding.name}; a step must be pure")
    left = next((node for node in graph.nodes for _ in written_by(node)), None)
    if left is not None:
        raise CaptureError(f"forward writes in place by {describe(left)} = {left.target}; a step must be pure")
    place_marks(graph)
    graph_module = normalize(fx.GraphModule(traced.graph_module, graph, class_name="Capture"))
    drop_unused_inputs(graph_module.graph, ("weight", "constant"))
    record = flat.record
    assert record.spec is not None
    num_outputs = record.spec.num_leaves - len(record.constants)
    readings = split_readings(graph_module.graph, num_outputs, graph_module) if flat.read is not None else None
    graph_module.recompile()
    every = [graph_module.graph, *([readings.graph_module.graph] if readings is not None else [])]
    used = {input_of(node).name for one in every for node in placeholders(one)}
    constants = {name: value for name, value in traced.constants.items() if name in used}
    return Capture(
        graph_module,
        constants,
        record.spec,
        record.constants,
        tuple(record.marks),
        route,
        verified,
        flat.layout,
        readings,
    )


def _read_sizes_from_inputs(graph_module: fx.GraphModule) -> None:
    from lightcache_fx.passes import run_passes
    from lightcache_fx.passes.read_sizes_from_inputs import read_sizes_from_inputs

    run_passes(graph_module.graph, [("read_sizes_from_inputs", read_sizes_from_inputs)])
    graph_module.recompile()


def _identifier(name: str) -> str:
    """A Python name for a weight or argument: `0.weight` -> `_0_weight`."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "input"
    return f"_{plain}" if plain[0].isdigit() else plain


def _strip_wrapper(stack: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Module paths as the user knows them: the flat-call wrapper and its `model.` prefix are gone."""
    stripped = {}
    for key, (path, kind) in stack.items():
        if path.startswith(f"{WRAPPER}.") or path.partition("@")[0] == WRAPPER:
            stripped[key] = (path.removeprefix(WRAPPER).removeprefix("."), kind)
    return stripped


def explain_failure(error: BaseException) -> str:
    """One line: what stopped a route, and the innermost line of model code it was at."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    first = first.partition(_HINT_OF_TORCH)[0].strip()
    where = _model_line(error)
    return f"{type(error).__name__}: {first[:300]}{f' at {where}' if where else ''}"


_HINT_OF_TORCH = "It may be possible to trace this with dynamic shapes"


def _is_ours(file: str) -> bool:
    from lightcache_fx import passes

    folders: list[str] = [*passes.__path__, str(Path(__file__).parent)]
    return any(Path(folder) in Path(file).parents for folder in folders)


def _model_line(error: BaseException) -> str:
    """`file.py:123, in forward: source line` of the innermost frame that is neither torch's nor ours."""
    import traceback

    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not (re.search(r"[/\\]torch[/\\]", frame.filename) or _is_ours(frame.filename)):
            file = re.split(r"[/\\]", frame.filename)[-1]
            found = f"{file}:{frame.lineno}, in {frame.name}: {frame.line}"
    return found
