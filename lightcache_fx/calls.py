"""One call of a model, taken apart: the tensors it passes, and everything else, which becomes part of the signature.

A call is bound to the parameters of `forward`, so that positional and keyword spellings are one. Its arguments are
flattened as pytrees; tensor leaves are the inputs of the captured graph, every other leaf is a constant of the
signature.
"""

from __future__ import annotations

import enum
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightcache_fx.errors import ArgumentError
from lightcache_fx.policy import Rate

if TYPE_CHECKING:
    from lightcache_fx.readings import Readings

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, slice, range, type(Ellipsis),
)  # fmt: skip

_STEP_NAMES = frozenset({"t", "sigma", "sigmas"})
_LATENT_NAMES = frozenset({"sample", "x", "z", "latents", "latent"})
_POSITIONAL = "args"  # an unnamed positional argument is called by its place: args0


def default_rate(parameter: str, *, first: bool) -> Rate:
    """The rate of a model argument where the policy declares none, by the field's naming of forward parameters.

    Timesteps change every step; the first argument, hidden states and the additional residuals of a side network change
    with the latent; everything else (prompt, image, size, masks) is fixed for one generation. A wrong guess costs
    speed, never correctness: hoisted values are recomputed whenever an input that they read is another one.
    """
    if "timestep" in parameter or parameter in _STEP_NAMES:
        return "step"
    if first or parameter in _LATENT_NAMES or parameter.endswith(("residuals", "residual", "block_samples")):
        return "latent"
    if parameter.endswith("hidden_states") and "encoder" not in parameter:
        return "latent"
    return "run"


@dataclass(frozen=True)
class InputLeaf:
    """One tensor argument: where it stands in the call and how often it changes."""

    name: str
    parameter: str
    rate: Rate


class TensorType(NamedTuple):
    """What a capture is valid for; strides only where a tensor is not contiguous, and of sizes above 1."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class CallLayout:
    """The tree of a call without its tensors. Equal layouts of equal tensor types share one capture.

    Attributes:
        method: which method of the module is called: `forward`, or `decode` and `encode` of an autoencoder.
    """

    spec: pytree.TreeSpec = field(hash=False)
    constants: tuple[tuple[int, object], ...] = field(compare=False)
    constant_keys: tuple[tuple[int, type, object], ...]
    leaves: tuple[InputLeaf, ...]
    positions: tuple[int, ...]
    tensor_types: tuple[TensorType, ...]
    numbers: tuple[tuple[int, type[int] | type[float]], ...] = ()  # which leaves were Python numbers, and of which kind
    method: str = "forward"
    has_generator: bool = False  # whether a torch.Generator was passed; None stands in its place

    @property
    def integers(self) -> frozenset[int]:
        """Which leaves were Python integers."""
        return frozenset(index for index, kind in self.numbers if kind is int)

    @property
    def is_repeated(self) -> bool:
        """Whether calls follow one another as denoising steps do: one of its inputs changes every step."""
        return any(leaf.rate == "step" for leaf in self.leaves)

    def shapes(self) -> str:
        """The shape of each tensor by its name, for messages."""
        return ", ".join(f"{leaf.name} {t.shape}" for leaf, t in zip(self.leaves, self.tensor_types, strict=True))

    def rebuild(self, tensors: Sequence[object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's `(args, kwargs)` with `tensors` in the tensor places."""
        flat: list[object] = [None] * (len(self.constants) + len(self.positions))
        for position, value in self.constants:
            flat[position] = value
        for position, tensor in zip(self.positions, tensors, strict=True):
            flat[position] = tensor
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        return args, kwargs


