"""The check that every capture must pass: the graph computes what the eager model computes, on inputs it never saw."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lightcache_fx.calls import Call, InputLeaf
from lightcache_fx.errors import CaptureMismatchError, LightcacheError
from lightcache_fx.graphs import input_of, placeholders
from lightcache_fx.module_state import weight_slots

if TYPE_CHECKING:
    from lightcache_fx.capture import Capture

log = logging.getLogger(__name__)

_SEEDS = (1, 2)
_WHY_OWN = "the trace has lost something that the model does"
_WHY_OTHERS = "a decision of the Python code depended on the example"


def check_against_eager(capture: Capture, module: nn.Module, call: Call) -> None:
    """Compare the captured graph with the eager model, bitwise, on the call's inputs and on others of the same shapes.

    The other inputs have noise for latents, once negated, another timestep, shuffled integers from the same range and
    other prefix lengths for masks; tensors whose values the capture takes for granted (`readings`) stay. Where the
    eager model itself differs between two runs (nondeterministic kernels), that difference bounds what is allowed.

    Raises:
        CaptureMismatchError: with the largest difference and the inputs that showed it.
    """
    _compare(capture, module, call, call.tensors, "the call's own inputs")
    fixed = capture.readings.arguments if capture.readings is not None else frozenset[str]()
    for seed in _SEEDS:
        varied = (vary(call, seed, fixed=fixed), vary(call, seed, only_latent=True))
        tensors = next((t for t in varied if _eager(module, call, t) is not None), None)
        if tensors is None:
            raise CaptureMismatchError(
                f"{type(module).__name__} accepts no other latents of the same shapes than the call's, so its graph"
                f" cannot be"
                f" checked; call it once with ordinary inputs"
            )
        _compare(capture, module, call, tensors, "other inputs of the same shapes")


def _compare(capture: Capture, module: nn.Module, call: Call, tensors: Sequence[torch.Tensor], inputs: str) -> None:
    expected = _eager(module, call, tensors) or []
    found = run_graph(capture, module, tensors)
    if len(expected) == len(found) and all(map(_same, expected, found)):
        return
    again = _eager(module, call, tensors) or []
    allowed = max(map(_difference, expected, again), default=0.0) * 4
    worst = max(map(_difference, expected, found), default=float("inf"))
    if len(expected) != len(found) or not worst <= allowed:
        raise CaptureMismatchError(
            f"the graph of {type(module).__name__} captured by {capture.route} differs from eager by {worst:.3g} on"
            f" {inputs}: {_WHY_OWN if tensors is call.tensors else _WHY_OTHERS}"
        )
    log.warning(
        "%s differs from itself by %.3g between two runs; its graph does no worse", type(module).__name__, allowed / 4
    )


def run_graph(capture: Capture, module: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run a captured graph as it is, with the module's present weights."""
    return list(capture.graph_module.forward(*graph_arguments(capture, capture.graph_module.graph, module, tensors)))


def graph_arguments(
    capture: Capture, graph: fx.Graph, module: nn.Module, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What a graph of a capture takes: the module's present weights, constants, and a call's tensors."""
    slots = weight_slots(module)
    user = {leaf.name: tensor for leaf, tensor in zip(capture.layout.leaves, tensors, strict=True)}
    args: list[torch.Tensor] = []
    for node in placeholders(graph):
        binding = input_of(node)
        if binding.kind == "weight":
            table, name = slots[binding.name]
            args.append(table[name])
        else:
            args.append(user[binding.name] if binding.kind == "user" else capture.constants[binding.name])
    return args


def _eager(module: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The eager model's output tensors; None when it does not accept varied inputs."""
    try:
        output = call.run(module, [t.clone() for t in tensors])
    except LightcacheError:  # nothing that other inputs are to blame for
        raise
    except (RuntimeError, ValueError, IndexError):
        if all(a is b for a, b in zip(tensors, call.tensors, strict=True)):
            raise
        return None
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def vary(call: Call, seed: int, *, only_latent: bool = False, fixed: Container[str] = ()) -> tuple[torch.Tensor, ...]:
    """Other inputs of the same shapes, dtypes and devices, plausible for what each one is; those named fixed stay."""
    generator = torch.Generator().manual_seed(seed)
    varied = [
        tensor if (only_latent and leaf.rate != "latent") or leaf.name in fixed else _vary(tensor, leaf, generator)
        for tensor, leaf in zip(call.tensors, call.layout.leaves, strict=True)
    ]
    return tuple(tensor.round() if i in call.layout.integers else tensor for i, tensor in enumerate(varied))


def _vary(tensor: torch.Tensor, leaf: InputLeaf, generator: torch.Generator) -> torch.Tensor:
    source = tensor.detach().cpu()
    if source.numel() == 0:
        return tensor
    if leaf.rate == "latent" and source.is_floating_point():
        varied = _vary_latent(source, positive=generator.initial_seed() % 2 == 0)
    elif source.dtype is torch.bool or (source.dim() > 1 and bool(((source == 0) | (source == 1)).all())):
        varied = _vary_mask(source, generator)
    elif leaf.rate == "step":
        factor = 0.25 + 0.5 * torch.rand((), generator=generator)
        varied = (source.double() * factor.double()).to(source.dtype)
    elif source.is_floating_point() or source.is_complex():
        noise = torch.randn(source.shape, generator=generator, dtype=torch.float32)
        scale, shift = (source.abs().float().std(unbiased=False), source.real.float().mean())
        varied = noise.to(source.dtype) * (scale + 0.1).to(source.dtype) + shift.to(source.dtype)
    else:
        low, high = int(source.min()), int(source.max())
        varied = torch.randint(low, high + 1, source.shape, generator=generator).to(source.dtype)
    result = (
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        if _dense(tensor)
        else None
    )
    varied = varied.to(tensor.device)
    return result.copy_(varied) if result is not None else varied


def _vary_latent(latent: torch.Tensor, *, positive: bool) -> torch.Tensor:
    """Noise about zero, and for the other seed its negative: a decision by the latent's sign cannot pass both."""
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    scale = float(latent.float().std(unbiased=False)) or 1.0
    return (noise * (scale if positive else -scale)).to(latent.dtype)


def _vary_mask(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another prefix length for every row, at least one: what attention and padding masks look like."""
    length = mask.shape[-1] if mask.dim() else 1
    rows = mask.reshape(-1, length)
    counts = torch.randint(1, length + 1, (rows.shape[0], 1), generator=generator)
    return (torch.arange(length).expand(rows.shape) < counts).to(mask.dtype).reshape(mask.shape)


def _dense(tensor: torch.Tensor) -> bool:
    return all(stride > 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())
    )


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    difference = (a.to(torch.complex128) - b.to(torch.complex128)).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0
