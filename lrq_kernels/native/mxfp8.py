"""MXFP8 in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, stream_of, with_contiguous_columns


@kernel("quantize_mxfp8", backend="cpu", accepts=on_cpu)
def quantize_mxfp8_cpu(x: Tensor, coherence: float | None, codes: Tensor, block_scales: Tensor) -> None:
    x = with_contiguous_columns(x)
    _native.quantize_mxfp8_cpu(x, coherence, codes, block_scales, torch.get_num_threads())


@kernel("dequantize_mxfp8", backend="cpu", accepts=on_cpu)
def dequantize_mxfp8_cpu(
    codes: Tensor, block_scales: Tensor, rows: int, columns: int, dtype: torch.dtype, out: Tensor
) -> None:
    codes, block_scales = codes.contiguous(), block_scales.contiguous()
    _native.dequantize_mxfp8_cpu(codes, block_scales, out, torch.get_num_threads())


if _native.has_cuda:

    @kernel("quantize_mxfp8", backend="cuda", accepts=on_cuda)
    def quantize_mxfp8_cuda(x: Tensor, coherence: float | None, codes: Tensor, block_scales: Tensor) -> None:
        x = with_contiguous_columns(x)
        _native.quantize_mxfp8_cuda(x, coherence, codes, block_scales, stream_of(x))

    @kernel("dequantize_mxfp8", backend="cuda", accepts=on_cuda)
    def dequantize_mxfp8_cuda(
        codes: Tensor, block_scales: Tensor, rows: int, columns: int, dtype: torch.dtype, out: Tensor
    ) -> None:
        codes, block_scales = codes.contiguous(), block_scales.contiguous()
        _native.dequantize_mxfp8_cuda(codes, block_scales, out, stream_of(codes))
