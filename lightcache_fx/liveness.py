"""Liveness: the peak memory of a program, from its graph alone.

The graph is run once with fake tensors, as the code that `fx` generates for it would run: a value dies after the line
that uses it last. What lives is storages, not values, so views, in-place operators and calls that return their argument
cost nothing, and what a composite operator allocates within one node is counted while it lives. Nothing is guessed from
shapes but the workspaces of leaf kernels, see `lightcache_fx.workspaces`.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.table import Table
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

from lightcache_fx.data_sizes import agreeing_size, depends_on_data
from lightcache_fx.graphs import input_of, is_mark, module_path
from lightcache_fx.quiet import quiet_logs
from lightcache_fx.units import format_bytes
from lightcache_fx.workspaces import attention_on_cuda, workspace_bytes

CUDA_BLOCK = 512  # c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize
_FOREVER = 2**62
# Higher-order operators; operators without a fake kernel; sizes and numbers that depend on data.
_UNPREDICTABLE = (
    NotImplementedError,
    UnsupportedFakeTensorException,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
_LINEAR = torch.ops.aten.linear.default
_VIEW = torch.ops.aten.view.default
_WITH_NUMBERS = {
    getattr(packet, overload)
    for packet in (torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.div)
    for overload in ("Tensor", "Scalar")
}


@runtime_checkable
class HasWorkspace(Protocol):
    """A module called from a graph that says what it needs while it runs."""

    def memory_peak(self, rounding: int) -> int:
        """Bytes of its temporaries at their peak, outputs excluded; every allocation rounded up to `rounding` bytes."""


@runtime_checkable
class WritesOverInputs(Protocol):
    """A module called from a graph that makes some of its outputs in its inputs' place."""

    def overwritten(self) -> Mapping[int, int]:
        """The outputs that are written into an input's storage instead of one of their own: output to input."""


@dataclass(frozen=True)
class Block:
    """One storage that a program allocates, or the workspace of one kernel.

    Attributes:
        node: whose call allocates it.
        num_bytes: as the allocator rounds it.
        born: when, on the clock of the timeline, which counts operator calls.
        died: the first moment without it.
        workspace: whether it lives inside one kernel only.
    """

    node: fx.Node
    num_bytes: int
    born: int
    died: int
    workspace: bool = False


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        node: the call.
        before: bytes live when it begins.
        peak: the most bytes live while it runs: those live, its workspace, its temporaries and its outputs.
        after: bytes live when it is done and what it used last is freed.
        peak_at: when the peak is, on the timeline's clock.
        ended: when it is done, on the timeline's clock.
    """

    node: fx.Node
    before: int
    peak: int
    after: int
    peak_at: int
    ended: int


@dataclass(frozen=True)
class LocalPeak:
    """The most that a module's calls reach.

    Attributes:
        node: the call that reaches it.
        module: the innermost module of that call.
        num_bytes: live then.
        largest: the largest storages live then, largest first.
    """

    node: fx.Node
    module: str
    num_bytes: int
    largest: tuple[Block, ...]


@dataclass(frozen=True)
class Timeline:
    """What one run of a program allocates, call by call.

    All bytes are those of activations, which the run itself allocates; its outputs are live to the end. What the caller
    holds (weights, call inputs, slots, hoisted values, constants) is live throughout and counted apart. Copies of
    weights and slots that the caller hands over count as the run's own: it frees them.

    Attributes:
        steps: one for each call, in order.
        peak_bytes: the most that is live at once.
        peak_node: the call during which it is, or None for a program that allocates nothing.
        held_bytes: bytes of the inputs by kind: weight, constant, user, slot, hoisted.
        blocks: everything that is allocated.
        owners: for each call, those whose storages its value lives in; what lives in the caller's has none.
        strides: for each call, of each of its results; None where one is not a tensor.
        assumed: calls that cannot run with fake tensors (opaque modules, sizes that depend on data); they count as one
            fresh storage for each output, its size at its upper bound.
        cuda: whether it is predicted for a CUDA device.
    """

    steps: tuple[Step, ...]
    peak_bytes: int
    peak_node: fx.Node | None
    held_bytes: Mapping[str, int]
    blocks: tuple[Block, ...]
    owners: Mapping[fx.Node, frozenset[fx.Node]]
    strides: Mapping[fx.Node, tuple[tuple[int, ...] | None, ...]]
    assumed: tuple[fx.Node, ...]
    cuda: bool = False

    @property
    def rounding(self) -> int:
        """Every allocation is rounded up to a multiple of so many bytes."""
        return CUDA_BLOCK if self.cuda else 1

    def left_bytes(self, node: fx.Node) -> int:
        """Bytes of the storages that a call leaves behind."""
        return self._left.get(node, 0)

    @cached_property
    def _left(self) -> dict[fx.Node, int]:
        ended = {step.node: step.ended for step in self.steps}
        found: dict[fx.Node, int] = {}
        for block in self.blocks:
            if not block.workspace and block.died > ended[block.node]:
                found[block.node] = found.get(block.node, 0) + block.num_bytes
        return found

    def live_at(self, moment: int) -> list[Block]:
        """What is live at a moment, largest first."""
        live = [block for block in self.blocks if block.born <= moment < block.died]
        return sorted(live, key=lambda block: -block.num_bytes)

    def by_module(self, limit: int | None = None) -> list[LocalPeak]:
        """The peak of each module's own calls, highest first; at most `limit` rows."""
        highest: dict[str, Step] = {}
        for step in self.steps:
            known = highest.setdefault(module_path(step.node), step)
            if step.peak > known.peak:
                highest[module_path(step.node)] = step
        rows = sorted(highest.items(), key=lambda item: -item[1].peak)[:limit]
        return [LocalPeak(step.node, path, step.peak, tuple(self.live_at(step.peak_at)[:3])) for path, step in rows]

    def table(self, limit: int = 10) -> Table:
        """A rich table of `by_module`."""
        table = Table(title="highest modules", title_justify="left")
        for column in ("module", "call", "live", "largest then"):
            table.add_column(column, justify="right" if column == "live" else "left", overflow="fold")
        for row in self.by_module(limit):
            largest = ", ".join(_describe(block) for block in row.largest)
            table.add_row(row.module, f"%{row.node.name}", format_bytes(row.num_bytes), largest)
        return table

    def summary(self) -> str:
        """One line: the peak, where it is, and what the caller holds."""
        held = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in self.held_bytes.items())
        where = f" at %{self.peak_node.name}" if self.peak_node is not None else ""
        return f"activation peak {format_bytes(self.peak_bytes)}{where}; held: {held or 'nothing'}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, force_terminal=False, highlight=False)
        console.print(self.summary())
        console.print(self.table())
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()


