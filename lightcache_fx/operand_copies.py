"""Copies that kernels make of operands whose layout does not suit them."""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def contiguous_copy(tensor: torch.Tensor | None) -> int:
    """Bytes of `tensor.contiguous()`."""
    return 0 if tensor is None or tensor.is_contiguous() else num_bytes(tensor)


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a batch of images or videos is laid out channels-last."""
    layout = _CHANNELS_LAST.get(tensor.dim())
    return layout is not None and tensor.is_contiguous(memory_format=layout)


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a kernel that asks a tensor's layout works in channels-last; dimensions of size 1 can tell against it."""
    return tensor.dim() in _CHANNELS_LAST and suggest_memory_format(tensor) == _CHANNELS_LAST[tensor.dim()]


def channels_last_copy(tensor: torch.Tensor) -> int:
    """Bytes of `tensor.contiguous(memory_format=channels_last)`."""
    return 0 if is_channels_last(tensor) else num_bytes(tensor)


def any_layout_copy(tensor: torch.Tensor) -> int:
    """Bytes of a copy in the nearest dense layout: none where it is contiguous or channels-last already."""
    return 0 if is_channels_last(tensor) else contiguous_copy(tensor)


def matrix_copy(matrix: torch.Tensor) -> int:
    """Bytes of a BLAS operand's copy: one of its dimensions must be dense. Source: native/LinearAlgebra.cpp."""
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    by_rows = column_stride == 1 and row_stride >= max(1, columns)
    by_columns = row_stride == 1 and column_stride >= max(1, rows)
    return 0 if by_rows or by_columns else rows * columns * matrix.element_size()
