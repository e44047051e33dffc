"""The Hadamard rotation in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import group_refusal, on_cpu, on_cuda, stream_of, with_contiguous_columns


@kernel("rotate_hadamard", backend="cpu", accepts=on_cpu)
def rotate_hadamard_cpu(x: Tensor, group: int, out: Tensor) -> None:
    _native.rotate_hadamard_cpu(with_contiguous_columns(x), group, out, torch.get_num_threads())


def cuda_refusal(x: Tensor, group: int) -> str | None:
    """None, or why CUDA can't."""
    return group_refusal(group) or on_cuda(x)


if _native.has_cuda:

    @kernel("rotate_hadamard", backend="cuda", accepts=cuda_refusal)
    def rotate_hadamard_cuda(x: Tensor, group: int, out: Tensor) -> None:
        x = with_contiguous_columns(x)
        _native.rotate_hadamard_cuda(x, group, out, stream_of(x))
