"""An independent reference: the eager model with values replaced by forward hooks, and the DeepCache package's bytes.

Nothing here knows the package under test. An oracle is called with the step's kind and the model's arguments:

    oracle = HookOracle(model, ["up_blocks.3.attentions.1"])
    oracle.step(True, **inputs_0)   # full: records what the named modules return
    oracle.step(False, **inputs_1)  # reuse: the eager model, with what they return replaced by the record
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

Step = tuple[bool, Mapping[str, Any]]  # (full step?, keyword arguments)


class Oracle(Protocol):
    def step(self, full: bool, /, **inputs: Any) -> list[torch.Tensor]: ...

    def hooked(self, full: bool) -> AbstractContextManager[None]: ...


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output, be it a tuple, a tensor or a diffusers output class."""
    tree = tuple(output.values()) if isinstance(output, dict) else output
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_bitwise(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], where: str = "") -> None:
    assert len(got) == len(expected), f"{where}: {len(got)} tensors, expected {len(expected)}"
    for index, (ours, reference) in enumerate(zip(got, expected, strict=True)):
        assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype), f"{where}: tensor {index}"
        if not torch.equal(ours, reference):
            difference = (ours.double() - reference.double()).abs()
            raise AssertionError(
                f"{where}: tensor {index} differs by up to {difference.max():.3g} in {int((difference > 0).sum())} of "
                f"{difference.numel()} values (scale {reference.double().abs().max():.3g})"
            )


def plain_step(model: nn.Module, **inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def hooked_step(model: nn.Module, **inputs: Any) -> list[torch.Tensor]:
    """A step of a model whose `enable_cache` has put diffusers' own hooks on it."""
    with torch.no_grad(), model.cache_context("one"):  # type: ignore[operator]
        return tensors(model(**inputs))


def full_steps(num_steps: int, interval: int) -> list[bool]:
    return [step % interval == 0 for step in range(num_steps)]


def run(oracle: Oracle, steps: Sequence[Step]) -> list[list[torch.Tensor]]:
    """The outputs of each step in turn."""
    return [oracle.step(full, **inputs) for full, inputs in steps]


@contextmanager
def scheduled(denoiser: nn.Module, oracle: Oracle, interval: int) -> Iterator[None]:
    """While open, the calls of a plain pipeline's denoiser are full and reuse steps of one run, counted from here."""
    full = (step % interval == 0 for step in itertools.count())
    stack = ExitStack()

    def enter(module: nn.Module, args: Any) -> None:
        stack.enter_context(oracle.hooked(next(full)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.close()

    handles = [denoiser.register_forward_pre_hook(enter), denoiser.register_forward_hook(leave)]
    try:
        yield
    finally:
        stack.close()
        for handle in handles:
            handle.remove()


def detach_tree(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), tree)


class HookOracle:
    """Replaces the outputs of the modules at `paths`, for each call that a step makes of them."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._model = model
        self._modules = [model.get_submodule(path) for path in paths]
        self._kept: dict[tuple[int, int], Any] = {}  # (module, its call within the step) -> output

    @property
    def kept_bytes(self) -> int:
        return storage_bytes(self._kept)

    def step(self, full: bool, /, **inputs: Any) -> list[torch.Tensor]:
        with self.hooked(full):
            return plain_step(self._model, **inputs)

    @contextmanager
    def hooked(self, full: bool) -> Iterator[None]:
        """The model's modules record (full) or replay while this is open: one step."""
        with ExitStack() as stack:
            for index, module in enumerate(self._modules):
                handle = module.register_forward_hook(self._record(index) if full else self._replay(index))
                stack.callback(handle.remove)
            yield

    def _record(self, index: int) -> Callable[..., None]:
        calls = itertools.count()

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._kept[index, next(calls)] = detach_tree(output)

        return hook

    def _replay(self, index: int) -> Callable[..., Any]:
        calls = itertools.count()

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return detach_tree(self._kept[index, next(calls)])  # a copy: later layers may write in place

        return hook


class ResidualOracle:
    """Replaces the blocks from `first` to `last` by `in + residual`, stream by stream.

    A block's streams are its arguments `hidden_states` and `encoder_hidden_states`; which of the returned tensors
    continues which stream is told by their shapes, which must therefore differ.
    """

    STREAMS = ("hidden_states", "encoder_hidden_states")

    def __init__(self, model: nn.Module, first: str, last: str) -> None:
        self._model = model
        self._first = model.get_submodule(first)
        self._last = model.get_submodule(last)
        self._residuals: dict[torch.Size, torch.Tensor] = {}
        self._inputs: dict[torch.Size, torch.Tensor] = {}

    @property
    def kept_bytes(self) -> int:
        return storage_bytes(self._residuals)

    def step(self, full: bool, /, **inputs: Any) -> list[torch.Tensor]:
        with self.hooked(full):
            return plain_step(self._model, **inputs)

    @contextmanager
    def hooked(self, full: bool) -> Iterator[None]:
        before = self._first.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        after = self._last.register_forward_hook(self._record if full else self._replay)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        streams = [arguments[name].clone() for name in self.STREAMS if arguments.get(name) is not None]
        self._inputs = {stream.shape: stream for stream in streams}
        assert len(self._inputs) == len(streams), "streams of one shape cannot be told apart"

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        streams = [stream for stream in pytree.tree_leaves(output) if stream is not None]
        self._residuals = {stream.shape: stream - self._inputs[stream.shape] for stream in streams}
        assert len(self._residuals) == len(streams), "streams of one shape cannot be told apart"

    def _replay(self, module: nn.Module, args: Any, output: Any) -> Any:
        def restore(stream: torch.Tensor) -> torch.Tensor:
            return self._inputs[stream.shape] + self._residuals[stream.shape]

        return pytree.tree_map_only(torch.Tensor, restore, output)


def storage_bytes(tree: Any) -> int:
    """Bytes of the distinct storages behind the tensors of a tree."""
    storages = [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_helper_bytes(helper: Any) -> tuple[int, int]:
    """Tensors and bytes that an enabled `DeepCacheSDHelper` holds, each storage counted once.

    It stores what every module returned that it wrapped and did not skip. A block's output and the outputs of its last
    layer are often one tensor, hence the count by storage.
    """
    cached = pytree.tree_leaves(list(helper.cached_output.values()))
    storages = {leaf.untyped_storage().data_ptr() for leaf in cached if isinstance(leaf, torch.Tensor)}
    return len(storages), storage_bytes(cached)
