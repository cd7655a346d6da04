"""Bytes that leaf kernels allocate inside themselves, where no dispatch mode sees it.

Each formula is the kernel's own algorithm, named by its file in the torch sources, and was compared with the
allocator's events of torch 2.13 on CPUs with AVX2 and with AMX (and on the latter with `ONEDNN_MAX_CPU_ISA` at AVX2 and
at AVX512_CORE_BF16). Operators that are not here count with no workspace; so do cuDNN's and cuBLAS's workspaces
(unknown: they depend on heuristics and on the device), and what oneDNN and MKL take from malloc, which torch does not
see either. On the CPU a workspace that each thread has counts once for each of `torch.get_num_threads()`.

Which kernels the CPU runs depends on its instructions (`onednn.onednn_isa`): a prediction for the CPU is one for the
machine that makes it. The scratchpads of oneDNN's bfloat16 convolutions and matrix products with AMX come from long
searches for block sizes; they are estimated. Those of half-precision matrix products with AVX-512 alone count as
nothing.

Letters: N batch, C channels, G groups, L query tokens, S key tokens, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from lightcache_fx.norm_stats import moments_workspace
from lightcache_fx.onednn import OnednnIsa, convolution, onednn_isa, product_by_amx, product_scratch
from lightcache_fx.operand_copies import (
    any_layout_copy,
    channels_last_copy,
    contiguous_copy,
    is_channels_last,
    matrix_copy,
    suggests_channels_last,
)

_CPU_SCALAR_BYTES = 8  # a Python number as a tensor: int64 or float64
_TRANSPOSE_TILE = 60 * 60  # native/Copy.cpp, copy_transpose_valid: tiles of 60 x 60


_Kernel = Callable[[str, Sequence[Any], Mapping[str, Any], Sequence[torch.Tensor]], int]


def workspace_bytes(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any, device_type: str
) -> int:
    """The most that one kernel holds beyond its inputs and outputs; 0 for operators that are not known here.

    Args:
        operator: an ATen overload, as a dispatch mode sees it.
        args: its positional arguments; tensors are real or fake, of concrete sizes.
        kwargs: its keyword arguments.
        outputs: what it returned.
        device_type: `cpu` or `cuda`.
    """
    if not isinstance(operator, OpOverload):
        return 0
    name = operator._schema.name
    kernel = _KERNELS.get(name)
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else _tensors(outputs)
    if kernel is not None:
        return kernel(device_type, args, kwargs, tensors)
    if device_type == "cpu" and torch.Tag.pointwise in operator.tags and name not in _CASTS_IN_PLACE:
        return _pointwise(operator, args, tensors)
    return 0


def attention_on_cuda(
    query: torch.Tensor,
    _key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor | None, int]:
    """What fused attention returns and holds on CUDA, for machines whose torch has no CUDA kernels to choose from.

    Flash attention takes half precision without a mask, memory-efficient attention the rest; both write the output as
    (N, L, heads, E) and a float32 log-sum-exp. Returns None for shapes that only the unfused composite takes.
    Source: native/transformers/cuda/sdp_utils.cpp, attention.cu.
    """
    if query.dim() != 4 or query.shape[-1] % 8:  # the memory-efficient kernel takes heads of any larger width
        return None, 0
    N, heads, L, _E = query.shape
    output = value.new_empty((N, L, heads, value.shape[-1])).transpose(1, 2)
    log_sum_exp = 4 * N * heads * L
    mask = 0
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # becomes an additive mask
        mask = attn_mask.numel() * query.element_size()
    return output, log_sum_exp + mask


# Pointwise operators: numbers wrapped as tensors, and operands cast to the common type


def _pointwise(operator: OpOverload, args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> int:
    """Temporaries of TensorIterator on the CPU.

    A Python number where a tensor is due becomes a 0-dimensional tensor of int64 or float64. An operand of another type
    than the common one is cast as a whole before the loop, a number too. Source: TensorIterator.cpp, compute_types.
    """
    operands: list[Any] = []
    for argument, given in zip(operator._schema.arguments, args, strict=False):
        kind = str(argument.type)
        wrapped = kind == "Tensor" or (kind == "number" and argument.name in ("other", "self"))
        if isinstance(given, torch.Tensor) or (wrapped and isinstance(given, int | float)):
            operands.append(given)
    if not outputs or not operands:
        return 0
    if operator._schema.name == "aten::where":
        operands = operands[1:]  # the condition stays boolean
    common = _common_type(operands, outputs[0], returns_bool=outputs[0].dtype == torch.bool)
    total = 0
    for operand in operands:
        if isinstance(operand, torch.Tensor):
            total += operand.numel() * common.itemsize if operand.dtype != common else 0
        else:
            own = _number_type(operand)
            total += own.itemsize + (common.itemsize if own != common else 0)
    if operator._schema.name.endswith("_") and outputs[0].dtype != common:
        total += outputs[0].numel() * common.itemsize  # written there first, then cast back
    return total


def _common_type(operands: Sequence[Any], output: torch.Tensor, *, returns_bool: bool) -> torch.dtype:
    """The type that a pointwise loop computes in: the output's, but for comparisons and in-place operators."""
    if len(operands) < 2 and not returns_bool:
        return output.dtype
    found = _result_type(operands)
    if found.is_floating_point or found.is_complex or returns_bool or not output.dtype.is_floating_point:
        return found
    return output.dtype  # integers that give a floating-point result


