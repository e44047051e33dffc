"""INT8 in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native import fp8
from lrq_kernels.native.memory import (
    group_refusal,
    on_cpu,
    room_for_amax,
    stream_of,
    with_contiguous_columns,
)


@kernel("quantize_int8", backend="cpu", accepts=on_cpu)
def quantize_int8_cpu(
    x: Tensor, scaling: str, block: int, given_scale: Tensor | None, hadamard: int, codes: Tensor, scale: Tensor
) -> None:
    threads = torch.get_num_threads()
    _native.quantize_int8_cpu(with_contiguous_columns(x), scaling, block, given_scale, hadamard, codes, scale, threads)


@kernel("dequantize_int8", backend="cpu", accepts=on_cpu)
def dequantize_int8_cpu(codes: Tensor, scale: Tensor, hadamard: int, dtype: torch.dtype, out: Tensor) -> None:
    threads = torch.get_num_threads()
    _native.dequantize_int8_cpu(with_contiguous_columns(codes), scale.contiguous(), hadamard, out, threads)


def cuda_refusal(x: Tensor, scaling: str, block: int, given_scale: Tensor | None, hadamard: int) -> str | None:
    """None, or why CUDA can't."""
    return group_refusal(hadamard) or fp8.cuda_refusal(x, scaling, block, given_scale)


def cuda_refusal_back(codes: Tensor, scale: Tensor, hadamard: int, dtype: torch.dtype) -> str | None:
    """None, or why CUDA can't."""
    return group_refusal(hadamard) or fp8.cuda_refusal_back(codes, scale, dtype)


if _native.has_cuda:

    @kernel("quantize_int8", backend="cuda", accepts=cuda_refusal)
    def quantize_int8_cuda(
        x: Tensor, scaling: str, block: int, given_scale: Tensor | None, hadamard: int, codes: Tensor, scale: Tensor
    ) -> None:
        x, stream = with_contiguous_columns(x), stream_of(x)
        # Rows are rotated where they are quantized; the other scales are seldom of rotated weights.
        if hadamard and scaling != "row":
            rotated = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
            _native.rotate_hadamard_cuda(x, hadamard, rotated, stream)
            x, hadamard = rotated, 0
        room = room_for_amax(x) if scaling == "tensor" and given_scale is None else None
        _native.quantize_int8_cuda(x, scaling, block, given_scale, room, hadamard, codes, scale, stream)

    @kernel("dequantize_int8", backend="cuda", accepts=cuda_refusal_back)
    def dequantize_int8_cuda(codes: Tensor, scale: Tensor, hadamard: int, dtype: torch.dtype, out: Tensor) -> None:
        codes, stream = with_contiguous_columns(codes), stream_of(codes)
        values = torch.empty_like(out, dtype=torch.float32) if hadamard else out
        _native.dequantize_int8_cuda(codes, scale.contiguous(), values, stream)
        if hadamard:
            _native.rotate_hadamard_cuda(values, hadamard, out, stream)
