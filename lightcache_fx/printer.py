"""A stable, typed text form of an FX graph, and the unified diff of two of them.

The printed graph is this project's test language: every pass is tested by the diff between what it was given and what
it returned. So the text depends on the graph alone. It holds no path, memory address, id or time, the same program
exported twice prints the same, and a value keeps its FX node's name (names survive the deletion of other nodes), so
that a diff shows what a pass did and nothing else.

    %x : f32[1,3,8,8] = user "x"
    %w : f32[4,3,1,1] = weight "conv.weight"
    %conv2d : f32[1,4,8,8] = aten.conv2d.default(%x, %w)  # conv
    %to : bf16[1,4,8,8]{channels_last} = aten.to.dtype(%conv2d, bf16)
    return (%to,)

The idea of a deterministic typed printer as a product is JAX's (``jax._src.core``, the jaxpr pretty-printer); the short
types are those of ``torch.fx.Graph.print_readable`` and jaxtyping.
"""

import difflib
import enum
import json
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.text import Text
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from lightcache_fx.errors import ArgumentError
from lightcache_fx.graphs import expression

__all__ = ["HasGraphModule", "InputBinding", "diff", "format_dtype", "format_graph", "format_type", "print_diff"]

_SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
# The orders of dimensions, outermost first, that have a name of their own.
_NAMED_LAYOUTS = {(0, 2, 3, 1): "channels_last", (0, 2, 3, 4, 1): "channels_last_3d"}
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch.export's, on nodes that no module made


@runtime_checkable
class HasGraphModule(Protocol):
    """Anything that holds its program as ``graph_module``: this project's programs, an ``ExportedProgram``."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The program."""


class InputBinding(Protocol):
    """What ``placeholder.meta["lightcache_input"]`` says of a graph's input: its kind and the name it has outside."""

    @property
    def kind(self) -> str:
        """One word: weight, buffer, constant, user, slot, hoisted."""

    @property
    def name(self) -> str:
        """The parameter's qualified name, the argument's path, or the slot's name."""


Printable = fx.GraphModule | fx.Graph | HasGraphModule


def format_graph(graph: Printable, *, modules: bool = False) -> str:
    """Print a graph, one line a node, in the order it runs.

    A line reads ``%name : type = target(arguments)``. The type comes from ``node.meta["val"]`` and is left out where
    there is none; see :func:`format_type`. An input reads ``%x : f32[2] = weight "conv.weight"`` where
    ``node.meta["lightcache_input"]`` binds it (an :class:`InputBinding`), else ``= placeholder``. Operators print as
    torch names them (``aten.add.Tensor``), ``get_attr`` and submodules by their name in quotation marks, keyword
    arguments as ``key=value``, and an argument of a class without a text form of its own as ``<ClassName>``.

    Args:
        graph: a graph, a graph module, or an object with a ``graph_module``.
        modules: end each line with ``# module.path``, the innermost module whose code made the node.

    Returns:
        The text, with no newline at its end. Equal graphs give equal texts.

    Raises:
        ArgumentError: ``graph`` is none of these.
    """
    return "\n".join(_format_node(node, modules=modules) for node in _graph_of(graph).nodes)


def diff(
    a: Printable, b: Printable, *, names: tuple[str, str] = ("before", "after"), context: int = 3, modules: bool = False
) -> str:
    """Print the unified diff of two graphs.

    Args:
        a: the graph before: a graph, a graph module, or an object with a ``graph_module``.
        b: the graph after.
        names: what the two are called in the diff's header.
        context: unchanged lines shown around each change.
        modules: end each line with its module's path, as in :func:`format_graph`.

    Returns:
        The diff, with no newline at its end; the empty string where both print the same.

    Raises:
        ArgumentError: ``a`` or ``b`` is not a graph.
    """
    before, after = (format_graph(graph, modules=modules).splitlines() for graph in (a, b))
    return "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=context))


