"""Every rule against the operation itself: each cut that is allowed, several chunks of it, on random numbers."""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from axis_rules.cases import BLC, CASES, Case, aten, draw
from axis_rules.check import call_of, check, chunks_of, run_chunk
from lightcache_fx.axes import Axis, Need, Reach
from lightcache_fx.axis_rules import RULES, CannotCut, build_local, needs_of
from lightcache_fx.axis_rules.registry import Rule
from lightcache_fx.errors import AxisRuleError
from lightcache_fx.marks import MARK


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_are_parts_of_the_whole(case: Case) -> None:
    report = check(case.target, *case.args, exact=case.exact, **case.kwargs)
    assert report.dims == case.dims
    for refusal in report.refused.values():
        assert str(case.target) in refusal.reason


def needs(target, axis: Axis, *args, **kwargs) -> list[Need | None]:
    """What a call needs of its tensors, in their order."""
    return list(needs_of(call_of(target, *args, **kwargs)[0], axis).values())


def refusal(target, axis: Axis, *args, **kwargs) -> CannotCut:
    with pytest.raises(CannotCut) as caught:
        needs_of(call_of(target, *args, **kwargs)[0], axis)
    return caught.value


def test_convolution_reaches_as_far_as_its_kernel() -> None:
    x, w = draw(1, 4, 8, 12), draw(4, 4, 3, 5)
    found = needs(aten.conv2d.default, Axis(2, 4), x, w, None, [2, 1], [1, 2])
    assert found == [Need(Axis(2, 8), Reach(Fraction(2), before=1, after=0)), None]
    found = needs(aten.conv2d.default, Axis(3, 12), x, w, None, [2, 1], [1, 2])
    assert found == [Need(Axis(3, 12), Reach(before=2, after=2)), None]


def test_patches_keep_the_axis() -> None:
    """A convolution over patches that do not overlap can be cut along any factor, and passes it on."""
    x, w = draw(1, 4, 12, 8), draw(4, 4, 2, 2)
    assert needs(aten.conv2d.default, Axis(2, 3, outer=2), x, w, None, [2, 2]) == [Need(Axis(2, 3, 2, 2)), None]


def test_output_features_of_a_linear_cut_its_weight() -> None:
    """Heads, say: the axis of the merged dimension goes to the weight as it is."""
    axis = Axis(2, 3, inner=4)
    assert needs(aten.linear.default, axis, BLC, draw(12, 8), draw(12)) == [
        None, Need(replace(axis, dim=0)), Need(replace(axis, dim=0)),
    ]  # fmt: skip


def test_a_slice_shifts_the_range() -> None:
    assert needs(aten.slice.Tensor, Axis(1, 3), BLC, 1, 2, 5) == [Need(Axis(1, 6), Reach(before=-2, after=2))]


def test_frames_are_found_inside_a_merged_batch() -> None:
    """`(b f) c -> b f c` and back."""
    assert needs(aten.view.default, Axis(1, 3), draw(6, 4), [2, 3, 4]) == [Need(Axis(0, 3, outer=2))]
    assert needs(aten.view.default, Axis(0, 3, outer=2), draw(2, 3, 4), [6, 4]) == [Need(Axis(1, 3))]


def test_a_straddling_axis_names_finer_ones() -> None:
    """Tokens of `b (h w) c` come from `b h w c`: rows can be cut, or columns within each row."""
    x = draw(2, 4, 6, 8)
    error = refusal(aten.reshape.default, Axis(1, 24), x, [2, 24, 8])
    assert error.alternatives == (Axis(1, 6, outer=4), Axis(1, 4, inner=6))
    for axis in error.alternatives:
        assert None not in needs(aten.reshape.default, axis, x, [2, 24, 8])


def test_attention_of_one_value_cannot_cut_its_queries() -> None:
    error = refusal(aten.scaled_dot_product_attention.default, Axis(1, 6), BLC, BLC, BLC)
    assert "read twice" in error.reason


def test_a_value_read_twice_is_read_alike_or_refused() -> None:
    """`x @ x.T` needs rows of `x`, and all of it."""
    x = draw(6, 6)
    for target in (aten.linear.default, aten.matmul.default):
        assert "read twice" in refusal(target, Axis(0, 6), x, x).reason
    assert needs(aten.add.Tensor, Axis(0, 6), x, x) == [Need(Axis(0, 6))]


def test_heads_that_share_keys_are_cut_in_groups() -> None:
    q, kv = draw(2, 4, 6, 8), draw(2, 2, 6, 8)
    args = (aten.scaled_dot_product_attention.default, Axis(1, 4), q, kv, kv)
    assert refusal(*args, enable_gqa=True).alternatives == (Axis(1, 2, inner=2),)


