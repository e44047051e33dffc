"""4-bit codes in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, stream_of, with_contiguous_columns


@kernel("pack_fp4", backend="cpu", accepts=on_cpu)
def pack_fp4_cpu(codes: Tensor, high_first: bool, out: Tensor) -> None:
    _native.pack_fp4_cpu(with_contiguous_columns(codes), high_first, out, torch.get_num_threads())


@kernel("unpack_fp4", backend="cpu", accepts=on_cpu)
def unpack_fp4_cpu(packed: Tensor, high_first: bool, out: Tensor) -> None:
    _native.unpack_fp4_cpu(with_contiguous_columns(packed), high_first, out, torch.get_num_threads())


if _native.has_cuda:

    @kernel("pack_fp4", backend="cuda", accepts=on_cuda)
    def pack_fp4_cuda(codes: Tensor, high_first: bool, out: Tensor) -> None:
        codes = with_contiguous_columns(codes)
        _native.pack_fp4_cuda(codes, high_first, out, stream_of(codes))

    @kernel("unpack_fp4", backend="cuda", accepts=on_cuda)
    def unpack_fp4_cuda(packed: Tensor, high_first: bool, out: Tensor) -> None:
        packed = with_contiguous_columns(packed)
        _native.unpack_fp4_cuda(packed, high_first, out, stream_of(packed))
