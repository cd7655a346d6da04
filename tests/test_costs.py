"""Prices of operations: what is in a cache, what is allocated anew, and which kernel a convolution runs on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from graphs import captured
from lightcache_fx.axes import Axis
from lightcache_fx.chunk_memory import Memory, Stretch
from lightcache_fx.chunk_trials import chunk_seconds, estimated
from lightcache_fx.costs import CPU, GPU_HALF, slowdown
from lightcache_fx.regions import trace_region

MIB = 2**20


def test_a_cached_tensor_is_cheaper_by_the_byte() -> None:
    assert CPU.moving(CPU.cache) < CPU.cache / CPU.bytes < CPU.moving(2 * CPU.cache)


def test_only_large_allocations_cost() -> None:
    assert CPU.allocating(CPU.fresh_from - 1) == 0.0 < CPU.allocating(CPU.fresh_from)
    assert GPU_HALF.allocating(2**30) == 0.0


def test_short_runs_are_dear() -> None:
    assert CPU.slicing(MIB, run=16) == CPU.run / 16 * CPU.slicing(MIB, run=4096)


def convolution(*shape: int) -> fx.Node:
    weight = torch.randn(32, 32, 3, 1, 1)
    graph = captured(lambda sample: F.conv3d(sample, weight, padding=(1, 0, 0)), torch.randn(shape)).graph_module.graph
    return next(node for node in graph.nodes if node.target is torch.ops.aten.conv3d.default)


def test_a_small_convolution_is_priced_by_the_kernel_that_torch_picks() -> None:
    """Of batch, channels, time and height together torch wants more than 20480 before it calls oneDNN."""
    node = convolution(1, 32, 8, 160, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with one, it never does for such a kernel
    try:
        assert slowdown(node, (1, 32, 8, 160, 4)) == 1.0
        assert slowdown(node, (1, 32, 8, 160, 1)) == 1.0
        assert slowdown(node, (1, 32, 8, 20, 4)) > 2.0
    finally:
        torch.set_num_threads(threads)


def test_other_operations_have_no_such_choice() -> None:
    graph = captured(lambda sample: sample.exp(), torch.randn(4, 4)).graph_module.graph
    assert all(slowdown(node, (4, 4)) == 1.0 for node in graph.nodes if node.op == "call_function")


def seconds(axis: Axis, count: int, *shape: int) -> float:
    """Predicted time beyond the whole's of an exponential in chunks, with what it reads the program's own."""
    given = captured(lambda sample: (sample.abs() * 2).exp().sin(), torch.randn(shape))
    memory = Memory(given.graph_module.graph)
    begin = next(i for i, node in enumerate(memory.order) if node.name.startswith("mul"))
    region = trace_region(memory.order[begin : begin + 2], axis)
    return chunk_seconds(estimated(Stretch(memory, region, begin, begin + 1), count))


def test_chunks_that_caches_hold_are_faster() -> None:
    assert seconds(Axis(0, 64), 32, 64, 2**18) < seconds(Axis(0, 64), 2, 64, 2**18)


def test_a_cut_of_the_innermost_dimension_is_slower() -> None:
    assert seconds(Axis(1, 64), 32, 2**14, 64) > seconds(Axis(0, 2**14), 32, 2**14, 64)