def print_diff(
    a: Printable, b: Printable, console: Console | None = None, *, names: tuple[str, str] = ("before", "after")
) -> None:
    """Show :func:`diff` in the terminal: removed lines red, added ones green, types dim, operators bold.

    Args:
        a: the graph before.
        b: the graph after.
        console: where to print; the default is rich's own on standard output.
        names: what the two are called.
    """
    console = Console() if console is None else console
    lines = diff(a, b, names=names).splitlines()[2:]  # below the header
    removed, added = (sum(line.startswith(sign) for line in lines) for sign in "-+")
    counts = f"{removed} removed, {added} added" if lines else "the same program"
    console.print(Text(f"{names[0]} → {names[1]}: {counts}", style="bold"), soft_wrap=True)
    for line in lines:
        text = Text(line, style={"-": "red", "+": "green", "@": "cyan"}.get(line[:1], ""))
        text.highlight_regex(r" : [^=]*(?= = )", "dim")
        text.highlight_regex(r"(?<== )[\w.]+(?=\()", "bold")
        console.print(text, soft_wrap=True)


def format_dtype(dtype: torch.dtype) -> str:
    """Print a dtype in short: ``f32``, ``bf16``, ``i64``, ``b8``; one without a short name as torch names it."""
    return _SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def format_type(value: object) -> str:
    """Print the type of a value as it stands in ``node.meta["val"]``.

    A tensor prints its dtype and sizes, ``f32[2,320,72,128]``, symbolic sizes as their expression; its strides only
    where it is not contiguous, by name or number: ``f32[2,4,8,8]{channels_last}``, ``f32[8,2]{stride 1,8}``. Several
    values print as ``(f32[2,4], i64[2])``, no value as ``none``, a symbolic number as ``int(2*s0)``, and any other
    value by its class: ``int``, ``float``, ``bool``. Devices are left out: a program prints alike on all of them.
    """
    if value is None:
        return "none"
    if isinstance(value, torch.Tensor):
        sizes = ",".join(_format_symbolic(size) for size in value.shape)
        return f"{format_dtype(value.dtype)}[{sizes}]{_format_layout(value)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(format_type(item) for item in value)})"
    for symbolic, name in ((torch.SymInt, "int"), (torch.SymFloat, "float"), (torch.SymBool, "bool")):
        if isinstance(value, symbolic):
            return f"{name}({_format_symbolic(value)})"
    return type(value).__name__


def _graph_of(graph: Printable) -> fx.Graph:
    if isinstance(graph, fx.Graph):
        return graph
    if isinstance(graph, fx.GraphModule):
        return graph.graph
    if isinstance(graph, HasGraphModule):
        return graph.graph_module.graph
    raise ArgumentError(
        f"cannot print {type(graph).__name__}: expected a torch.fx.Graph, a GraphModule, or an object whose "
        "graph_module is one; a plain nn.Module must be captured first"
    )


def _format_node(node: fx.Node, *, modules: bool) -> str:
    if node.op == "output":
        return f"return {_format_argument(node.args[0])}"
    declared = f"%{node.name} : {format_type(node.meta['val'])}" if "val" in node.meta else f"%{node.name}"
    module = _innermost_module(node) if modules else ""
    line = f"{declared} = {_format_call(node)}" + (f"  # {module}" if module else "")
    return line + _format_bodies(node, modules=modules) if "lightcache_region" in node.meta else line


