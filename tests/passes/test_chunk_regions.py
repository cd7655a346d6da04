"""A stretch of calls becomes one node that runs them chunk by chunk."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.axes import Axis
from lightcache_fx.errors import PassError
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
