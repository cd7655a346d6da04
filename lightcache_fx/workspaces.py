"""Bytes that leaf kernels allocate inside themselves, where no dispatch mode sees it.

Each formula is the kernel's own algorithm, named by its file in the torch sources, and was compared with the
allocator's events of torch 2.13 on CPUs with AVX2 and with AMX (and on the latter with `ONEDNN_MAX_CPU_ISA` at AVX2 and
at AVX512_CORE_BF16). Operators that are not here count with no workspace; so do cuDNN's and cuBLAS's workspaces
(unknown: they depend on heuristics and on the device), and what oneDNN and MKL take from malloc, which torch does not
see either. On the CPU a workspace that each thread has counts once for each of `torch.get_num_threads()`.

Which kernels the CPU runs depends on its instructions (`onednn_isa`): a prediction for the CPU is one for the machine
that makes it. The scratchpads of oneDNN's bfloat16 convolutions and matrix products with AMX come from long searches
for block sizes; they are estimated. Those of half-precision matrix products with AVX-512 alone count as nothing.

Letters: N batch, C channels, G groups, L query tokens, S key tokens, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import reduce
from typing import Any

import torch
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch.utils import _pytree as pytree

from lightcache_fx.norm_stats import moments_workspace

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_CPU_SCALAR_BYTES = 8  # a Python number as a tensor: int64 or float64
_TRANSPOSE_TILE = 60 * 60  # native/Copy.cpp, copy_transpose_valid: tiles of 60 x 60
_SCRATCH_PADDING = 128  # oneDNN's memory_tracking: a scratchpad's own alignment
_PAGE = 4096  # oneDNN's P4K, to which brgemm convolutions align each part of their scratchpad
_BATCH = 4120  # a thread's list of addresses in jit_brgemm_conv: 40 bytes each, as many as fill a page
_AMX_L1 = 48 * 1024  # the first-level cache of CPUs with AMX, by which oneDNN chooses its blocks
_SMALL_PRODUCT = 16 * 16 * 16  # native/mkldnn/Matmul.cpp, mkldnn_gemm_min_size
_ROWS_OF_A_THREAD = 128  # fewer rows of a matrix product go to one thread
_AMX_MOST_INPUT = 400 * 1024  # of an input's block, seen from 320 to 512 channels; limited by the second-level cache
_AMX_MOST_WEIGHT = 3 * 512 * 1024  # of a thread's columns of a matrix product, seen at 2048 x 2048; likewise


class OnednnIsa(IntEnum):
    """The instructions that oneDNN chooses its kernels by, as far as they change what the kernels allocate."""

    AVX2 = 0
    AVX512 = 1
    AVX512_FP16 = 2
    AMX = 3

    @property
    def channel_block(self) -> int:
        """The size of oneDNN's blocks of channels: nChw8c or nChw16c."""
        return 8 if self is OnednnIsa.AVX2 else 16


def onednn_isa() -> OnednnIsa:
    """What oneDNN uses on this CPU.

    torch says whether oneDNN takes bfloat16 (from AVX-512 on) and float16 (from its float16 instructions on) as it is
    limited by `ONEDNN_MAX_CPU_ISA`; CPUs with AMX have both, so a limit at AVX512_CORE_FP16 alone is not seen. torch's
    own `torch.backends.cpu.get_cpu_capability` leaves that limit out and knows no AMX.
    Source: native/mkldnn/Utils.h, `mkldnn_bf16_device_check` and `mkldnn_fp16_device_check`, and native/CPUBlas.cpp,
    `Pack`.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001
        return OnednnIsa.AVX2
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():  # noqa: SLF001 - torch has no public names for these
        return OnednnIsa.AVX512
    return OnednnIsa.AMX if torch.cpu._is_amx_tile_supported() else OnednnIsa.AVX512_FP16  # noqa: SLF001


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


# Copies that kernels make of operands in an unsuitable layout


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _contiguous_copy(tensor: torch.Tensor | None) -> int:
    """Bytes of `tensor.contiguous()`."""
    return 0 if tensor is None or tensor.is_contiguous() else _num_bytes(tensor)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    layout = _CHANNELS_LAST.get(tensor.dim())
    return layout is not None and tensor.is_contiguous(memory_format=layout)


def _suggests_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a kernel that asks a tensor's layout works in channels-last; dimensions of size 1 can tell against it."""
    return tensor.dim() in _CHANNELS_LAST and suggest_memory_format(tensor) == _CHANNELS_LAST[tensor.dim()]


def _channels_last_copy(tensor: torch.Tensor) -> int:
    return 0 if _is_channels_last(tensor) else _num_bytes(tensor)