@dataclass(frozen=True)
class Call:
    """A layout and its tensors, in the layout's order."""

    layout: CallLayout
    tensors: tuple[torch.Tensor, ...]

    def run(self, module: nn.Module, tensors: Sequence[torch.Tensor] | None = None) -> object:
        """Run the eager model as the caller would have, hooks of the root aside; with other `tensors` if given."""
        args, kwargs = self.as_given(tensors)
        return method_of(module, self.layout.method)(module, *args, **kwargs)

    def as_given(self, tensors: Sequence[torch.Tensor] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The `(args, kwargs)` that the caller wrote, Python numbers included; with other `tensors` if given."""
        kinds = dict(self.layout.numbers)
        given = self.tensors if tensors is None else tensors
        return self.layout.rebuild([kinds[i](t.item()) if i in kinds else t for i, t in enumerate(given)])

    def of_rate(self, rate: Rate) -> tuple[torch.Tensor, ...]:
        """The tensors of one rate."""
        return tuple(t for t, leaf in zip(self.tensors, self.layout.leaves, strict=True) if leaf.rate == rate)


class CapturedCall(Protocol):
    """What running programs takes of the capture that they were made of, or of the file that they were loaded from."""

    @property
    def layout(self) -> CallLayout:
        """The call."""

    @property
    def route(self) -> str:
        """How the model was captured."""

    @property
    def readings(self) -> Readings | None:
        """What it takes for granted of the values of a call's tensors."""

    def rebuild_output(self, tensors: Sequence[object]) -> object:
        """The model's own output structure around the tensors that a program returned."""


def method_of(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method of the module's class, unbound: what stands on the instance (hooks of the root) runs around it."""
    found: Callable[..., Any] = getattr(type(module), name)
    return found


class CallReader:
    """Reads calls of one method.

    Args:
        module: whose calls.
        rates: declared rates by parameter name; they override `default_rate`.
        method: its name.

    Raises:
        ArgumentError: a rate names a parameter that the method does not have.
    """

    def __init__(self, module: nn.Module, *, rates: Mapping[str, Rate], method: str = "forward") -> None:
        self.owner = owner = type(module).__name__
        self.method = method
        parameters = list(inspect.signature(method_of(module, method)).parameters.values())[1:]
        self._signature = inspect.Signature(parameters)
        names = [p.name for p in parameters]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        unknown = [name for name in rates if name not in names and not takes_any]
        if unknown:
            raise ArgumentError(f"rates: {owner}.{method} has no parameter {unknown[0]!r}; it has {', '.join(names)}")
        self._rates = {name: rates.get(name, default_rate(name, first=i == 0)) for i, name in enumerate(names)}
        self._declared = dict(rates)

    def parameters(self) -> list[inspect.Parameter]:
        """The method's parameters, `self` left out."""
        return list(self._signature.parameters.values())

    def read(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
        """Bind and flatten one call.

        Returns:
            the call; a Python number given for a parameter of rate `step` has become a 0-d float64 tensor on the
            device of the call's first tensor, which computes as the number does.

        Raises:
            TypeError: the arguments do not fit `forward`, as Python words it.
            ArgumentError: an argument is of a type that can be neither captured nor compared.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        names = [p.name for p in self._signature.parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
        flat, spec = pytree.tree_flatten_with_path((bound.args, bound.kwargs))
        device = next((leaf.device for _, leaf in flat if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
        constants: list[tuple[int, object]] = []
        has_generator = False
        leaves: list[InputLeaf] = []
        tensors: list[torch.Tensor] = []
        positions: list[int] = []
        as_number: list[tuple[int, type[int] | type[float]]] = []
        for position, (path, leaf) in enumerate(flat):
            parameter, name = self._name_of(path, names)
            rate = self.rate_of(parameter)
            if rate == "step" and not isinstance(leaf, bool) and isinstance(leaf, numbers.Real):
                as_number.append((len(tensors), int if isinstance(leaf, numbers.Integral) else float))
                leaf = torch.tensor(float(leaf), dtype=torch.float64, device=device)
            if isinstance(leaf, torch.Tensor):
                leaves.append(InputLeaf(name, parameter, rate))
                tensors.append(leaf)
                positions.append(position)
            elif isinstance(leaf, torch.Generator):
                has_generator = True
                constants.append((position, None))
            elif isinstance(leaf, _CONSTANTS):
                constants.append((position, leaf))
            else:
                raise ArgumentError(
                    f"{self.owner}: argument {name} is a {type(leaf).__module__}.{type(leaf).__qualname__}; expected"
                    f" tensors, numbers, strings, None, or tuples, lists and dicts of them; pass its tensors as"
                    f" such, or"
                    f" register the type with torch.utils._pytree.register_dataclass"
                )
        types = tuple(_tensor_type(tensor) for tensor in tensors)
        keys = tuple((p, type(value), repr(value) if isinstance(value, slice) else value) for p, value in constants)
        layout = CallLayout(
            spec=spec,
            constants=tuple(constants),
            constant_keys=keys,
            leaves=tuple(leaves),
            positions=tuple(positions),
            tensor_types=types,
            numbers=tuple(as_number),
            method=self.method,
            has_generator=has_generator,
        )
        return Call(layout, tuple(tensors))

    def describe(self, layout: CallLayout) -> dict[str, str]:
        """Every argument of a call by its printable name, as messages word it."""
        kinds = dict(layout.numbers)
        words: list[object] = []
        for index, type_ in enumerate(layout.tensor_types):
            dtype = str(type_.dtype).removeprefix("torch.")
            strides = f", strides {list(type_.strides)}" if type_.strides is not None else ""
            text = f"{dtype}{list(type_.shape)}{strides} on {type_.device}"
            words.append(_Words(f"a Python {kinds[index].__name__}" if index in kinds else text))
        names = [p.name for p in self._signature.parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
        flat, _ = pytree.tree_flatten_with_path(layout.rebuild(words))
        found = {self._name_of(path, names)[1]: leaf if isinstance(leaf, _Words) else repr(leaf) for path, leaf in flat}
        return {**found, "generator": "a torch.Generator"} if layout.has_generator else found

    def rate_of(self, parameter: str) -> Rate:
        """How often an argument changes: as declared, or by its name."""
        known = self._rates.get(parameter) or self._declared.get(parameter)
        return known or default_rate(parameter, first=parameter == f"{_POSITIONAL}0")

    def _name_of(self, path: tuple[Any, ...], positional: list[str]) -> tuple[str, str]:
        """`(parameter, printable name)` of a leaf; `**kwargs` and `*args` entries count as parameters of their own."""
        side, key = path[0].idx, path[1]
        parameter = (
            (positional[key.idx] if key.idx < len(positional) else f"{_POSITIONAL}{key.idx}") if side == 0 else key.key
        )
        return parameter, parameter + pytree.keystr(path[2:])


class _Words(str):
    """What stands for a tensor in a call that is described; no leaf of a call is of this class."""

    __slots__ = ()


def _tensor_type(tensor: torch.Tensor) -> TensorType:
    strides = None
    if not tensor.is_contiguous():
        strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return TensorType(tuple(tensor.shape), strides, tensor.dtype, tensor.device)