def _describe(block: Block) -> str:
    return f"%{block.node.name}{' (workspace)' if block.workspace else ''} {format_bytes(block.num_bytes)}"


def timeline(graph: fx.Graph, *, cuda: bool | None = None) -> Timeline:
    """Predict what a run of `graph` allocates, from its placeholders' shapes; nothing is computed.

    Args:
        graph: placeholders have `lightcache_input` bindings and `val` metadata.
        cuda: predict for a CUDA device (its kernels, and sizes rounded up to 512 bytes as its caching allocator does),
            or for the CPU; by default whichever the values are on. On CUDA only what is on the device counts.
    """
    # A region's own peak may be asked for while the timeline of the graph around it is made.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), quiet_logs():
        return _Run(graph, cuda).timeline()


class _Run:
    """A graph's one run with fake tensors."""

    def __init__(self, graph: fx.Graph, cuda: bool | None) -> None:
        self.graph = graph
        values = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
        on_cuda = any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in values)
        self.kind = "cuda" if (on_cuda if cuda is None else cuda) else "cpu"
        self.moves = not (on_cuda and self.kind == "cuda")  # else some values may be on the CPU, and stay there
        self.rounding = CUDA_BLOCK if self.kind == "cuda" else 1
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = _Tracker(self.mode, self.kind, self.rounding)
        self.owners: dict[fx.Node, frozenset[fx.Node]] = {}
        self.strides: dict[fx.Node, tuple[tuple[int, ...] | None, ...]] = {}
        self.assumed: list[fx.Node] = []
        self.copies = {n for n in graph.nodes if n.op == "placeholder" and input_of(n).kind == "copy"}

    def timeline(self) -> Timeline:
        held: dict[str, int] = {}
        with self.mode:
            inputs = (node for node in self.graph.nodes if node.op == "placeholder")
            arguments = [self.argument(node, held) for node in inputs]
            steps: list[Step] = []
            with self.tracker:
                returned = self.run(self.graph, arguments, steps)
        blocks = self.tracker.close()
        del returned
        highest = max(steps, key=lambda step: step.peak, default=None)
        peak = highest.peak if highest is not None else 0
        where = highest.node if highest is not None and peak else None
        return Timeline(
            tuple(steps), peak, where, held, blocks, self.owners, self.strides, tuple(self.assumed), self.kind == "cuda"
        )

    def argument(self, node: fx.Node, held: dict[str, int]) -> Any:
        """A fake input; the caller's is counted by its kind, a copy that is handed over as if a call had made it."""
        value = self.fake(node.meta.get("val"))
        if node in self.copies:
            self.tracker.begin(node)
            self.tracker.note(value, 0)
        else:
            kind = input_of(node).kind
            held[kind] = held.get(kind, 0) + self.tracker.hold(value)
        return value

    def run(self, graph: fx.Graph, arguments: list[Any], steps: list[Step] | None) -> Any:
        """Run a graph as its generated code does, arguments held by the caller; steps are noted for the outermost.

        Copies that are handed over are held by nobody else: they are taken out of the list of arguments.
        """
        index = 0  # not enumerate(), which holds what it gave last
        values: dict[fx.Node, Any] = {}
        last_uses = _last_uses(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = arguments[index]
                if node in self.copies:
                    arguments[index] = None
                index += 1
            elif node.op == "get_attr":
                values[node] = self.attribute(node)
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            else:
                before = self.tracker.begin(node) if steps is not None else 0
                values[node] = self.call(node, values)
                if steps is not None:
                    self.owners[node] = self.tracker.owners(values[node])
                    self.strides[node] = _strides(values[node])
                self.tracker.now += 1  # what dies within the call dies before what the call uses last
                for used in last_uses.get(node, ()):
                    if used.op != "placeholder" or used in self.copies:
                        values[used] = None
                if steps is not None:
                    peak, peak_at = self.tracker.end()
                    steps.append(Step(node, before, peak, self.tracker.live, peak_at, self.tracker.now))
        return None

    def call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        mapped: Any = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = mapped
        if node.op == "call_module":
            return self.call_module(node, args)
        if is_mark(node):
            return args[0]
        if self.moves:
            args, kwargs = pytree.tree_map_only(torch.device, self.device, (args, kwargs))
        target: Any = node.target
        if self.kind == "cuda" and target is torch.ops.aten.scaled_dot_product_attention.default:
            outputs, extra = attention_on_cuda(*args, **kwargs)
            if outputs is not None:
                self.tracker.note(outputs, extra)
                return outputs
        try:
            return target(*args, **kwargs)
        except _UNPREDICTABLE:
            self.assumed.append(node)
        except RuntimeError:
            if not depends_on_data(node):
                raise
            self.assumed.append(node)  # sizes that must agree do not, at their bounds
        return self.fresh(node)

    def call_module(self, node: fx.Node, args: Sequence[Any]) -> Any:
        owner = node.graph.owning_module
        assert owner is not None
        module = owner.get_submodule(str(node.target))
        if isinstance(module, HasWorkspace):
            overwritten = module.overwritten() if isinstance(module, WritesOverInputs) else {}
            return self.fresh(node, module.memory_peak(self.rounding), overwritten, args)
        if isinstance(module, fx.GraphModule):
            return self.run(module.graph, list(args), None)
        self.assumed.append(node)
        return self.fresh(node)

    def fresh(
        self, node: fx.Node, workspace: int = 0, overwritten: Mapping[int, int] | None = None, args: Sequence[Any] = ()
    ) -> Any:
        """New storages for a call's outputs, by its metadata, but for those that are written over an argument."""
        outputs = self.fake(node.meta.get("val"))
        if overwritten:
            outputs = [args[overwritten[i]] if i in overwritten else output for i, output in enumerate(outputs)]
        self.tracker.note(outputs, workspace)
        return outputs

    def attribute(self, node: fx.Node) -> Any:
        found: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            found = getattr(found, name)
        value = self.fake(found)
        self.tracker.hold(value)
        return value

    def fake(self, tree: Any) -> Any:
        """Fake tensors of the same sizes and strides, each in a storage of its own."""
        return pytree.tree_map(self.fake_leaf, tree)

    def fake_leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sizes, strides = ([agreeing_size(n) for n in given] for given in (value.shape, value.stride()))
            device = self.device(value.device) if self.moves else value.device
            with self.tracker.paused():
                return torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)
        return agreeing_size(value) if isinstance(value, torch.SymInt) else value

    def device(self, _: torch.device) -> torch.device:
        # With its index: without one `aten.to` asks CUDA's runtime, which a CPU build of torch has not.
        return torch.device("cuda", 0) if self.kind == "cuda" else torch.device("cpu")