def _any_layout_copy(tensor: torch.Tensor) -> int:
    """Bytes of a copy in the nearest dense layout: none where it is contiguous or channels-last already."""
    return 0 if _is_channels_last(tensor) else _contiguous_copy(tensor)


def _matrix_copy(matrix: torch.Tensor) -> int:
    """Bytes of a BLAS operand's copy: one of its dimensions must be dense. Source: native/LinearAlgebra.cpp."""
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    by_rows = column_stride == 1 and row_stride >= max(1, columns)
    by_columns = row_stride == 1 and column_stride >= max(1, rows)
    return 0 if by_rows or by_columns else rows * columns * matrix.element_size()


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
    return _contiguous_copy(args[0])  # native/SoftMax.cpp


def _safe_softmax(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    """A softmax, then the mask of -inf, its rows, and a zero. Source: native/transformers/attention.cpp."""
    scores: torch.Tensor = args[0]
    dim: int = args[1]
    rows = scores.numel() // max(1, scores.shape[dim])
    masks = scores.numel() + rows + outputs[0].element_size()
    return max(_contiguous_copy(scores), masks) if device == "cpu" else masks


def _group_norm(device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    """On the CPU, channels-last: sums per channel, and per group from 1,024 pixels on. On CUDA a scale and a shift.

    Source: native/cpu/group_norm_kernel.cpp, native/cuda/group_norm_kernel.cu.
    """
    source: torch.Tensor = args[0]
    N, C, pixels, G = (int(size) for size in args[3:7])
    if device != "cpu":
        return 2 * 4 * N * C
    if not _suggests_channels_last(source):
        return _contiguous_copy(source)
    if pixels < 1024:
        return 4 * N * 2 * C
    return 4 * torch.get_num_threads() * N * 2 * C + 4 * N * 2 * G


def _layer_norm(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    return sum(map(_contiguous_copy, (args[0], *args[2:4])))  # native/layer_norm.cpp


# Matrices and attention


def _matrix_product(device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    """Copies of operands that BLAS cannot read; a batch is copied one matrix at a time, but by oneDNN as a whole."""
    operands = [x for x in args if isinstance(x, torch.Tensor) and x.dim() >= 2]
    if device == "cpu" and _product_by_amx(operands):
        batch = math.prod(operands[0].shape[:-2])
        return batch * sum(map(_matrix_copy, operands)) + _product_scratch(*operands)
    return sum(map(_matrix_copy, operands))


def _product_by_amx(operands: Sequence[torch.Tensor]) -> bool:
    """Whether oneDNN multiplies two matrices in bfloat16. Source: native/mkldnn/Matmul.cpp, `use_mkldnn_matmul`."""
    first, second = operands
    small = first.numel() * second.shape[-1] <= _SMALL_PRODUCT
    return first.dtype == torch.bfloat16 and not small and onednn_isa() == OnednnIsa.AMX


def _product_scratch(first: torch.Tensor, second: torch.Tensor) -> int:
    """An estimate: the second matrix, blocked, once for each thread that has enough rows; tiles and address lists.

    Exact for some sizes, most of the time too much for a transposed second matrix, of which less is copied. Compared on
    a CPU with AMX. Source: brgemm_matmul_utils.cpp in oneDNN, `init_scratchpad`, whose sizes come from a search.
    """
    rows, inner = first.shape[-2:]
    batch = math.prod(first.shape[:-2])
    threads = min(torch.get_num_threads(), max(batch, rows // _ROWS_OF_A_THREAD))
    blocked = -(-inner // 32) * 32 * second.shape[-1] * second.element_size()
    return 384 + threads * (_PAGE + 640 + min(blocked, _AMX_MOST_WEIGHT))


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


# Convolutions


def _convolution(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    source: torch.Tensor = args[0]
    weight: torch.Tensor = args[1]
    bias, stride, padding, dilation, transposed, output_padding, groups = args[2:9]
    if device != "cpu":  # cuDNN's workspace is unknown
        return 0 if _is_channels_last(source) else _contiguous_copy(source)
    backend = torch._C._select_conv_backend(  # noqa: SLF001 - the choice that the kernel's dispatcher makes
        source,
        weight,
        bias,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        None if bias is None else bias.shape,
    ).name
    channels_last = _suggests_channels_last(source) or _suggests_channels_last(weight)
    if transposed:
        return _contiguous_copy(source) + _transposed(source, weight, outputs[0], slow=backend.startswith("Slow"))
    if backend.startswith("Mkldnn"):
        if _brgemm(source, weight, groups):
            return _onednn_brgemm(source, weight, outputs[0], stride, groups, channels_last=channels_last)
        return _onednn(source, weight, bias, outputs[0], groups, channels_last=channels_last)
    if backend.startswith("Slow"):
        depth_kernel = backend == "Slow3d"
        if groups > 1 and not depth_kernel:
            return _grouped(source, weight, stride, padding, outputs[0], groups)
        operands = _channels_last_copy if channels_last and not depth_kernel else _contiguous_copy
        columns = _columns(source.shape[1], weight, stride, padding, outputs[0])
        return operands(source) + operands(weight) + columns
    return _contiguous_copy(source)


def _transposed(source: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, *, slow: bool) -> int:
    """Columns of all images; or oneDNN (whose name torch does not tell here), reordered and then copied once more.

    Source: native/NaiveConvolutionTranspose2d.cpp, native/mkldnn/Conv.cpp.
    """
    if slow:
        return source.shape[0] * weight[0].numel() * math.prod(source.shape[2:]) * source.element_size()
    return max(_num_bytes(source) + _num_bytes(weight), 2 * _num_bytes(output))


def _columns(channels: int, weight: torch.Tensor, stride: Any, padding: Any, output: torch.Tensor) -> int:
    """The unfolded input of all images: a column of C * kernel values for each output pixel.

    A 1x1 kernel reads the input itself. Source: native/ConvolutionMM2d.cpp, ConvolutionMM3d.cpp.
    """
    kernel = math.prod(weight.shape[2:])
    if kernel == 1 and set(stride) == {1} and set(padding) == {0}:
        return 0
    pixels = math.prod(output.shape[2:])
    return output.shape[0] * channels * kernel * pixels * output.element_size()


def _grouped(
    source: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, output: torch.Tensor, groups: int
) -> int:
    """Group by group, then concatenated. Source: native/Convolution.cpp, `_convolution`."""
    outputs = _num_bytes(output)
    columns = _columns(source.shape[1] // groups, weight, stride, padding, output)
    part = _num_bytes(source) // groups if source.shape[0] > 1 else 0
    return _any_layout_copy(source) + max(outputs, part + columns)


def _onednn(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    groups: int,
    *,
    channels_last: bool,
) -> int:
    """Operands in oneDNN's blocked layouts, and its output before it is reordered to a plain one.

    Fewer input channels than a block's are read plain. In channels-last only the weight is reordered. In bfloat16 a
    depthwise convolution takes its bias as float32, and each thread of one with a 1x1 kernel sums an image in float32.
    Compared on CPUs with AVX2 and AMX for float32, and for bfloat16 with oneDNN limited to AVX512_CORE_BF16.
    Source: native/mkldnn/Conv.cpp, and jit_avx2_conv_kernel_f32.cpp, jit_avx512_common_conv_kernel.cpp,
    jit_avx512_core_bf16_conv_kernel.cpp, jit_avx512_core_bf16_1x1_conv_kernel.cpp, jit_uni_dw_convolution.hpp and
    jit_brgemm_conv.cpp in oneDNN.
    """
    block = onednn_isa().channel_block
    num_outputs, C = weight.shape[:2]
    kernel = math.prod(weight.shape[2:])
    depthwise = groups > 1 and C == 1
    padded = num_outputs if groups > 1 else _round(num_outputs, block)
    padded_C = _round(C, block) if groups == 1 and block <= C else C
    size = source.element_size()
    if channels_last:
        blocked_weight = padded * C * kernel * size
        copies = _channels_last_copy(source)
        if depthwise:
            return copies + blocked_weight
        return copies + _channels_last_copy(weight) + _brgemm_scratch() + blocked_weight
    blocked_source = 0 if source.shape[1] < block else _num_bytes(source) // C * padded_C
    blocked_weight = padded * padded_C * kernel * size
    blocked_output = _num_bytes(output) // num_outputs * padded
    padded_bias = padded * size + _SCRATCH_PADDING if bias is not None and padded != num_outputs else 0
    if bias is not None and depthwise and source.dtype == torch.bfloat16:
        padded_bias = padded * 4 + _SCRATCH_PADDING
    sums = 0
    if kernel == 1 and source.dtype == torch.bfloat16:
        pixels = math.prod(output.shape[2:])
        sums = torch.get_num_threads() * 4 * padded * pixels + (0 if padded_bias else _SCRATCH_PADDING)
    running = blocked_source + blocked_weight + padded_bias + sums + blocked_output - _num_bytes(output)
    return _contiguous_copy(source) + max(running, blocked_output)


def _brgemm(source: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether oneDNN convolves plain layouts through channels-last ones: half precision with instructions for it."""
    if source.dtype == torch.bfloat16:
        depthwise = groups > 1 and weight.shape[1] == 1
        return onednn_isa() == OnednnIsa.AMX and not depthwise
    return source.dtype == torch.float16


def _onednn_brgemm(
    source: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, stride: Any, groups: int, *, channels_last: bool
) -> int:
    """Operands in channels-last, and three outputs: oneDNN's, the same as a tensor, and that in its plain layout.

    Compared on a CPU with AMX. Source: native/mkldnn/Conv.cpp, native/mkldnn/MKLDNNConversions.cpp, `mkldnn_to_dense`,
    and jit_brgemm_conv_utils.cpp in oneDNN.
    """
    C = weight.shape[1]
    kernel = math.prod(weight.shape[2:])
    depthwise = groups > 1 and C == 1
    outputs_of_group = 1 if depthwise else _round(weight.shape[0] // groups, 16)
    blocked_weight = groups * outputs_of_group * C * kernel * weight.element_size()
    if depthwise:
        scratch = 0
    elif source.dtype == torch.bfloat16:
        scratch = _amx_scratch(weight, output, stride, groups)
    else:
        scratch = _brgemm_scratch()
    if channels_last:
        copies = _channels_last_copy(source) + (0 if depthwise else _channels_last_copy(weight))
        return copies + scratch + blocked_weight
    running = scratch + _num_bytes(source) + blocked_weight
    return _contiguous_copy(source) + max(running, 2 * _num_bytes(output))


def _brgemm_scratch() -> int:
    """Each thread's list of addresses. Source: jit_brgemm_conv_utils.cpp in oneDNN, `init_scratchpad`."""
    return _BATCH * torch.get_num_threads() + _PAGE


def _amx_scratch(weight: torch.Tensor, output: torch.Tensor, stride: Any, groups: int) -> int:
    """Addresses, tiles and, but for 1x1 kernels, each thread's block of the padded input, with a mask.

    An estimate: the block holds as many rows as fit the first-level cache, by the first steps of oneDNN's search
    (exact for many sizes of 3x3 kernels, within 40 % for most). Compared on a CPU with AMX.
    Source: jit_brgemm_conv_utils.cpp in oneDNN, `init_scratchpad` and `iterate_ker_block`.
    """
    threads = torch.get_num_threads()
    steps = [1, 1, *stride][-3:]
    kernel, sizes = ([1, 1, *tensor.shape[2:]][-3:] for tensor in (weight, output))
    if math.prod(kernel) == 1 and math.prod(steps) == 1:
        return _brgemm_scratch() + _pages(2 * threads)
    C = weight.shape[1] * groups
    _, height, width = sizes
    padded_width = (width - 1) * steps[2] + kernel[2]
    fitting = min(height, max(1, _AMX_L1 // (2 * C * padded_width + 2 * width * 32)))
    good = (n for n in range(fitting, 0, -1) if height > 0.9 * _round(height, n) and n * padded_width > 128)
    rows = next(good, height)
    num_values = kernel[0] * ((rows - 1) * steps[1] + kernel[1]) * padded_width * C
    block = 2 * -(-min(2 * num_values, _AMX_MOST_INPUT) // _PAGE)  # in pages, of twice the size: oneDNN's own count
    return _brgemm_scratch() + _pages(threads * block, threads, 2 * threads)


def _pages(*parts: int) -> int:
    """Parts of a scratchpad in whole pages, each with a page for its alignment."""
    return _PAGE * (sum(parts) + len(parts))


def _round(channels: int, block: int) -> int:
    return -(-channels // block) * block


# Resampling, padding, pooling


def _upsample(points: int, device: str, source: torch.Tensor, output: torch.Tensor) -> int:
    """Channels-last copies for small 2-D outputs, else tables of indices and weights.

    Source: native/cpu/UpSampleKernel.cpp, `_use_vectorized_kernel_cond_2d` and `_3d`.
    """
    if device != "cpu":
        return _any_layout_copy(source)
    wide = _is_channels_last(source) and source.shape[1] > 3
    if points < 4 and (wide or (source.dim() == 4 and sum(output.shape[-2:]) <= 128)):
        return _channels_last_copy(source) + _channels_last_copy(output)
    return points * sum(output.shape[2:]) * (8 + output.element_size())


def _upsample_nearest(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _upsample(1, device, args[0], outputs[0])


def _upsample_linear(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _upsample(2, device, args[0], outputs[0])


def _upsample_cubic(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    return _upsample(4, device, args[0], outputs[0])


def _dense_input(_device: str, args: Sequence[Any], _: Any, _outputs: Sequence[torch.Tensor]) -> int:
    return _any_layout_copy(args[0])


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
    "aten::convolution": _convolution,
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
