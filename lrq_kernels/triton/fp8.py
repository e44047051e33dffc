"""FP8 in Triton."""

import torch
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.launch import accepts, current, matrices_of
from lrq_kernels.triton.scaled import programs, quantize_blocks, quantize_matrix, quantize_rows
from lrq_kernels.triton.unscaled import dequantize
from lrq_kernels.triton.unscaled import programs as programs_back


@kernel("quantize_fp8", backend="triton", accepts=accepts(programs))
def quantize_fp8(x: Tensor, scaling: str, block: int, given_scale: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    codes = codes.view(torch.uint8)
    with current(x):
        x = matrices_of(x)
        if scaling == "tensor":
            quantize_matrix(x, given_scale, codes, scale, fp8=True)
        elif scaling == "row":
            quantize_rows(x, codes, scale, fp8=True)
        else:
            quantize_blocks(x, block, codes, scale, fp8=True)


@kernel("dequantize_fp8", backend="triton", accepts=accepts(programs_back))
def dequantize_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    with current(codes):
        dequantize(codes, scale, out, fp8=True)
