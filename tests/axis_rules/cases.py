"""One or more calls of every operator that has a rule: its arguments, and the dimensions that can be cut whole.

Layouts: B batch, C channels, F frames, H height, W width, L tokens, S keys. A dimension of one element is never cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightcache_fx.marks import MARK

aten = torch.ops.aten


def draw(*sizes: int) -> torch.Tensor:
    """Random numbers, the same for the same sizes."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def whole_numbers(*sizes: int, below: int = 4) -> torch.Tensor:
    return torch.randint(0, below, sizes, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    target: Callable[..., Any]
    args: tuple[Any, ...]
    dims: set[int]  # that are cut whole
    exact: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.target).removeprefix("aten.")


def case(target: Callable[..., Any], *args: Any, dims: set[int], exact: bool = True, **kwargs: Any) -> Case:
    return Case(target, args, dims, exact, kwargs)


BCHW, BCFHW, BLC = draw(2, 4, 6, 8), draw(2, 4, 3, 4, 6), draw(2, 6, 8)
X = draw(2, 3, 4)
FLAGS = X > 0
NUMBERS = whole_numbers(2, 3, 4)
COMPLEX = torch.complex(X, X.flip(0))
ALL3 = {0, 1, 2}

POINTWISE = [
    # Vector instructions round functions such as exp differently from what is left over at the end of a row.
    *(
        case(op, X, dims=ALL3, exact=False)
        for op in (
            aten.cos.default,
            aten.exp.default,
            aten.gelu.default,
            aten.rsqrt.default,
            aten.sigmoid.default,
            aten.silu.default,
            aten.sin.default,
            aten.tanh.default,
        )
    ),
    *(
        case(op, X, dims=ALL3)
        for op in (
            aten.abs.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.detach.default,
            aten.alias.default,
            aten.neg.default,
            aten.ones_like.default,
            aten.reciprocal.default,
            aten.relu.default,
            aten.sqrt.default,
            aten.zeros_like.default,
            aten.lift_fresh_copy.default,
        )
    ),
    *(
        case(op, X, draw(4), dims=ALL3)
        for op in (
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.mul.Tensor,
            aten.div.Tensor,
            aten.le.Tensor,
            aten.ge.Tensor,
            aten.maximum.default,
            aten.copy.default,
            aten.rsub.Tensor,
        )
    ),
    case(aten.add.Tensor, X, draw(2, 1, 4), dims=ALL3, alpha=2),
    case(aten.mul.Tensor, draw(3, 1), draw(2, 1, 4), dims=ALL3),
    case(aten.mul.Tensor, X, torch.tensor(2.0), dims=ALL3),
    case(aten.add.Tensor, X, X, dims=ALL3),
    case(aten.gelu.default, X, dims=ALL3, exact=False, approximate="tanh"),
    case(aten.clamp.default, X, -0.5, 0.5, dims=ALL3),
    case(aten.clamp_min.default, X, 0.1, dims=ALL3),
    case(aten.pow.Tensor_Scalar, X, 2, dims=ALL3),
    case(aten.pow.Scalar, 2.0, X, dims=ALL3, exact=False),
    case(aten.rsub.Scalar, X, 1.0, dims=ALL3),
    case(aten.div.Tensor_mode, X, draw(2, 3, 1), dims=ALL3, rounding_mode="floor"),
    case(aten.full_like.default, X, 3.0, dims=ALL3),
    case(aten.fill.Tensor, X, torch.tensor(2.0), dims=ALL3),
    case(aten.fill.Scalar, X, 2.0, dims=ALL3),
    case(aten.where.self, FLAGS, X, draw(3, 4), dims=ALL3),
    case(aten.where.Scalar, FLAGS, 0, -float("inf"), dims=ALL3),
    case(aten.where.ScalarOther, FLAGS, X, 0.0, dims=ALL3),
    case(aten.masked_fill.Scalar, X, FLAGS, -1.0, dims=ALL3),
    case(aten.__and__.Tensor, FLAGS, draw(3, 4) > 0, dims=ALL3),
    case(aten.logical_not.default, FLAGS, dims=ALL3),
    case(aten.to.dtype, X, torch.float64, dims=ALL3),
    case(aten.to.device, X, torch.device("cpu"), torch.float16, dims=ALL3),
    case(aten._to_copy.default, NUMBERS, dims=ALL3, dtype=torch.float32),
    case(aten.type_as.default, NUMBERS, draw(3), dims=ALL3),
    case(aten.to.other, NUMBERS, draw(3), dims=ALL3),
    case(aten.dropout.default, X, 0.5, False, dims=ALL3),
    case(aten.native_dropout.default, X, 0.5, False, dims=ALL3),
    case(MARK, X, 3, dims=ALL3),
    case(aten.polar.default, X.abs(), draw(2, 3, 4), dims=ALL3, exact=False),
    case(aten.mul.Tensor, COMPLEX, draw(2, 3, 4), dims=ALL3),
    case(aten.view_as_real.default, COMPLEX, dims=ALL3),
    case(aten.view_as_complex.default, draw(2, 3, 4, 2), dims=ALL3),
]