def _result_type(operands: Sequence[Any]) -> torch.dtype:
    """torch.result_type of any number of tensors and numbers. Source: native/TypeProperties.cpp."""
    groups: tuple[list[torch.dtype], ...] = ([], [], [])  # tensors, 0-dimensional tensors, numbers: in this order
    for operand in operands:
        if isinstance(operand, torch.Tensor):
            groups[0 if operand.dim() else 1].append(operand.dtype)
        else:
            groups[2].append(torch.get_default_dtype() if isinstance(operand, float) else _number_type(operand))
    return reduce(_combined, [reduce(torch.promote_types, group) for group in groups if group])


def _combined(higher: torch.dtype, lower: torch.dtype) -> torch.dtype:
    """A group of lower priority counts only where it is of a higher kind."""
    if higher.is_complex or (higher.is_floating_point and not lower.is_complex):
        return higher
    if higher.is_floating_point:
        return higher.to_complex()
    if higher == torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher


def _number_type(number: Any) -> torch.dtype:
    """The type of a Python number as a tensor."""
    return torch.float64 if isinstance(number, float) else torch.bool if isinstance(number, bool) else torch.int64


# Operators whose loop reads another type than it writes, or that make no iterator of common types.
_CASTS_IN_PLACE = {"aten::clone", "aten::_to_copy", "aten::copy_", "aten::masked_fill", "aten::masked_fill_"}
_CASTS_IN_PLACE |= {"aten::fill_", "aten::fill", "aten::zero_", "aten::clamp", "aten::clamp_", "aten::bernoulli"}