@pytest.mark.parametrize(
    ("target", "axis", "args", "why"),
    [
        (aten.fft_fft.default, Axis(0, 2), (BLC,), "no rule for aten.fft_fft.default"),
        (aten.scatter.src, Axis(0, 2), (BLC, 1, torch.zeros(2, 6, 8, dtype=torch.int64), BLC), "no rule for"),
        (aten.rand_like.default, Axis(0, 2), (BLC,), "draws random numbers"),
        (aten.dropout.default, Axis(0, 2), (BLC, 0.5, True), "draws random numbers"),
        (aten.scaled_dot_product_attention.default, Axis(0, 2), (BLC, BLC, BLC, None, 0.5), "draws random numbers"),
        (aten.zeros.default, Axis(0, 2), ([2, 3],), "from nothing"),
        (aten.arange.default, Axis(0, 4), (4,), "from nothing"),
        (aten.add_.Tensor, Axis(0, 2), (draw(2, 6), draw(6)), "writes to its arguments"),
        (torch.add, Axis(0, 2), (BLC, BLC), "no ATen operator"),
        (aten.cat.default, Axis(1, 12), ([BLC, BLC], 1), "joined along"),
        (aten.group_norm.default, Axis(2, 8), (draw(2, 6, 8), 2), "statistics"),
        (aten.batch_norm.default, Axis(0, 2), (BLC, None, None, None, None, True, 0.1, 1e-5, False), "statistics"),
        (aten.relu.default, Axis(1, 7), (BLC,), "no such size"),
        (aten.relu.default, Axis(5, 2), (BLC,), "no such size"),
        (aten.split.Tensor, Axis(1, 4), (BLC, 4, 1), "results differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(target, axis: Axis, args, why: str) -> None:
    assert why in refusal(target, axis, *args).reason


def test_inputs_have_no_parts() -> None:
    placeholder = fx.Graph().placeholder("x")
    with pytest.raises(CannotCut, match=r"%x is no operation but a placeholder"):
        needs_of(placeholder, Axis(0, 2))


def test_what_depends_on_data_is_refused() -> None:
    """Sizes of the output and of inputs, and numbers among the arguments."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        call, _ = call_of(aten.relu.default, draw(4, 6))
        rows = aten.nonzero.default(mode.from_tensor(draw(4))).shape[0]
        call.all_input_nodes[0].meta["val"] = call.meta["val"] = torch.empty(rows, 6)
        taken, _ = call_of(aten.slice.Tensor, draw(4, 6), 0, 1, 3)
        number = taken.graph.placeholder("number")
        number.meta["val"] = rows
        taken.update_arg(2, number)
    for node, axis, why in (
        (call, Axis(0, 4), "no such size"),
        (call, Axis(1, 6), "a size depends on data"),
        (taken, Axis(0, 2), "%number is a number that depends on data"),
    ):
        with pytest.raises(CannotCut, match=why):
            needs_of(node, axis)


def test_one_of_several_results_is_cut_with_the_others() -> None:
    """`getitem` asks for the same positions of every part; the parts are as many as before."""
    call, values = call_of(aten.chunk.default, BLC, 2, -1)
    half = call.graph.call_function(operator.getitem, (call, 1))
    half.meta["val"] = call.meta["val"][1]
    axis = Axis(1, 6)
    assert needs_of(half, axis) == {call: Need(axis)}
    with pytest.raises(CannotCut, match="results differ"):  # they are of other sizes along the cut
        needs_of(call_of(aten.split.Tensor, BLC, 5, 1)[0], Axis(1, 5))
    assert needs_of(call, axis, result=1) == {call.args[0]: Need(axis)}
    parts = run_chunk(call, axis, 2, 5, values)
    assert torch.equal(run_chunk(half, axis, 2, 5, {call: call.meta["val"]}), parts[1])
    assert torch.equal(parts[1], BLC[:, 2:5, 4:])


def test_padding_alone_is_a_chunk_too() -> None:
    """Chunks of one position that lie before or behind all that there is; no input is ever empty."""
    for index in range(9):
        call, values = call_of(aten.constant_pad_nd.default, draw(2, 3), [4, 2], 7.0)
        (need,) = needs_of(call, Axis(1, 9)).values()
        assert need is not None
        start, stop = need.reach.of(index, index + 1, 3)
        assert stop - start == 1
        assert torch.equal(
            run_chunk(call, Axis(1, 9), index, index + 1, values), call.meta["val"][:, index : index + 1]
        )


def test_nodes_that_move_nothing_add_nothing() -> None:
    """A mark, a dropout in evaluation mode, and a slice along its own dimension are their input."""
    for target, args in ((MARK, (BLC, 0)), (aten.slice.Tensor, (BLC, 1, 1, 7))):
        call, _ = call_of(target, *args)
        body = fx.Graph()
        part = body.placeholder("part")
        part.meta["val"] = BLC[:, :2]
        assert build_local(body, call, Axis(1, call.meta["val"].shape[1]), 0, 2, {call.args[0]: part}) is part


def test_a_wrong_rule_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Rule(lambda call: [(call.tensor("self"), None)])
    monkeypatch.setitem(RULES, aten.relu.default, wrong)
    call, values = call_of(aten.relu.default, BLC)
    expected = (
        "%relu_default f32[2,6,8] (block.0): positions 0 to 2 along dim 1: [6] came as torch.float32 [2, 6, 8];"
        " expected torch.float32 [2, 2, 8]; the rule of aten.relu.default is wrong"
    )
    with pytest.raises(AxisRuleError, match=re.escape(expected)):
        run_chunk(call, Axis(1, 6), 0, 2, values)


def test_chunks_of_covers_both_ends() -> None:
    assert chunks_of(8) == [(0, 1), (7, 8), (4, 5), (0, 4), (3, 8), (1, 7), (0, 8)]