MATMUL = [
    case(aten.linear.default, BLC, draw(12, 8), draw(12), dims=ALL3, exact=False),
    case(aten.linear.default, draw(6, 8), draw(4, 8), dims={0, 1}, exact=False),
    case(aten.matmul.default, draw(2, 4, 6, 8), draw(2, 4, 8, 4), dims={0, 1, 2, 3}, exact=False),
    case(aten.matmul.default, draw(2, 4, 6, 8), draw(8, 4), dims={0, 1, 2, 3}, exact=False),
    case(aten.matmul.default, draw(4, 6, 8), draw(2, 1, 8, 4), dims={0, 1, 2, 3}, exact=False),
    case(aten.matmul.default, draw(6, 8), draw(8), dims=set()),
    case(aten.mm.default, draw(6, 8), draw(8, 4), dims={0, 1}, exact=False),
    case(aten.bmm.default, draw(2, 6, 8), draw(2, 8, 4), dims=ALL3, exact=False),
    case(aten.addmm.default, draw(4), draw(6, 8), draw(8, 4), dims={0, 1}, exact=False),
    case(aten.addmm.default, draw(6, 1), draw(6, 8), draw(8, 4), dims={0, 1}, exact=False),
    case(aten.baddbmm.default, draw(2, 6, 4), draw(2, 6, 8), draw(2, 8, 4), dims=ALL3, exact=False),
    case(aten.outer.default, draw(6), draw(4), dims={0, 1}),
    case(aten.einsum.default, "nhwpqc->nchpwq", [draw(2, 4, 3, 2, 2, 6)], dims={0, 1, 2, 3, 4, 5}),
    case(aten.einsum.default, "blc, dc -> bdl", [BLC, draw(4, 8)], dims=ALL3, exact=False),
    case(aten.einsum.default, "...c->c...", [BLC], dims=set()),
]

RESHAPE = [
    case(aten.view.default, draw(6, 4, 8), [2, 3, 4, 8], dims={0, 1, 2, 3}),
    case(aten.reshape.default, draw(2, 3, 4, 8), [6, -1], dims=set()),
    case(aten.reshape.default, draw(2, 3, 32), [2, -1, 4, 8], dims={0, 1, 2, 3}),
    case(aten._unsafe_view.default, draw(2, 3, 8), [6, 8], dims={1}),
    case(aten.view.default, draw(4, 6), [6, 4], dims=set()),
    case(aten.flatten.using_ints, BCFHW, 2, 4, dims={0, 1}),
    case(aten.flatten.using_ints, draw(2, 1, 4), 0, 1, dims={0, 1}),
    case(aten.unflatten.int, draw(2, 12, 4), 1, [3, -1], dims={0, 1, 2, 3}),
    case(aten.view_as.default, draw(2, 12), draw(2, 3, 4), dims=ALL3),
]

SHAPE = [
    case(aten.permute.default, BCHW, [0, -1, 1, 2], dims={0, 1, 2, 3}),
    case(aten.transpose.int, BCHW, 1, -1, dims={0, 1, 2, 3}),
    case(aten.swapaxes.default, BCHW, 1, 2, dims={0, 1, 2, 3}),
    case(aten.t.default, draw(4, 6), dims={0, 1}),
    case(aten.movedim.int, BCFHW, 1, -1, dims={0, 1, 2, 3, 4}),
    case(aten.movedim.intlist, BCFHW, [0, 1], [2, 0], dims={0, 1, 2, 3, 4}),
    case(aten.unsqueeze.default, BLC, 1, dims={0, 2, 3}),
    case(aten.unsqueeze.default, BLC, -1, dims=ALL3),
    case(aten.squeeze.dim, draw(2, 1, 6, 8), 1, dims=ALL3),
    case(aten.squeeze.dim, BLC, 1, dims=ALL3),
    case(aten.squeeze.dims, draw(2, 1, 6, 1), [1, -1], dims={0, 1}),
    case(aten.squeeze.default, draw(1, 4, 1, 6), dims={0, 1}),
    case(aten.expand.default, draw(2, 1, 8), [-1, 6, -1], dims=ALL3),
    case(aten.expand.default, draw(1, 8), [2, 6, 8], dims=ALL3),
    case(aten.broadcast_to.default, draw(1, 8), [2, 6, 8], dims=ALL3),
    case(aten.expand_as.default, draw(2, 1, 8), BLC, dims=ALL3),
]

