"""Lowering: a program's graph handed to a compiler of PyTorch, piece by piece where something must stay as it is.

A program is one static graph, so nothing has to be traced or guarded again: the backend gets the graph and the tensors
of the first call. Regions that run chunk by chunk and copies to and from the device keep their place and order: what
lies between them is compiled, and of a region its bodies are, once each, and looped over. Pieces that compute the same
(the blocks of a model, what programs have in common) are one part, compiled once.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from lightcache_fx.boxed import BoxedCodeGen
from lightcache_fx.chunked import ChunkedRegion
from lightcache_fx.errors import LoweringError
from lightcache_fx.graphs import copy_graph, output_node
from lightcache_fx.packages import Packages, Strides, part_digest
from lightcache_fx.policy import Compile
from lightcache_fx.repeats import graph_key, repeated_blocks, share_of_time, share_to_compile
from lightcache_fx.self_checks import copied, first_difference, own_results
from lightcache_fx.static_slots import without_results, written_arguments
from lightcache_fx.transfers import OFFLOAD, PREFETCH, RELEASE, WAIT
from lightcache_fx.varying import Varying, compiled_for_sizes, marked, varying_arguments

log = logging.getLogger(__name__)

Run = Callable[..., Any]

_COPIES = (PREFETCH, WAIT, OFFLOAD, RELEASE)
_MAX_LAYOUTS = 4
_MAX_SIZES = 64
"""Of a part whose sizes vary: each has been compared, and more of them cost nothing."""
_PAYS = 0.3
"""Of a graph's calls; pieces cost a start of the compiler each, and fusions across their borders."""
_LEFT = 0.1
"""Of a graph's time, roughly: what repeated blocks leave is not worth a compiler's time where it is no more."""
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compiled(graph_module: fx.GraphModule, args: Sequence[Any], settings: Compile) -> Run:
    """What a backend makes of a graph for arguments like these.

    The backend is called as Dynamo would call it. Only CUDA graphs go through Dynamo, by which their static inputs are
    told from others; what they return is overwritten by their next run, so it is copied.
    """
    from torch._dynamo import lookup_backend, mark_static_address  # a second to import
    from torch._inductor import list_mode_options
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    options = dict(settings.options)
    if settings.backend == "inductor":
        options = {**list_mode_options(settings.mode), **options}
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if has_cuda_graphs(settings, tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.nn.Parameter):
                mark_static_address(tensor, guard=False)
        written = written_arguments(graph_module.graph)
        graph_module = without_results(graph_module, written)
        made = torch.compile(graph_module, fullgraph=True, dynamic=False, options=options, backend=settings.backend)

        def run(*given: Any) -> list[Any]:
            torch.compiler.cudagraph_mark_step_begin()
            results = list(map(copied, made(*given)))
            for place, argument in written.items():
                results.insert(place, given[argument])
            return results

        return run
    backend = lookup_backend(settings.backend)
    if settings.backend != "inductor":
        return backend(graph_module, list(args), **options)
    # Inductor keeps what it compiled on disk only where its inputs come with a ShapeEnv, as Dynamo's do; nothing in it
    # may be symbolic, and of a real tensor Inductor would make symbols.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(arg, static_shapes=True) if isinstance(arg, torch.Tensor) else arg for arg in args]
    return backend(graph_module, fakes, **({"config_patches": options} if options else {}))


