"""Largest magnitude in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, on_cuda, size_refusal, stream_of, with_contiguous_columns


@kernel("amax", backend="cpu", accepts=on_cpu)
def amax_cpu(x: Tensor, out: Tensor) -> None:
    _native.amax_cpu(with_contiguous_columns(x), out, torch.get_num_threads())


def cuda_refusal(x: Tensor) -> str | None:
    """None, or why CUDA can't."""
    return size_refusal(x) or on_cuda(x)


if _native.has_cuda:

    @kernel("amax", backend="cuda", accepts=cuda_refusal)
    def amax_cuda(x: Tensor, out: Tensor) -> None:
        x = with_contiguous_columns(x)
        _native.amax_cuda(x, out, stream_of(x))
