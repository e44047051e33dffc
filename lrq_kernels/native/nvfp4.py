"""NVFP4 in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, room_for_amax, size_refusal, stream_of, with_contiguous_columns


@kernel("quantize_nvfp4", backend="cpu", accepts=on_cpu)
def quantize_nvfp4_cpu(
    x: Tensor,
    given_scale: Tensor | None,
    coherence: float | None,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
) -> None:
    threads = torch.get_num_threads()
    x = with_contiguous_columns(x)
    _native.quantize_nvfp4_cpu(x, given_scale, coherence, codes, block_scales, tensor_scale, threads)


@kernel("dequantize_nvfp4", backend="cpu", accepts=on_cpu)
def dequantize_nvfp4_cpu(
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    inputs = (t.contiguous() for t in (codes, block_scales, tensor_scale))
    _native.dequantize_nvfp4_cpu(*inputs, out, torch.get_num_threads())


_MOST_MATRICES = 65535
"""``kMaxGridY`` of csrc/cuda/nvfp4.cu."""


def cuda_refusal(x: Tensor, given_scale: Tensor | None, coherence: float | None) -> str | None:
    """None, or why CUDA can't."""
    matrices = x.shape[:-2].numel()
    if matrices > _MOST_MATRICES:
        return f"at most {_MOST_MATRICES} matrices, got {matrices}"
    # The amax numbers vectors.
    return (size_refusal(x) if given_scale is None else None) or on_cuda(x, given_scale)


if _native.has_cuda:

    @kernel("quantize_nvfp4", backend="cuda", accepts=cuda_refusal)
    def quantize_nvfp4_cuda(
        x: Tensor,
        given_scale: Tensor | None,
        coherence: float | None,
        codes: Tensor,
        block_scales: Tensor,
        tensor_scale: Tensor,
    ) -> None:
        x = with_contiguous_columns(x)
        room = room_for_amax(x) if given_scale is None else None
        stream = stream_of(x)
        _native.quantize_nvfp4_cuda(x, given_scale, room, coherence, codes, block_scales, tensor_scale, stream)

    @kernel("dequantize_nvfp4", backend="cuda", accepts=on_cuda)
    def dequantize_nvfp4_cuda(
        codes: Tensor,
        block_scales: Tensor,
        tensor_scale: Tensor,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        out: Tensor,
    ) -> None:
        inputs = (t.contiguous() for t in (codes, block_scales, tensor_scale))
        _native.dequantize_nvfp4_cuda(*inputs, out, stream_of(codes))