def _format_bodies(node: fx.Node, *, modules: bool) -> str:
    """The body of a region's largest chunks, indented, and how many other bodies there are for the borders."""
    bodies = list(node.meta["lightcache_region"].bodies)
    inner = bodies[len(bodies) // 2] if len(bodies) > 2 else bodies[0]
    lines = [f"    {line}" for line in format_graph(inner, modules=modules).splitlines()]
    others = f"  # and {len(bodies) - 1} more for chunks at borders" if len(bodies) > 1 else ""
    return "\n".join([" {", *lines, "}" + others])


def _format_call(node: fx.Node) -> str:
    arguments = [_format_argument(argument) for argument in node.args]
    arguments += [f"{key}={_format_argument(value)}" for key, value in node.kwargs.items()]
    in_brackets = f"({', '.join(arguments)})"
    match node.op:
        case "placeholder":
            binding: InputBinding | None = node.meta.get("lightcache_input")
            if binding is not None:
                return f"{binding.kind} {json.dumps(binding.name)}"
            return f"placeholder{in_brackets}" if arguments else "placeholder"
        case "get_attr":
            return f"attribute {json.dumps(node.target)}"
        case "call_module" if "lightcache_region" in node.meta:
            region = node.meta["lightcache_region"]
            over = "".join(f"; result {w.output} over {arguments[w.input]}" for w in region.overwrites)
            return f"region {json.dumps(node.target)} [{region.label}{over}]{in_brackets}"
        case "call_module":
            return f"module {json.dumps(node.target)}{in_brackets}"
        case "call_method":
            return f"method {node.target}{in_brackets}"
        case _:
            assert callable(node.target)  # call_function, the one kind left
            return f"{_format_callable(node.target)}{in_brackets}"


def _format_callable(function: Callable[..., object]) -> str:
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        return str(function)
    if isinstance(function, HigherOrderOperator):
        return str(function.name())
    if isinstance(function, (types.FunctionType, types.BuiltinFunctionType, type)):
        return function.__name__
    return f"<{type(function).__name__}>"


def _format_argument(argument: Any) -> str:
    """Print one argument; whatever has no text of its own that is the same in every process prints by its class."""
    match argument:
        case fx.Node():
            return f"%{argument.name}"
        case None:
            return "none"
        case enum.Enum():
            return f"{type(argument).__name__}.{argument.name}"
        case bool() | int() | float() | complex() | str() | types.EllipsisType():
            return "..." if argument is ... else repr(argument)
        case torch.SymInt() | torch.SymFloat() | torch.SymBool():
            return _format_symbolic(argument)
        case torch.dtype():
            return format_dtype(argument)
        case torch.device() | torch.layout() | torch.memory_format():
            return str(argument).removeprefix("torch.")
        case torch.Tensor():
            return f"<Tensor {format_type(argument)}>"
        case tuple():
            items = ", ".join(_format_argument(item) for item in argument)
            return f"({items},)" if len(argument) == 1 else f"({items})"
        case list():
            return f"[{', '.join(_format_argument(item) for item in argument)}]"
        case Mapping():
            return f"{{{', '.join(f'{_format_argument(k)}: {_format_argument(v)}' for k, v in argument.items())}}}"
        case slice():
            return f"slice({', '.join(_format_argument(x) for x in (argument.start, argument.stop, argument.step))})"
        case _ if callable(argument) and not isinstance(argument, torch.nn.Module):
            return _format_callable(argument)
        case _:
            return f"<{type(argument).__name__}>"


def _format_symbolic(number: object) -> str:
    return str(number).replace(" ", "")


def _format_layout(tensor: torch.Tensor) -> str:
    """The strides where they are not the default ones, asked of no symbol's value (that would add a guard)."""
    if tensor.layout != torch.strided:
        return f"{{{str(tensor.layout).removeprefix('torch.')}}}"
    sizes, strides = list(map(expression, tensor.shape)), list(map(expression, tensor.stride()))
    if 0 in sizes or _is_dense(sizes, strides, tuple(range(len(sizes)))):
        return ""
    for order, name in _NAMED_LAYOUTS.items():
        if len(order) == len(sizes) and _is_dense(sizes, strides, order):
            return f"{{{name}}}"
    return f"{{stride {','.join(_format_symbolic(stride) for stride in tensor.stride())}}}"


def _is_dense(sizes: list[Any], strides: list[Any], order: tuple[int, ...]) -> bool:
    """Whether the elements follow each other with the dimensions nested in this order, outermost first."""
    expected = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != expected:
            return False
        expected = expected * sizes[dim]
    return True


def _innermost_module(node: fx.Node) -> str:
    """The path of the module whose code made the node; empty for the root and for nodes that no module made."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack or _NO_MODULE in stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path)
