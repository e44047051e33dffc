"""INT8 in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from lrq_kernels import _native
from lrq_kernels.dispatch import kernel
from lrq_kernels.native.memory import on_cpu, with_contiguous_columns


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