def has_cuda_graphs(settings: Compile, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether what is compiled runs as CUDA graphs."""
    return settings.mode in WITH_CUDA_GRAPHS and any(tensor.is_cuda for tensor in tensors)


@dataclass
class CompileState:
    """What has been compiled of a program.

    Attributes:
        backend: by what.
        pieces: how many graphs the program calls: one, or those between regions and copies, the repeated blocks, and
            the bodies of regions.
        parts: the different ones among them; each is compiled once, for all programs that have it.
        packages: what was compiled before the module was saved; taken instead of compiling.
    """

    backend: str = "eager"
    pieces: int = 0
    parts: set[_Compiled] = field(default_factory=set)
    packages: Packages | None = None

    def __str__(self) -> str:
        done = sum(part.times > 0 or part.loaded > 0 for part in self.parts)
        loaded = f", {self.loaded} from packages" if self.packages is not None else ""
        return f"{self.backend}: {done} of {len(self.parts)} part{'s' if len(self.parts) != 1 else ''}{loaded}"

    @property
    def compiled(self) -> int:
        """How many times a part has been compiled; more than there are parts where tensors came in other layouts."""
        return sum(part.times for part in self.parts)

    @property
    def loaded(self) -> int:
        """How many times a part was taken from a package instead."""
        return sum(part.loaded for part in self.parts)

    @property
    def seconds(self) -> float:
        """That compiling the parts took, the first run of each included."""
        return sum(part.seconds for part in self.parts)


def lower(
    graph_module: fx.GraphModule, settings: Compile, name: str, packages: Packages | None = None
) -> tuple[Run, CompileState]:
    """A function with the arguments and results of a program's `forward`.

    Args:
        graph_module: the program; it is left as it is, but for the bodies of its regions, which are compiled.
        settings: by what compiler, and how.
        name: of the program, for messages.
        packages: that hold its parts, compiled; None compiles them here.

    Raises:
        LoadError: the packages do not hold a part.
    """
    state = CompileState(settings.backend, packages=packages)
    boxed = isinstance(graph_module.graph._codegen, BoxedCodeGen)  # noqa: SLF001 - there is no getter
    return _lowered(graph_module, settings, name, state, boxed=boxed), state


def _lowered(gm: fx.GraphModule, settings: Compile, name: str, state: CompileState, *, boxed: bool = False) -> Run:
    for node in gm.graph.nodes:
        region = node.meta.get("lightcache_region")
        if isinstance(region, ChunkedRegion):
            region.lower(partial(_lowered, settings=settings, name=f"{name}/{node.name}", state=state))
    graph, _ = copy_graph(gm.graph)
    copy = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    blocks = _blocks(graph, settings)
    if not any(map(_stays, graph.nodes)) and not blocks and not boxed:
        return _piece(copy, settings, name, state)
    return _lowered_in_pieces(copy, settings, name, state, blocks, boxed=boxed)


def _blocks(graph: fx.Graph, settings: Compile) -> dict[fx.Node, str]:
    """The blocks to compile apart; by default where what is left to compile is so little that it pays."""
    if settings.blocks is False or settings.mode in WITH_CUDA_GRAPHS or varying_arguments(graph):
        return {}  # sizes would be arguments of each block, which Dynamo compiles for one number first
    blocks = repeated_blocks(graph)
    return blocks if settings.blocks is True or share_to_compile(graph, blocks) <= _PAYS else {}


def _stays(node: fx.Node) -> bool:
    """Whether a call is made as it is: a region, a module that could not be traced, a copy."""
    return node.op == "call_module" or (node.op == "call_function" and node.target in _COPIES)


def _lowered_in_pieces(
    gm: fx.GraphModule,
    settings: Compile,
    name: str,
    state: CompileState,
    blocks: Mapping[fx.Node, str],
    *,
    boxed: bool,
) -> Run:
    """Split a graph around each call that stays as it is and each repeated block; what is between is compiled."""
    part = 0
    numbers: dict[Any, int] = {}
    staying: set[int] = set()
    block: str | None = None
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if source in numbers and numbers[source] in staying:
            numbers[node] = numbers[source]  # one of its results
        elif _stays(node):
            numbers[node] = part = part + 1
            staying.add(part)
            part += 1
            block = None
        else:
            part += blocks.get(node) != block
            block = blocks.get(node)
            numbers[node] = part
    rest = {node for node, number in numbers.items() if node not in blocks and number not in staying}
    if blocks and share_of_time(gm.graph, rest) <= _LEFT:
        staying |= {numbers[node] for node in rest}
    whole = split_module(gm, gm, numbers.__getitem__, keep_original_order=True)
    for child, module in list(whole.named_children()):
        number = int(child.rpartition("_")[2]) if child.startswith("submod_") else None
        if number is not None and number not in staying and isinstance(module, fx.GraphModule):
            setattr(whole, child, _Called(_piece(module, settings, f"{name}/{number}", state)))
    if boxed:
        whole.graph.set_codegen(BoxedCodeGen())
        whole.recompile()
    run: Run = whole.forward
    return run


_SHARED: WeakValueDictionary[Hashable, _Compiled] = WeakValueDictionary()
"""What is compiled, by settings and by what it computes: the blocks of a model, and its programs, share much."""


def _piece(gm: fx.GraphModule, settings: Compile, name: str, state: CompileState) -> _Compiled:
    """A graph to be compiled, or one that computes the same and is known already."""
    state.pieces += 1
    single = _return_a_tuple(gm)
    structure = graph_key(gm.graph)
    key = None if structure is None else (repr(settings), single, structure, state.packages)
    found = _SHARED.get(key) if key is not None else None
    if found is None:
        digest = "" if structure is None else part_digest(settings, single, structure)
        if state.packages is not None:
            state.packages.claim(digest, name)
        found = _Compiled(gm, settings, name, single, digest, state.packages, varying=varying_arguments(gm.graph))
        if key is not None:
            _SHARED[key] = found
    state.parts.add(found)
    return found


def _return_a_tuple(gm: fx.GraphModule) -> bool:
    """Compilers want a tuple of results; whether it was none."""
    output = output_node(gm.graph)
    if not isinstance(output.args[0], fx.Node):
        return False
    output.args = ((output.args[0],),)
    gm.recompile()
    return True


class _Called(torch.nn.Module):
    """A compiled piece in the place of the module that it was compiled from."""

    def __init__(self, run: _Compiled) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: object) -> Any:
        """Call it."""
        results = self.run(*args)
        return results[0] if self.run.single else results


@dataclass(eq=False)
class _Compiled:
    """One graph, compiled at its first call, and again for tensors that are laid out otherwise.

    Attributes:
        single: whether what it was made of returns one value and no tuple of it.
        digest: equal for parts that compute the same, in every process; empty where that cannot be told.
        packages: where it is taken from instead of being compiled.
        varying: dimensions of its arguments whose sizes are symbols: it is compiled for many sizes at once.
        times: how often it has been compiled.
        loaded: how often it has been taken from a package.
        seconds: that this took, the first runs included.
    """

    graph_module: fx.GraphModule
    settings: Compile
    name: str
    single: bool
    digest: str = ""
    packages: Packages | None = None
    varying: Varying = field(default_factory=dict)
    times: int = 0
    loaded: int = 0
    seconds: float = 0.0
    _by_layout: dict[tuple[object, ...], Run] = field(default_factory=dict)
    _for_sizes: Run | None = None
    _fixed: bool = False

    def __call__(self, *args: Any) -> Sequence[Any]:
        key = tuple(arg.stride() if isinstance(arg, torch.Tensor) else arg for arg in args)
        if self.varying:
            key += tuple(args[index].shape for index in self.varying)
        run = self._by_layout.get(key)
        results: Sequence[Any] = self._first(key, args) if run is None else run(*args)
        return results

    def layouts(self) -> list[tuple[Any, ...]]:
        """The strides of the arguments that it has been called with."""
        return list(self._by_layout)

    def _first(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Sequence[Any]:
        if len(self._by_layout) == (_MAX_SIZES if self.varying else _MAX_LAYOUTS):
            del self._by_layout[next(iter(self._by_layout))]
        begun = time.perf_counter()
        own = own_results(self.graph_module, args) if self.settings.check else None
        if self.varying and (found := self._at_this_size(args, own)) is not None:
            self._by_layout[key] = found[0]
            self.seconds += time.perf_counter() - begun
            return found[1]
        packaged = self._packaged(key)
        try:
            run = packaged or compiled(self._copy(), args, self.settings)
            results: Sequence[Any] = run(*args)
        except Exception as error:
            raise LoweringError(
                f"compile: {self._by(packaged)} failed on program {self.name}: {type(error).__name__}:"
                f" {_first_line(error)}; {self._next_step(packaged)}"
            ) from error
        if own is not None:
            self._refuse_differences(results, own, packaged)
        self._by_layout[key] = run
        self.times += packaged is None
        self.loaded += packaged is not None
        self.seconds += time.perf_counter() - begun
        return results

    def _at_this_size(
        self, args: tuple[Any, ...], own: Sequence[tuple[Any, torch.Tensor | None]] | None
    ) -> tuple[Run, Sequence[Any]] | None:
        """Run what is compiled for many sizes; None where that does not work, and each is compiled by itself."""
        if self._fixed:
            return None
        try:
            made = self._for_sizes
            if made is None:
                made = compiled_for_sizes(self._copy(), self.settings, self._note)
            with marked(args, self.varying):
                results = list(made(*args))
            if own is not None:
                self._refuse_differences(results, own, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, the graph is compiled for this size alone
            log.warning(
                "program %s is compiled for each size by itself, since for sizes that vary backend %r failed: %s: %s",
                self.name,
                self.settings.backend,
                type(error).__name__,
                _first_line(error, lines=2),  # Dynamo has the compiler's own error in the second
            )
            self._for_sizes, self._fixed = None, True
            self._by_layout.clear()
            return None
        self._for_sizes = made
        return made, results

    def _note(self) -> None:
        self.times += 1

    def _packaged(self, strides: Strides) -> Run | None:
        if self.packages is None:
            return None
        found = self.packages.find(self.digest, strides)
        if found is None:
            log.info("program %s is compiled anew: no package is for arguments laid out as %s", self.name, strides)
        return found

    def _by(self, packaged: Run | None) -> str:
        return f"backend {self.settings.backend!r}" if packaged is None else "the saved package"

    def _next_step(self, packaged: Run | None) -> str:
        if packaged is not None:
            return "save the module again, or load it without compiled=True"
        if self.settings.backend in ("eager", "aot_eager"):
            return "leave compile out"
        return "try Compile(backend='aot_eager') to see whether the compiler is at fault, or leave compile out"

    def _copy(self) -> fx.GraphModule:
        """Compilers rewrite the graph that they are given."""
        graph, _ = copy_graph(self.graph_module.graph)
        return fx.GraphModule(self.graph_module, graph)

    def _refuse_differences(
        self, results: Sequence[Any], own: Sequence[tuple[Any, torch.Tensor | None]], packaged: Run | None
    ) -> None:
        found = first_difference(results, own)
        if found is not None:
            raise LoweringError(
                f"compile: {self._by(packaged)} computes something else than program {self.name} does: result"
                f" {found.index} is {found.off:.1e} of its largest element off, where rounding accounts for"
                f" {found.bound:.0e} at most;"
                f" {self._next_step(packaged) if packaged else 'use another backend, or leave compile out'}"
            )


def _first_line(error: BaseException, *, lines: int = 1) -> str:
    found = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(found[:lines])[:300] if found else "no message"
