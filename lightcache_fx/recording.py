"""What a cut keeps, step by step, and how alike it stays: the reason why caching works, measured on a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from lightcache_fx.capture import Capture
from lightcache_fx.compiled import Compiled
from lightcache_fx.cuts import block_lists
from lightcache_fx.errors import ArgumentError, TransformError, nearest
from lightcache_fx.graphs import describe
from lightcache_fx.marks import marked_nodes
from lightcache_fx.module import runtime_of
from lightcache_fx.observed import Observed

_SMALLEST_NORM = 1e-30


def block_paths(module: nn.Module) -> list[str]:
    """The paths of a model's blocks: the members of each `ModuleList` directly below it, in the model's order.

    Of a U-Net the levels down and up, of a transformer its blocks.
    """
    return [path for blocks in block_lists(module) for path in blocks]


@dataclass
class Recording:
    """Values that a cut kept, of one thread's run.

    Attributes:
        values: by a place's name and a guidance branch's place in the step, the value at each full step, on the CPU.
    """

    values: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The places, in the order in which they are computed: a module's path, with `[i]` for its i-th result."""
        return list(dict.fromkeys(name for name, _ in self.values))

    def at(self, name: str, branch: int = 0) -> list[torch.Tensor]:
        """The value at each full step.

        Raises:
            ArgumentError: nothing of that name, or of that branch, was recorded.
        """
        if (name, branch) not in self.values:
            if name in self.names:
                known = sorted(number for other, number in self.values if other == name)
                raise ArgumentError(f"branch: {name!r} was recorded for branches {known}, not {branch}")
            raise ArgumentError(f"name: nothing was recorded at {name!r}{nearest(name, self.names)}")
        return self.values[name, branch]

    def similarity(self, name: str, branch: int = 0) -> torch.Tensor:
        """The cosine similarity of the values at each two full steps.

        Returns:
            float64 (steps, steps), 1 on the diagonal; of a value that is zero everywhere 0 to every other, 1 to another
            such.

        Raises:
            ArgumentError: as `at`, or the values' shapes differ between steps.
        """
        values = self.at(name, branch)
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ArgumentError(f"{name}: recorded in several shapes, {sorted(shapes)}; record runs of one size each")
        flat = torch.stack([value.flatten().double() for value in values])
        norms = flat.norm(dim=1)
        products: torch.Tensor = flat @ flat.T / (norms[:, None] * norms).clamp_min(_SMALLEST_NORM)
        zero = norms <= _SMALLEST_NORM
        products[zero[:, None] & zero] = 1
        products.clamp_(-1, 1).fill_diagonal_(1)
        return products


@contextmanager
def record_kept(module: nn.Module) -> Iterator[Recording]:
    """While active, what a transformed module's cut keeps is recorded at each full step of the calling thread.

        unet = transform(pipe.unet, Policy(cache=Cache(cut=block_paths(pipe.unet), interval=1)))
        pipe.unet = unet
        with record_kept(unet) as recording:
            pipe(image)
        recording.similarity("up_blocks.3")

    An interval of 1 makes every step full, so that every step is recorded. Values are copied to the CPU in their own
    dtype: of a full-size model all blocks of all steps are tens of gigabytes, so name fewer places there.

    Args:
        module: what `transform` returned, with a policy that has a cache.

    Raises:
        TransformError: it is not transformed, or is being recorded already.
        ArgumentError: its policy keeps nothing.
    """
    runtime = runtime_of(module)
    if runtime.policy.cache is None:
        raise ArgumentError(
            "record_kept: the module's policy has no cache, so it keeps nothing; transform it with"
            " Policy(cache=Cache(cut=block_paths(module), interval=1))"
        )
    if runtime.observe is not None:
        raise TransformError(f"record_kept: this {type(module).__name__} is being recorded already")
    recording, thread = Recording(), threading.get_ident()

    def note(seen: Observed) -> None:
        if threading.get_ident() != thread:
            return
        for slot, name in _names(seen.compiled).items():
            values = recording.values.setdefault((name, seen.branch), [])
            values.append(seen.stores.slots[slot].detach().to("cpu", copy=True))

    runtime.observe = note
    try:
        yield recording
    finally:
        runtime.observe = None


def _names(compiled: Compiled) -> dict[str, str]:
    """For each slot, what a user calls its value."""
    captured, cut = compiled.capture, compiled.plan.cut
    assert isinstance(captured, Capture)
    graph = captured.graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    marks = {node: mark for mark, node in marked_nodes(graph, captured.marks).items()}
    found: dict[str, str] = {}
    for slot in cut.slots if cut is not None else ():
        node = nodes[slot.node]
        mark = marks.get(node)
        name = describe(node) if mark is None else mark.path + (f"[{mark.index}]" if mark.index else "")
        found[slot.name] = name if name not in found.values() else f"{name} ({slot.name})"
    return found