def _strides(value: Any) -> tuple[tuple[int, ...] | None, ...]:
    leaves = pytree.tree_leaves(value)
    return tuple(leaf.stride() if isinstance(leaf, torch.Tensor) else None for leaf in leaves)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What dies after each call: what it uses last, and its own value where nobody uses it.

    Source: `delete_unused_values` in torch/fx/graph.py, which writes `x = None` behind the call.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        dying = [used for used in node.all_input_nodes if used not in seen]
        seen.update(dying)
        found[node] = dying if node.users else [*dying, node]
    return found


class _Tracker(TorchDispatchMode):
    """Sees every operator that allocates, and every storage that dies."""

    def __init__(self, mode: FakeTensorMode, kind: str, rounding: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode, self.kind, self.rounding = mode, kind, rounding
        self.live = 0
        self.now = 0
        self._peak, self._peak_at = 0, 0
        self._node: fx.Node | None = None
        self._known: dict[int, weakref.ref[Any]] = {}
        self._open: dict[int, tuple[fx.Node, int, int]] = {}  # storage: whose, bytes, born
        self._blocks: list[Block] = []
        self._paused = False
        self._closed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._node is not None and self._node.target is _LINEAR and func is torch.ops.aten.add.Tensor:
            func = torch.ops.aten.add_.Tensor  # out of place only for tensor subclasses, native/Linear.cpp
        # From its cache, fake mode gives a copy that keeps strides too small a storage.
        self.mode.cache_enabled = func is not torch.ops.aten.copy.default
        outputs = func(*args, **kwargs)
        outputs = _with_real_strides(outputs, func, args, kwargs)
        if not self._paused and func.namespace != "prim":
            self.note(outputs, workspace_bytes(func, args, kwargs, outputs, self.kind))
        return outputs

    def hold(self, tree: Any) -> int:
        """Count storages as the caller's; returns their bytes."""
        total = 0
        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            if _key(storage) not in self._known:
                self._watch(storage)
                total += storage.nbytes()
        return total

    def note(self, outputs: Any, workspace: int) -> None:
        """One kernel: storages not seen before are its new ones."""
        self.now += 1
        assert self._node is not None
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            key = _key(storage)
            if key not in self._known:
                self._watch(storage)
                if tensor.device.type == self.kind:
                    size = -(-storage.nbytes() // self.rounding) * self.rounding
                    self._open[key] = (self._node, size, self.now)
                    self.live += size
        if workspace:
            self._blocks.append(Block(self._node, workspace, self.now, self.now + 1, workspace=True))
        if self.live + workspace > self._peak:
            self._peak, self._peak_at = self.live + workspace, self.now

    def owners(self, value: Any) -> frozenset[fx.Node]:
        """The calls that allocated the storages that a value lives in."""
        keys = (_key(tensor.untyped_storage()) for tensor in _tensors(value))
        return frozenset(self._open[key][0] for key in keys if key in self._open)

    def _watch(self, storage: Any) -> None:
        key = _key(storage)
        # The Python object of a storage lives as long as the storage itself.
        self._known[key] = weakref.ref(storage, lambda _: self._died(key))

    def _died(self, key: int) -> None:
        if self._closed:
            return
        del self._known[key]
        if key in self._open:
            node, size, born = self._open.pop(key)
            self.live -= size
            self._blocks.append(Block(node, size, born, self.now + 1))

    def begin(self, node: fx.Node) -> int:
        self._node = node
        self._peak, self._peak_at = self.live, self.now
        return self.live

    def end(self) -> tuple[int, int]:
        return self._peak, self._peak_at

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, what is allocated does not count."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def close(self) -> tuple[Block, ...]:
        """Everything allocated; deaths are no longer noted."""
        self._closed = True
        self._blocks += [Block(node, size, born, _FOREVER) for node, size, born in self._open.values()]
        return tuple(sorted(self._blocks, key=lambda block: block.born))


def _with_real_strides(output: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """An output with the strides that the C++ kernel gives it: fake ones may differ in dimensions of size 1.

    A batch of one image would look channels-last where the real tensor does not, and all later layouts would differ.
    Seen in views, and where TensorIterator meets a number or a 0-dimensional tensor and so takes its slow path.
    """
    source = args[0] if args else None
    if not isinstance(output, torch.Tensor) or not isinstance(source, torch.Tensor):
        return output
    with_number = len(args) > 1 and (isinstance(args[1], int | float) or _is_scalar(args[1]))
    pointwise = with_number and func in _WITH_NUMBERS and not kwargs
    if source.is_contiguous() or 1 not in source.shape or not (func is _VIEW or pointwise):
        return output
    with disable_current_modes():
        twin = torch.empty_strided(source.shape, source.stride(), device="meta")
        twin = twin.view(output.shape) if func is _VIEW else twin + torch.empty((), device="meta")
    return output.as_strided(output.shape, twin.stride(), output.storage_offset())


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _key(storage: torch.UntypedStorage) -> int:
    """The address of a storage, which fake ones have too; while one lives, no other has it."""
    address: int = storage._cdata  # noqa: SLF001 - data_ptr is 0 without data
    return address


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
