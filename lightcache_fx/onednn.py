"""What oneDNN's kernels, and those that torch takes in their place, allocate on a CPU: convolutions, products with AMX.

Which kernels run depends on the CPU's instructions (`onednn_isa`). Compared and named as in `workspaces`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from lightcache_fx.operand_copies import (
    any_layout_copy,
    channels_last_copy,
    contiguous_copy,
    is_channels_last,
    num_bytes,
    suggests_channels_last,
)

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


def product_by_amx(operands: Sequence[torch.Tensor]) -> bool:
    """Whether oneDNN multiplies two matrices in bfloat16. Source: native/mkldnn/Matmul.cpp, `use_mkldnn_matmul`."""
    first, second = operands
    small = first.numel() * second.shape[-1] <= _SMALL_PRODUCT
    return first.dtype == torch.bfloat16 and not small and onednn_isa() == OnednnIsa.AMX


def product_scratch(first: torch.Tensor, second: torch.Tensor) -> int:
    """An estimate: the second matrix, blocked, once for each thread that has enough rows; tiles and address lists.

    Exact for some sizes, most of the time too much for a transposed second matrix, of which less is copied. Compared on
    a CPU with AMX. Source: brgemm_matmul_utils.cpp in oneDNN, `init_scratchpad`, whose sizes come from a search.
    """
    rows, inner = first.shape[-2:]
    batch = math.prod(first.shape[:-2])
    threads = min(torch.get_num_threads(), max(batch, rows // _ROWS_OF_A_THREAD))
    blocked = -(-inner // 32) * 32 * second.shape[-1] * second.element_size()
    return 384 + threads * (_PAGE + 640 + min(blocked, _AMX_MOST_WEIGHT))


def convolution(device: str, args: Sequence[Any], _: Any, outputs: Sequence[torch.Tensor]) -> int:
    """Of `aten::convolution`, by the backend that torch takes for it. Source: native/Convolution.cpp."""
    source: torch.Tensor = args[0]
    weight: torch.Tensor = args[1]
    bias, stride, padding, dilation, transposed, output_padding, groups = args[2:9]
    if device != "cpu":  # cuDNN's workspace is unknown
        return 0 if is_channels_last(source) else contiguous_copy(source)
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
    channels_last = suggests_channels_last(source) or suggests_channels_last(weight)
    if transposed:
        return contiguous_copy(source) + _transposed(source, weight, outputs[0], slow=backend.startswith("Slow"))
    if backend.startswith("Mkldnn"):
        if _brgemm(source, weight, groups):
            return _onednn_brgemm(source, weight, outputs[0], stride, groups, channels_last=channels_last)
        return _onednn(source, weight, bias, outputs[0], groups, channels_last=channels_last)
    if backend.startswith("Slow"):
        depth_kernel = backend == "Slow3d"
        if groups > 1 and not depth_kernel:
            return _grouped(source, weight, stride, padding, outputs[0], groups)
        operands = channels_last_copy if channels_last and not depth_kernel else contiguous_copy
        columns = _columns(source.shape[1], weight, stride, padding, outputs[0])
        return operands(source) + operands(weight) + columns
    return contiguous_copy(source)


def _transposed(source: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, *, slow: bool) -> int:
    """Columns of all images; or oneDNN (whose name torch does not tell here), reordered and then copied once more.

    Source: native/NaiveConvolutionTranspose2d.cpp, native/mkldnn/Conv.cpp.
    """
    if slow:
        return source.shape[0] * weight[0].numel() * math.prod(source.shape[2:]) * source.element_size()
    return max(num_bytes(source) + num_bytes(weight), 2 * num_bytes(output))


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
    outputs = num_bytes(output)
    columns = _columns(source.shape[1] // groups, weight, stride, padding, output)
    part = num_bytes(source) // groups if source.shape[0] > 1 else 0
    return any_layout_copy(source) + max(outputs, part + columns)


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
        copies = channels_last_copy(source)
        if depthwise:
            return copies + blocked_weight
        return copies + channels_last_copy(weight) + _brgemm_scratch() + blocked_weight
    blocked_source = 0 if source.shape[1] < block else num_bytes(source) // C * padded_C
    blocked_weight = padded * padded_C * kernel * size
    blocked_output = num_bytes(output) // num_outputs * padded
    padded_bias = padded * size + _SCRATCH_PADDING if bias is not None and padded != num_outputs else 0
    if bias is not None and depthwise and source.dtype == torch.bfloat16:
        padded_bias = padded * 4 + _SCRATCH_PADDING
    sums = 0
    if kernel == 1 and source.dtype == torch.bfloat16:
        pixels = math.prod(output.shape[2:])
        sums = torch.get_num_threads() * 4 * padded * pixels + (0 if padded_bias else _SCRATCH_PADDING)
    running = blocked_source + blocked_weight + padded_bias + sums + blocked_output - num_bytes(output)
    return contiguous_copy(source) + max(running, blocked_output)


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
        copies = channels_last_copy(source) + (0 if depthwise else channels_last_copy(weight))
        return copies + scratch + blocked_weight
    running = scratch + num_bytes(source) + blocked_weight
    return contiguous_copy(source) + max(running, 2 * num_bytes(output))


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
