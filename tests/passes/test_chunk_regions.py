"""A stretch of calls becomes one node that runs them chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.axes import Axis
from lightcache_fx.chunked import ChunkedRegion
from lightcache_fx.errors import PassError
from lightcache_fx.in_place import Overwrite
from lightcache_fx.liveness import timeline
from lightcache_fx.passes.base import PassResult
from lightcache_fx.passes.chunk_regions import PlannedRegion, chunk_regions

ROWS = Axis(0, 7)


def feed_forward() -> Captured:
    torch.manual_seed(0)
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    return captured(lambda sample: sample + F.linear(F.gelu(F.linear(sample, up)), down), torch.randn(7, 4))


def blur() -> Captured:
    torch.manual_seed(0)
    kernel = torch.randn(2, 2, 3, 3)
    return captured(
        lambda sample: F.conv2d(F.conv2d(sample, kernel, padding=1).relu(), kernel, padding=1), torch.randn(1, 2, 9, 5)
    )


def test_golden() -> None:
    given = feed_forward()
    after, result = given.apply(partial(chunk_regions, regions=[PlannedRegion("linear", "linear_1", ROWS, 2)]))
    assert result.counts == {"regions": 1}
    check_golden(diff(given.graph_module, after), "chunk_regions", __file__)


def test_golden_written_directly() -> None:
    """A region that ends in arithmetic: its last operator writes into the whole output."""
    given = feed_forward()
    after, result = given.apply(partial(chunk_regions, regions=[PlannedRegion("linear", "add", ROWS, 2)]))
    assert result.counts == {"regions": 1}
    check_golden(diff(given.graph_module, after), "chunk_regions_written_directly", __file__)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_numbers(count: int) -> None:
    given = feed_forward()
    after, _ = given.apply(partial(chunk_regions, regions=[PlannedRegion("linear", "add", ROWS, count)]))
    torch.testing.assert_close(given.run(after), given.run(), rtol=0, atol=1e-5)
    other = (torch.randn(7, 4),)
    torch.testing.assert_close(given.run(after, other), given.run(tensors=other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_halos(count: int) -> None:
    """Two convolutions in a region: the inner one's rows overlap from chunk to chunk."""
    given = blur()
    planned = PlannedRegion("conv2d", "conv2d_1", Axis(2, 9), count)
    after, _ = given.apply(partial(chunk_regions, regions=[planned]))
    torch.testing.assert_close(given.run(after), given.run(), rtol=0, atol=1e-4)
    (region,) = [n.meta["lightcache_region"] for n in after.graph.nodes if n.op == "call_module"]
    assert len(region.chunks) == count
    assert len(region.bodies) <= 5  # first, second, inner, last but one, last


def test_chunks_that_begin_between_the_rows_of_a_smaller_input() -> None:
    """Chunks of three rows of a doubled image begin on a row of the image and between two rows in turn."""
    given = captured(lambda sample: F.interpolate(sample, scale_factor=2.0).relu() + 1, torch.randn(1, 2, 7, 4))
    names = [node.name for node in given.graph_module.graph.nodes if node.op == "call_function"]
    planned = PlannedRegion(names[0], names[-1], Axis(2, 14), 5)
    after, _ = given.apply(partial(chunk_regions, regions=[planned]))
    assert torch.equal(given.run(after)[0], given.run()[0])


def test_a_value_that_is_read_along_two_axes_is_computed_before() -> None:
    given = captured(lambda sample: (wide := sample.abs() * 2) + wide.transpose(0, 1), torch.randn(6, 6))
    after, _ = given.apply(partial(chunk_regions, regions=[PlannedRegion("abs_1", "add", Axis(0, 6), 3)]))
    (region,) = [n.meta["lightcache_region"] for n in after.graph.nodes if n.op == "call_module"]
    assert "abs" not in str(region.body(0).graph)
    assert torch.equal(given.run(after)[0], given.run()[0])


def test_an_output_that_is_a_slice_is_allocated_without_gaps() -> None:
    given = captured(lambda sample: ((wide := sample.abs() * 2)[:, :3], wide.sum(1)), torch.randn(6, 12))
    names = [node.name for node in given.graph_module.graph.nodes if node.op == "call_function"]
    after, _ = given.apply(partial(chunk_regions, regions=[PlannedRegion(names[0], names[-1], Axis(0, 6), 3)]))
    (region,) = [n.meta["lightcache_region"] for n in after.graph.nodes if n.op == "call_module"]
    assert [output.strides for output in region.outputs] == [(3, 1), (1,)]
    assert all(map(torch.equal, given.run(after), given.run()))


def test_nothing_to_do() -> None:
    _, result = feed_forward().apply(partial(chunk_regions, regions=[]))
    assert not result.modified


def test_a_second_application_is_refused() -> None:
    regions = [PlannedRegion("linear", "linear_1", ROWS, 2)]
    given = feed_forward()
    with pytest.raises(PassError, match="no node %linear"):
        given.apply(partial(chunk_regions, regions=regions), partial(chunk_regions, regions=regions))


