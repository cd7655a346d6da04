"""How long an operation takes, roughly: the slower of its arithmetic and its memory traffic, plus its launch.

Used to compare plans with each other, never as a promise of milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lightcache_fx.axis_rules.registry import bound_arguments
from lightcache_fx.graphs import is_view, num_bytes, placeholders, schema_of, tensors_of


@dataclass(frozen=True)
class Machine:
    """What a device does in a second, as dense matrix products and large copies reach it.

    Attributes:
        flops: a multiply-add counts as two.
        bytes: read or written, from and to memory.
        launch: seconds that an operation costs at least.
        cache: tensors of up to so many bytes are found in a cache by the operation that reads them next.
        cached: bytes read or written there.
        fresh: bytes of large new allocations that are written for the first time, which the system maps page by page.
        fresh_from: allocations of so many bytes are large: the allocator gives them back at once when they are freed.
        run: contiguous bytes that a slice must have in a row to be read or written at full speed.
    """

    flops: float
    bytes: float
    launch: float
    cache: int = 0
    cached: float = math.inf
    fresh: float = math.inf
    fresh_from: int = 0
    run: int = 1

    def moving(self, num_bytes: float) -> float:
        """Seconds to read or write a tensor that has just been used, or will be."""
        return num_bytes / (self.cached if num_bytes <= self.cache else self.bytes)

    def slicing(self, part: float, run: int) -> float:
        """Seconds to read or write a slice of something large, `part` bytes of which `run` lie in a row."""
        return part / self.bytes * max(1.0, self.run / run)

    def allocating(self, num_bytes: float) -> float:
        """Seconds that a new tensor costs beside writing it."""
        return num_bytes / self.fresh if num_bytes >= self.fresh_from else 0.0

    def seconds(self, flops: float, moving: float) -> float:
        """One operation, its operands and results moved in so many seconds."""
        return max(flops / self.flops, moving) + self.launch


CPU = Machine(
    flops=1.5e11, bytes=2.5e10, launch=5e-6, cache=2**22, cached=6e10, fresh=3.5e9, fresh_from=2**25, run=256
)  # fmt: skip
"""Two cores of a server (EPYC, 32 MiB of third-level cache) and glibc, whose M_MMAP_THRESHOLD grows to 32 MiB: measured
with sums of 64 KiB to 128 MiB and oneDNN's convolutions."""
GPU_HALF = Machine(flops=4e14, bytes=2.5e12, launch=4e-6, run=64)
"""NVIDIA H100, 16-bit matrix products; its data sheet has 9.9e14 FLOP/s dense and 3.35e12 bytes/s at most."""
GPU_FLOAT = Machine(flops=5e13, bytes=2.5e12, launch=4e-6, run=64)
"""The same, float32 without TF32."""


def machine_of(graph: fx.Graph, *, cuda: bool) -> Machine:
    """The machine that a graph is planned for; on a GPU by the dtype of most bytes of its weights and inputs."""
    if not cuda:
        return CPU
    total = half = 0
    for node in placeholders(graph):
        for tensor in tensors_of(node):
            if tensor.is_floating_point():
                total += tensor.nbytes
                half += tensor.nbytes * (tensor.dtype in (torch.float16, torch.bfloat16))
    return GPU_HALF if 2 * half > total else GPU_FLOAT


def is_free(node: fx.Node, flops: int) -> bool:
    """Whether a call neither computes nor moves anything: a view."""
    schema = schema_of(node)
    writes = schema is not None and schema.is_mutable
    return not flops and ((is_view(node) and not writes) or not num_bytes(node))


_CONVOLUTIONS = {getattr(torch.ops.aten, f"conv{rank}d").default for rank in (1, 2, 3)}
_UNFOLDED = 3.0
"""Time of torch's own CPU convolution, which unfolds its input, over oneDNN's (30 MiB, 3-D: 60 ms over 18)."""


def slowdown(node: fx.Node, shape: Sequence[int]) -> float:
    """How many times longer than oneDNN's a convolution on the CPU takes when its input has this shape.

    torch chooses the kernel by size, by a rule of thumb that small inputs fail: a chunk may run on another kernel than
    the whole. Source: `ConvParams::use_mkldnn` in native/Convolution.cpp.
    """
    if node.target not in _CONVOLUTIONS:
        return 1.0
    args = bound_arguments(node)
    source, weight = (args[name].meta["val"] for name in ("input", "weight"))
    bias = args["bias"].meta["val"] if args["bias"] is not None else None
    rank = weight.dim() - 2

    def each(value: int | Sequence[int] | str) -> list[int]:
        values = [0] if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
        return values * rank if len(values) == 1 else values

    with torch.no_grad():
        part = source.new_empty(shape)
    settings = [each(args[name]) for name in ("stride", "padding", "dilation")]
    groups, bias_shape = args["groups"], None if bias is None else bias.shape
    choice = torch._C._select_conv_backend(  # noqa: SLF001 - the choice that the kernel's dispatcher makes
        part, weight, bias, *settings, False, [0] * rank, groups, bias_shape
    )
    return _UNFOLDED if choice.name.startswith("Slow") else 1.0
