"""Reshapes, windows, padding and slices with drawn sizes: whatever is not refused is right."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from axis_rules.cases import aten
from axis_rules.check import call_of, check_axis, run_call, run_chunk
from lightcache_fx.axes import Axis, Reach
from lightcache_fx.axis_rules import CannotCut, needs_of

few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def numbered(*sizes: int) -> torch.Tensor:
    """Every element another one."""
    return torch.arange(1.0, math.prod(sizes) + 1).reshape(sizes)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two groupings of the same factors, each factor whole: some boundaries agree, some do not."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=2, max_size=5))

    def grouped() -> list[int]:
        ends = sorted({*draw(st.sets(st.integers(1, len(factors)))), len(factors)})
        return [math.prod(factors[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    return grouped(), grouped()


@st.composite
def axes(draw: st.DrawFn, sizes: list[int]) -> Axis:
    dim = draw(st.sampled_from([dim for dim, size in enumerate(sizes) if size > 1]))
    outer = draw(st.sampled_from([n for n in range(1, sizes[dim]) if sizes[dim] % n == 0]))
    rest = sizes[dim] // outer
    inner = draw(st.sampled_from([n for n in range(1, rest) if rest % n == 0]))
    return Axis(dim, rest // inner, outer, inner)


@few
@given(st.data())
def test_reshape(data: st.DataObject) -> None:
    """Allowed cuts are exact. What is offered in place of a refused one lies within it, and is allowed."""
    source, sizes = data.draw(reshapes())
    assume(math.prod(sizes) > 1)
    axis = data.draw(axes(sizes))
    call, values = call_of(aten.reshape.default, numbered(*source), sizes)
    try:
        needs_of(call, axis)
    except CannotCut as refusal:
        for finer in refusal.alternatives:
            assert finer.extent == axis.extent
            assert finer.size > 1
            assert finer.outer % axis.outer == finer.inner % axis.inner == 0
            check_axis(call, finer, values, run_call(call, values), exact=True)
    else:
        check_axis(call, axis, values, run_call(call, values), exact=True)


@few
@given(st.data())
def test_reshape_cuts_all_that_can_be_cut(data: st.DataObject) -> None:
    """A refused axis has no range in any one dimension of the input that holds the same elements in the same order."""
    source, sizes = data.draw(reshapes())
    assume(math.prod(sizes) > 1)
    axis = data.draw(axes(sizes))
    x = numbered(*source)
    call, _ = call_of(aten.reshape.default, x, sizes)
    try:
        needs_of(call, axis)
    except CannotCut:
        found = [axis.narrow(x.reshape(sizes), p, p + 1).flatten() for p in range(axis.size)]
        for dim, size in enumerate(source):
            for outer in (n for n in range(1, size + 1) if size % (n * axis.size) == 0):
                other = Axis(dim, axis.size, outer, size // (outer * axis.size))
                parts = [other.narrow(x, p, p + 1).flatten() for p in range(axis.size)]
                assert not all(map(torch.equal, found, parts))


@few
@given(
    size=st.integers(1, 12),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 6),
    dilation=st.integers(1, 3),
    data=st.data(),
)
def test_convolution(size: int, kernel: int, stride: int, padding: int, dilation: int, data: st.DataObject) -> None:
    """Numbers and weights are whole, so that sums are exact and one element too many or too few shows."""
    assume(size + 2 * padding >= dilation * (kernel - 1) + 1)
    x, w = numbered(1, 2, size), numbered(2, 2, kernel)
    call, values = call_of(aten.conv1d.default, x, w, None, [stride], [padding], [dilation])
    whole = run_call(call, values)
    assume(whole.shape[2] > 1)
    axis = data.draw(axes([1, 1, whole.shape[2]]))
    try:
        needs_of(call, axis)
    except CannotCut:
        assert axis.outer > 1
    else:
        start = data.draw(st.integers(0, axis.size - 1))
        stop = data.draw(st.integers(start + 1, axis.size))
        assert torch.equal(run_chunk(call, axis, start, stop, values), axis.narrow(whole, start, stop))


@few
@given(size=st.integers(1, 6), before=st.integers(-3, 6), after=st.integers(-3, 6), data=st.data())
def test_padding(size: int, before: int, after: int, data: st.DataObject) -> None:
    """Any padding, also such as takes elements away."""
    assume(size + min(before, 0) + min(after, 0) > 0 and size + before + after > 1)
    call, values = call_of(aten.constant_pad_nd.default, numbered(2, size), [before, after], -1.0)
    axis = data.draw(axes([1, size + before + after]))
    assume(axis.outer == 1)
    check_axis(call, axis, values, run_call(call, values), exact=True)


@few
@given(size=st.integers(1, 5), before=st.integers(0, 6), after=st.integers(0, 6))
def test_padding_with_the_ends(size: int, before: int, after: int) -> None:
    """Also for chunks that lie in padding alone."""
    assume(size + before + after > 1)
    call, values = call_of(aten.pad.default, numbered(2, size), [before, after], "replicate")
    check_axis(call, Axis(1, size + before + after), values, run_call(call, values), exact=True)


@few
@given(size=st.integers(2, 9), start=st.integers(-9, 9), stop=st.integers(-9, 12))
def test_slice(size: int, start: int, stop: int) -> None:
    call, values = call_of(aten.slice.Tensor, numbered(2, size), 1, start, stop)
    whole = run_call(call, values)
    assume(whole.shape[1] > 1)
    check_axis(call, Axis(1, whole.shape[1]), values, whole, exact=True)


@few
@given(size=st.integers(1, 5), factor=st.integers(1, 16), data=st.data())
def test_nearest(size: int, factor: int, data: st.DataObject) -> None:
    """The kernels multiply by `1 / factor` in float32: where that is off, the cut is refused."""
    assume(size * factor > 1)
    call, values = call_of(aten.upsample_nearest1d.default, numbered(1, 2, size), [size * factor])
    axis = data.draw(axes([1, 1, size * factor]))
    try:
        needs_of(call, axis)
    except CannotCut:
        assert axis.outer > 1 or factor not in (1, 2, 3, 4, 8, 16)
    else:
        check_axis(call, axis, values, run_call(call, values), exact=True)


@given(size=st.integers(1, 20), before=st.integers(-9, 9), after=st.integers(-9, 9), start=st.integers(0, 20))
def test_a_reach_is_never_empty_and_never_outside(size: int, before: int, after: int, start: int) -> None:
    low, high = Reach(before=before, after=after).of(start, start + 3, size)
    assert 0 <= low < high <= size