SELECT = [
    *(
        case(op, [BLC, draw(2, 3, 8)], 1, dims={0, 2})
        for op in (
            aten.cat.default,
            aten.concat.default,
            aten.concatenate.default,
        )
    ),
    case(aten.cat.default, [BLC, BLC], -1, dims={0, 1}),
    case(aten.stack.default, [BLC, draw(2, 6, 8)], 1, dims={0, 2, 3}),
    case(aten.stack.default, [BLC, BLC], -1, dims=ALL3),
    case(aten.split.Tensor, BLC, 4, 2, dims={0, 1}),
    case(aten.split_with_sizes.default, BLC, [2, 4], 1, dims={0, 2}),
    case(aten.chunk.default, BLC, 3, -2, dims={0, 2}),
    case(aten.unbind.int, BLC, 1, dims={0, 1}),
    case(aten.select.int, BCHW, 1, -1, dims=ALL3),
    case(aten.select.int, BCHW, -1, 2, dims=ALL3),
    case(aten.select_scatter.default, BLC, draw(2, 8), 1, 3, dims={0, 2}),
    case(aten.slice_scatter.default, BLC, draw(2, 6, 4), 2, 0, 9223372036854775807, 2, dims={0, 1}),
    case(aten.slice.Tensor, BLC, 2, 2, 6, dims=ALL3),
    case(aten.slice.Tensor, BLC, 1, -3, 9223372036854775807, dims=ALL3),
    case(aten.slice.Tensor, BLC, -1, None, -4, dims={0, 1, 2}),
    case(aten.slice.Tensor, BLC, 2, 0, 8, 2, dims={0, 1}),
    case(aten.narrow.default, BLC, 2, 1, 6, dims=ALL3),
    case(aten.flip.default, BCHW, [-1], dims=ALL3),
    case(aten.roll.default, BCHW, [1], [2], dims={0, 1, 3}),
    case(aten.index_select.default, BLC, 1, whole_numbers(4), dims=ALL3),
    case(aten.index.Tensor, BLC, [None, whole_numbers(3)], dims=ALL3),
    case(aten.index.Tensor, BLC, [whole_numbers(3, below=2), whole_numbers(3)], dims=set()),
    case(aten.embedding.default, draw(10, 8), whole_numbers(2, 6), dims=ALL3),
    case(aten.repeat.default, draw(2, 6), [3, 1, 1], dims=ALL3),
    case(aten.repeat.default, draw(2, 1), [1, 6], dims={0, 1}),
    case(aten.repeat.default, draw(2, 6), [1, 2], dims={0}),
    case(aten.repeat_interleave.self_int, BLC, 3, 1, dims={0, 2}),
    case(aten.repeat_interleave.self_int, BLC, 3, 0, dims={1, 2}, output_size=6),
    case(aten.repeat_interleave.self_int, draw(4), 2, dims=set()),
]

