"""The tiles of block scales in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, stream_of, with_contiguous_columns


@kernel("swizzle_scales", backend="cpu", accepts=on_cpu)
def swizzle_scales_cpu(scales: Tensor, out: Tensor) -> None:
    _native.swizzle_scales_cpu(with_contiguous_columns(scales), out, torch.get_num_threads())


@kernel("unswizzle_scales", backend="cpu", accepts=on_cpu)
def unswizzle_scales_cpu(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
    _native.unswizzle_scales_cpu(swizzled.contiguous(), out, torch.get_num_threads())


if _native.has_cuda:

    @kernel("swizzle_scales", backend="cuda", accepts=on_cuda)
    def swizzle_scales_cuda(scales: Tensor, out: Tensor) -> None:
        scales = with_contiguous_columns(scales)
        _native.swizzle_scales_cuda(scales, out, stream_of(scales))

    @kernel("unswizzle_scales", backend="cuda", accepts=on_cuda)
    def unswizzle_scales_cuda(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
        swizzled = swizzled.contiguous()
        _native.unswizzle_scales_cuda(swizzled, out, stream_of(swizzled))