def test_an_axis_that_cannot_be_cut() -> None:
    given = captured(lambda sample: sample.softmax(dim=0) + 1, torch.randn(7, 4))
    with pytest.raises(PassError, match=r"cannot cut %softmax .. %add along dim 0: \[7\]: aten.softmax"):
        given.apply(partial(chunk_regions, regions=[PlannedRegion("softmax", "add", ROWS, 2)]))


# Outputs written over inputs -----------------------------------------------------------------------------------------

KERNEL = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
CUT_ROWS = Axis(2, 9)


def blur_of_a_value() -> Captured:
    """What the convolution reads is the program's own and read by nobody else."""
    return captured(lambda sample: F.conv2d(sample.abs(), KERNEL, padding=1).sin(), torch.randn(1, 2, 9, 5))


def over(first: str, last: str, axis: Axis, count: int, *overwrites: Overwrite) -> partial[PassResult]:
    return partial(chunk_regions, regions=[PlannedRegion(first, last, axis, count, overwrites=overwrites)])


def only_region(graph_module: fx.GraphModule) -> ChunkedRegion:
    (region,) = [n.meta["lightcache_region"] for n in graph_module.graph.nodes if n.op == "call_module"]
    assert isinstance(region, ChunkedRegion)
    return region


def test_golden_in_place() -> None:
    given = blur_of_a_value()
    after, _ = given.apply(over("conv2d", "conv2d", CUT_ROWS, 3, Overwrite(0, 0, delay=1)))
    check_golden(diff(given.graph_module, after), "chunk_regions_in_place", __file__)


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_a_halo_is_read_before_it_is_written_over(count: int) -> None:
    given = blur_of_a_value()
    after, _ = given.apply(over("conv2d", "conv2d", CUT_ROWS, count, Overwrite(0, 0, delay=1)))
    torch.testing.assert_close(given.run(after), given.run(), rtol=0, atol=1e-5)
    assert torch.equal(given.run(after)[0], given.run(after)[0])
    saved = timeline(given.graph_module.graph).peak_bytes - timeline(after.graph).peak_bytes
    assert saved > 0 or count == 2


@pytest.mark.parametrize("count", [2, 4, 7])
def test_without_a_halo_nothing_waits(count: int) -> None:
    given = captured(lambda sample: (sample.exp() * 2 + sample).sin(), torch.randn(7, 4))
    names = [node.name for node in given.graph_module.graph.nodes if node.op == "call_function"]
    after, _ = given.apply(over(names[1], names[2], ROWS, count, Overwrite(0, 0)))
    torch.testing.assert_close(given.run(after), given.run(), rtol=0, atol=1e-6)
    before = given.call.tensors[0].clone()
    given.run(after)
    assert torch.equal(given.call.tensors[0], before), "the caller's tensor was written over"


def test_two_outputs_over_two_inputs() -> None:
    def model(sample: torch.Tensor) -> torch.Tensor:
        left, right = sample.abs(), sample.sign()
        return (left + right).exp() * (left - right).exp()

    given = captured(model, torch.randn(7, 4))
    after, _ = given.apply(over("add", "sub", ROWS, 3, Overwrite(0, 0), Overwrite(1, 1)))
    assert torch.equal(given.run(after)[0], given.run()[0])
    assert only_region(after).overwritten() == {0: 0, 1: 1}


@pytest.mark.parametrize(
    ("model", "first", "overwrite", "reason"),
    [
        (lambda x: x.exp() + 1, "exp", Overwrite(0, 0), "it may be the caller's"),
        (lambda x: (y := x.abs()).exp() + y, "exp", Overwrite(0, 0), "it is read later"),
        (lambda x: (y := x.abs()).exp() + y.reshape(-1).sum(), "exp", Overwrite(0, 0), "it is read later"),
        (lambda x: (y := x.abs()).exp() + y[:, :1], "exp", Overwrite(0, 0), "it is read later"),
        (lambda x: (x.abs().exp() + 1, x.abs())[0].t().exp(), "exp", Overwrite(0, 0, delay=1), "the plan writes"),
        (lambda x: x.abs().exp() * 2, "exp", Overwrite(0, 1), "the plan writes"),
    ],
)
def test_what_must_not_be_written_over(
    model: Callable[[torch.Tensor], torch.Tensor], first: str, overwrite: Overwrite, reason: str
) -> None:
    given = captured(model, torch.randn(7, 4))
    with pytest.raises(PassError, match=f"%{first} .. %{first}.*{reason}"):
        given.apply(over(first, first, ROWS, 3, overwrite))


def test_another_layout_is_not_written_over() -> None:
    def model(sample: torch.Tensor) -> torch.Tensor:
        return sample.abs().t().exp().clone(memory_format=torch.contiguous_format).sin()

    with pytest.raises(PassError, match=r"cannot write %clone over %exp .*: their layouts differ"):
        captured(model, torch.randn(7, 4)).apply(over("clone", "clone", Axis(0, 4), 2, Overwrite(0, 0)))