CONV = [
    case(aten.conv1d.default, draw(2, 4, 8), draw(6, 4, 3), draw(6), [1], [1], dims=ALL3, exact=False),
    case(aten.conv2d.default, BCHW, draw(6, 4, 3, 3), draw(6), [1, 1], [1, 1], dims={0, 1, 2, 3}, exact=False),
    case(aten.conv2d.default, BCHW, draw(6, 4, 1, 1), dims={0, 1, 2, 3}, exact=False),
    case(aten.conv2d.default, BCHW, draw(6, 4, 3, 3), None, [2, 2], [1, 1], dims={0, 1, 2, 3}, exact=False),
    case(aten.conv2d.default, BCHW, draw(6, 4, 2, 2), None, [2, 2], dims={0, 1, 2, 3}, exact=False),
    case(aten.conv2d.default, BCHW, draw(6, 2, 3, 3), None, [1], [1], [1], 2, dims={0, 2, 3}, exact=False),
    case(aten.conv2d.default, draw(4, 6, 8), draw(6, 4, 3, 3), None, [1, 1], [1, 1], dims=ALL3, exact=False),
    case(aten.conv2d.default, BCHW, draw(4, 4, 3, 3), None, [1, 1], [4, 3], dims={0, 1, 2, 3}, exact=False),
    case(aten.conv2d.padding, BCHW, draw(6, 4, 4, 3), None, [1, 1], "same", dims={0, 1, 2, 3}, exact=False),
    case(aten.conv2d.padding, BCHW, draw(6, 4, 3, 3), None, [1, 1], "valid", dims={0, 1, 2, 3}, exact=False),
    case(
        aten.conv3d.default, BCFHW, draw(4, 4, 3, 1, 1), draw(4), [1] * 3, [1, 0, 0], dims={0, 1, 2, 3, 4}, exact=False
    ),
    case(aten.conv3d.default, BCFHW, draw(4, 4, 1, 2, 2), draw(4), [1, 2, 2], dims={0, 1, 2, 3, 4}, exact=False),
    case(
        aten.convolution.default,
        BCHW,
        draw(6, 4, 3, 3),
        draw(6),
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        dims={0, 1, 2, 3},
        exact=False,
    ),
    case(
        aten.convolution.default,
        BCHW,
        draw(4, 6, 3, 3),
        draw(6),
        [2, 2],
        [1, 1],
        [1, 1],
        True,
        [0, 0],
        1,
        dims={0},
        exact=False,
    ),
    case(aten.conv_transpose2d.input, BCHW, draw(4, 6, 2, 2), draw(6), [2, 2], dims={0}, exact=False),
    case(aten.avg_pool1d.default, draw(6, 4, 8), [2], [2], dims=ALL3),
    case(aten.avg_pool2d.default, BCHW, [2, 2], dims={0, 1, 2, 3}),
    case(aten.avg_pool2d.default, BCHW, [3, 3], [1, 1], [1, 1], dims={0, 1}),
    case(aten.avg_pool3d.default, BCFHW, [1, 2, 2], dims={0, 1, 2, 3, 4}),
    case(aten.max_pool2d.default, BCHW, [3, 3], [2, 2], [0, 0], dims={0, 1, 2, 3}),
    case(aten.max_pool2d.default, BCHW, [3, 3], [1, 1], [1, 1], dims={0, 1}),
    case(aten.adaptive_avg_pool2d.default, BCHW, [3, 3], dims={0, 1}),
]

NORM = [
    case(aten.group_norm.default, BCHW, 2, draw(4), draw(4), dims={0}, exact=False),
    case(aten.native_group_norm.default, BCHW, draw(4), draw(4), 2, 4, 48, 2, 1e-5, dims={0}, exact=False),
    case(torch.ops.lightcache.row_moments.default, BCHW, 2, 2, dims={0, 1}, exact=False),
    case(torch.ops.lightcache.join_moments.default, draw(6, 4, 2, 2).abs(), 1e-5, dims={0, 1}, exact=False),
    case(aten.layer_norm.default, BLC, [8], draw(8), draw(8), dims={0, 1}, exact=False),
    case(aten.layer_norm.default, BLC, [6, 8], dims={0}, exact=False),
    case(aten.native_layer_norm.default, BLC, [8], draw(8), draw(8), 1e-5, dims={0, 1}, exact=False),
    case(aten.rms_norm.default, BLC, [8], draw(8), 1e-6, dims={0, 1}, exact=False),
    case(aten.instance_norm.default, BCHW, None, None, None, None, True, 0.1, 1e-5, False, dims={0}, exact=False),
    case(
        aten.batch_norm.default,
        BCHW,
        draw(4),
        draw(4),
        draw(4),
        draw(4).abs(),
        False,
        0.1,
        1e-5,
        False,
        dims={0, 1, 2, 3},
        exact=False,
    ),
    case(aten.softmax.int, BLC, -1, dims={0, 1}, exact=False),
    case(aten.log_softmax.int, BLC, 1, dims={0, 2}, exact=False),
    case(aten.cumsum.default, BLC, 1, dims={0, 2}, exact=False),
    case(aten.glu.default, BLC, -1, dims={0, 1}, exact=False),
    case(aten.mean.dim, BLC, [-1], True, dims={0, 1}, exact=False),
    case(aten.mean.dim, BLC, [1], dims={0, 1}, exact=False),
    case(aten.sum.dim_IntList, BCHW, [1, -1], dims={0, 1}, exact=False),
    case(aten.amax.default, BLC, [0], dims={0, 1}),
    case(aten.prod.dim_int, BLC, 1, dims={0, 1}, exact=False),
    case(aten.var.correction, BLC, [1], correction=1, keepdim=True, dims={0, 2}, exact=False),
    case(aten.var_mean.correction, BLC, [2], dims={0, 1}, exact=False),
    case(aten.max.dim, BLC, 1, dims={0, 1}),
    case(aten.argmax.default, BLC, 1, dims={0, 1}),
    case(aten.linalg_vector_norm.default, BLC, 2, [-1], True, dims={0, 1}, exact=False),
]