def _pow(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    base, exponent = args[:2]
    output = outputs[0]
    if device != "cpu":
        return 0
    if not isinstance(base, torch.Tensor):
        own = _number_type(base)
        return own.itemsize + (output.element_size() if own != output.dtype else 0)
    both = [x for x in (base, exponent) if isinstance(x, torch.Tensor)]
    return sum(x.numel() * output.element_size() for x in both if x.dtype != output.dtype)


def _clone(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    """The tile through which the CPU transposes a large matrix. Source: native/Copy.cpp."""
    source: torch.Tensor = args[0]
    target = outputs[0]
    transposed = source.dim() == 2 and source.stride(0) == 1 and source.stride(1) == source.shape[0]
    if device == "cpu" and transposed and target.is_contiguous() and source.numel() >= _TRANSPOSE_TILE:
        return _TRANSPOSE_TILE * source.element_size()
    return 0


def _repeat(device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    """The sizes are computed as tensors of int64, on the host. Source: native/TensorShape.cpp, `repeat`."""
    repeats: Sequence[int] = args[1]
    return 4 * 8 * len(repeats) if device == "cpu" else 0


# Reductions and normalisations


def _mean(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    """On the CPU a sum, in float32 for half precision, divided in place. Source: native/ReduceOps.cpp."""
    source: torch.Tensor = args[0]
    output = outputs[0]
    if device != "cpu":
        return 0
    if output.dtype in (torch.bfloat16, torch.float16):
        return 4 * (output.numel() + source.numel())
    return _CPU_SCALAR_BYTES + output.element_size() if output.dtype.is_floating_point else _CPU_SCALAR_BYTES


def _softmax(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    return contiguous_copy(args[0])  # native/SoftMax.cpp


def _safe_softmax(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    """A softmax, then the mask of -inf, its rows, and a zero. Source: native/transformers/attention.cpp."""
    scores: torch.Tensor = args[0]
    dim: int = args[1]
    rows = scores.numel() // max(1, scores.shape[dim])
    masks = scores.numel() + rows + outputs[0].element_size()
    return max(contiguous_copy(scores), masks) if device == "cpu" else masks


def _group_norm(device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    """On the CPU, channels-last: sums per channel, and per group from 1,024 pixels on. On CUDA a scale and a shift.

    Source: native/cpu/group_norm_kernel.cpp, native/cuda/group_norm_kernel.cu.
    """
    source: torch.Tensor = args[0]
    N, C, pixels, G = (int(size) for size in args[3:7])
    if device != "cpu":
        return 2 * 4 * N * C
    if not suggests_channels_last(source):
        return contiguous_copy(source)
    if pixels < 1024:
        return 4 * N * 2 * C
    return 4 * torch.get_num_threads() * N * 2 * C + 4 * N * 2 * G


def _layer_norm(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    return sum(map(contiguous_copy, (args[0], *args[2:4])))  # native/layer_norm.cpp


# Matrices and attention


def _matrix_product(device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    """Copies of operands that BLAS cannot read; a batch is copied one matrix at a time, but by oneDNN as a whole."""
    operands = [x for x in args if isinstance(x, torch.Tensor) and x.dim() >= 2]
    if device == "cpu" and product_by_amx(operands):
        batch = math.prod(operands[0].shape[:-2])
        return batch * sum(map(matrix_copy, operands)) + product_scratch(*operands)
    return sum(map(matrix_copy, operands))


def _matrix_product_with_bias(device: str, args: Sequence[Any], kwargs: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _matrix_product(device, args[1:], kwargs, outputs)


def _cpu_flash_attention(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    """Each thread's block of scores, their maxima and sums, and a block of the output; scores again in half precision.

    With AMX, bfloat16 keys and values are packed where each is used often enough. Compared on CPUs with AVX2 and AMX.
    Source: native/cpu/FlashAttentionKernel.cpp, `cpu_flash_attention`.
    """
    query: torch.Tensor = args[0]
    key: torch.Tensor = args[1]
    N, heads, L, E = query.shape
    S = key.shape[-2]
    threads = torch.get_num_threads()
    rows = min(L, 256 if L >= 768 else 64 if L >= 192 else 32)
    columns = min(S, 512)
    each = 4 * (rows * columns + 2 * rows + rows * E)
    if query.element_size() == 2:
        each += 2 * rows * columns
    if query.dtype != torch.bfloat16 or onednn_isa() < OnednnIsa.AMX or min(L, S) < 64:
        return threads * each
    of_a_thread = (N * heads * -(-L // rows) + threads - 1) / threads
    if of_a_thread * rows < 4 * N * heads:  # packing would cost more than it saves
        return threads * each
    odd = S % 512 % 2  # pairs of keys, and of each key's values: an odd one out is padded
    packed = 2 * N * heads * ((E + E % 2) * S + (S + odd) * E)
    each += 2 * columns * E + (2 * rows * (S % 2) if S <= 512 else 0)
    if E % 2:
        each += 2 * rows * (E + 1)
    return threads * each + packed


# Resampling, padding, pooling


def _upsample(points: int, device: str, source: torch.Tensor, output: torch.Tensor) -> int:
    """Channels-last copies for small 2-D outputs, else tables of indices and weights.

    Source: native/cpu/UpSampleKernel.cpp, `_use_vectorized_kernel_cond_2d` and `_3d`.
    """
    if device != "cpu":
        return any_layout_copy(source)
    wide = is_channels_last(source) and source.shape[1] > 3
    if points < 4 and (wide or (source.dim() == 4 and sum(output.shape[-2:]) <= 128)):
        return channels_last_copy(source) + channels_last_copy(output)
    return points * sum(output.shape[2:]) * (8 + output.element_size())


def _upsample_nearest(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _upsample(1, device, args[0], outputs[0])


def _upsample_linear(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _upsample(2, device, args[0], outputs[0])


def _upsample_cubic(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _upsample(4, device, args[0], outputs[0])


def _dense_input(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    return any_layout_copy(args[0])


def _row_moments(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    return moments_workspace(*args[:3])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


_KERNELS: dict[str, _Kernel] = {
    "aten::pow": _pow,
    "aten::clone": _clone,
    "aten::mean": _mean,
    "aten::repeat": _repeat,
    "aten::_softmax": _softmax,
    "aten::_log_softmax": _softmax,
    "aten::_safe_softmax": _safe_softmax,
    "aten::native_group_norm": _group_norm,
    "aten::native_layer_norm": _layer_norm,
    "aten::mm": _matrix_product,
    "aten::bmm": _matrix_product,
    "aten::addmm": _matrix_product_with_bias,
    "aten::baddbmm": _matrix_product_with_bias,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _cpu_flash_attention,
    "aten::convolution": convolution,
    "aten::upsample_nearest1d": _upsample_nearest,
    "aten::upsample_nearest2d": _upsample_nearest,
    "aten::upsample_nearest3d": _upsample_nearest,
    "aten::_upsample_nearest_exact2d": _upsample_nearest,
    "aten::upsample_linear1d": _upsample_linear,
    "aten::upsample_bilinear2d": _upsample_linear,
    "aten::upsample_trilinear3d": _upsample_linear,
    "aten::upsample_bicubic2d": _upsample_cubic,
    "aten::reflection_pad1d": _dense_input,
    "aten::reflection_pad2d": _dense_input,
    "aten::reflection_pad3d": _dense_input,
    "aten::replication_pad1d": _dense_input,
    "aten::replication_pad2d": _dense_input,
    "aten::replication_pad3d": _dense_input,
    "aten::avg_pool2d": _dense_input,
    "aten::avg_pool3d": _dense_input,
    "aten::max_pool2d_with_indices": _dense_input,
    "lightcache::row_moments": _row_moments,
}
