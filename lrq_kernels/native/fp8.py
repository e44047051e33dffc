"""FP8 in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, room_for_amax, size_refusal, stream_of, with_contiguous_columns


@kernel("quantize_fp8", backend="cpu", accepts=on_cpu)
def quantize_fp8_cpu(
    x: Tensor, scaling: str, block: int, given_scale: Tensor | None, codes: Tensor, scale: Tensor
) -> None:
    threads = torch.get_num_threads()
    _native.quantize_fp8_cpu(with_contiguous_columns(x), scaling, block, given_scale, codes, scale, threads)


@kernel("dequantize_fp8", backend="cpu", accepts=on_cpu)
def dequantize_fp8_cpu(codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    threads = torch.get_num_threads()
    _native.dequantize_fp8_cpu(with_contiguous_columns(codes), scale.contiguous(), out, threads)


def cuda_refusal(x: Tensor, scaling: str, block: int, given_scale: Tensor | None) -> str | None:
    """None, or why CUDA can't."""
    return (size_refusal(x) if scaling == "tensor" else None) or on_cuda(x, given_scale)


def cuda_refusal_back(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> str | None:
    """None, or why CUDA can't."""
    return size_refusal(codes) or on_cuda(codes, scale)


if _native.has_cuda:

    @kernel("quantize_fp8", backend="cuda", accepts=cuda_refusal)
    def quantize_fp8_cuda(
        x: Tensor, scaling: str, block: int, given_scale: Tensor | None, codes: Tensor, scale: Tensor
    ) -> None:
        x = with_contiguous_columns(x)
        room = room_for_amax(x) if scaling == "tensor" and given_scale is None else None
        _native.quantize_fp8_cuda(x, scaling, block, given_scale, room, codes, scale, stream_of(x))

    @kernel("dequantize_fp8", backend="cuda", accepts=cuda_refusal_back)
    def dequantize_fp8_cuda(codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        _native.dequantize_fp8_cuda(with_contiguous_columns(codes), scale.contiguous(), out, stream_of(codes))