Q, K, V = draw(2, 4, 6, 8), draw(2, 4, 10, 8), draw(2, 4, 8, 10).transpose(2, 3)
ATTENTION = [
    case(aten.scaled_dot_product_attention.default, Q, K, V, dims=ALL3, exact=False),
    case(aten.scaled_dot_product_attention.default, Q, K, V, draw(2, 1, 1, 10) > 0, dims=ALL3, exact=False, scale=0.3),
    case(aten.scaled_dot_product_attention.default, Q, K, V, draw(6, 10), dims=ALL3, exact=False),
    case(aten.scaled_dot_product_attention.default, Q, K, V, draw(2, 4, 6, 10), dims=ALL3, exact=False),
    case(aten.scaled_dot_product_attention.default, Q, K, V, dims={0, 1}, exact=False, is_causal=True),
    case(aten.scaled_dot_product_attention.default, Q, Q, Q, dims={0, 1}, exact=False),
    case(aten.scaled_dot_product_attention.default, Q, K[:, :2], V[:, :2], dims={0, 2}, exact=False, enable_gqa=True),
    case(aten.scaled_dot_product_attention.default, Q[0], K[0], V[0], dims={0, 1}, exact=False),
]

RESIZE = [
    case(aten.upsample_nearest1d.vec, draw(2, 4, 6), None, [2.0], dims=ALL3),
    case(aten.upsample_nearest2d.vec, BCHW, None, [2.0, 2.0], dims={0, 1, 2, 3}),
    case(aten.upsample_nearest2d.vec, BCHW, [18, 16], None, dims={0, 1, 2, 3}),
    case(aten.upsample_nearest2d.vec, BCHW, [9, 16], None, dims={0, 1, 3}),
    case(aten.upsample_nearest2d.default, BCHW, [12, 16], 2.0, 2.0, dims={0, 1, 2, 3}),
    case(aten.upsample_nearest3d.vec, BCFHW, [3, 8, 12], None, dims={0, 1, 2, 3, 4}),
    case(aten._upsample_nearest_exact2d.vec, BCHW, None, [2.0, 2.0], dims={0, 1, 2, 3}),
    case(aten.upsample_bilinear2d.vec, BCHW, [12, 16], False, None, dims={0, 1}, exact=False),
    case(aten.upsample_bicubic2d.vec, BCHW, [12, 16], False, None, dims={0, 1}, exact=False),
    case(aten.pixel_shuffle.default, draw(2, 8, 3, 4), 2, dims={0, 1, 2, 3}),
    case(aten.pixel_unshuffle.default, draw(2, 3, 4, 6), 2, dims={0, 2, 3}),
    case(aten.constant_pad_nd.default, BCHW, [3, 2, 0, 1], 1.5, dims={0, 1, 2, 3}),
    case(aten.constant_pad_nd.default, BCHW, [-2, 1], dims={0, 1, 2, 3}),
    case(aten.pad.default, BCFHW, [1, 1, 1, 1, 2, 0], dims={0, 1, 2, 3, 4}),
    case(aten.pad.default, FLAGS, [1, 0], "constant", 1.0, dims=ALL3),
    case(aten.pad.default, BCHW, [3, 1, 0, 0], "replicate", dims={0, 1, 2, 3}),
    case(aten.pad.default, BCFHW, [0, 0, 1, 1, 2, 0], "replicate", dims={0, 1, 2, 3, 4}),
    case(aten.pad.default, BCHW, [1, 1, 0, 0], "reflect", dims={0, 1, 2}),
    case(aten.replication_pad2d.default, BCHW, [0, 0, 2, 1], dims={0, 1, 2, 3}),
    case(aten.reflection_pad2d.default, BCHW, [1, 1, 2, 0], dims={0, 1}),
]

CASES = [*POINTWISE, *MATMUL, *RESHAPE, *SHAPE, *SELECT, *CONV, *NORM, *ATTENTION, *RESIZE]
