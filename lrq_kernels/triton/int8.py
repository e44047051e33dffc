"""INT8 in Triton."""

import torch
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.hadamard import group_refusal, rotate_matrices
from lrq_kernels.triton.launch import accepts, current, matrices_of
from lrq_kernels.triton.rotated_rows import quantize_rotated_rows, rotated_rows_config
from lrq_kernels.triton.scaled import programs, quantize_blocks, quantize_matrix, quantize_rows
from lrq_kernels.triton.unscaled import dequantize
from lrq_kernels.triton.unscaled import programs as programs_back

_launches = accepts(programs)
_launches_back = accepts(programs_back)


def _refusal(x: Tensor, scaling: str, block: int, given_scale: Tensor | None, hadamard: int) -> str | None:
    return group_refusal(hadamard) or _launches(x, scaling, block, given_scale)


def _rotated(x: Tensor, group: int) -> Tensor:
    rotated = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    rotate_matrices(x, group, rotated)
    return rotated


@kernel("quantize_int8", backend="triton", accepts=_refusal)
def quantize_int8(
    x: Tensor, scaling: str, block: int, given_scale: Tensor | None, hadamard: int, codes: Tensor, scale: Tensor
) -> None:
    codes = codes.view(torch.uint8)
    with current(x):
        x = matrices_of(x)
        # Rows are rotated where they are held; the other scales are seldom of rotated weights.
        held = rotated_rows_config(x.shape[2], hadamard) if hadamard and scaling == "row" else None
        if held is not None:
            quantize_rotated_rows(x, held, codes, scale)
            return
        if hadamard:
            x = _rotated(x, hadamard)
        if scaling == "tensor":
            quantize_matrix(x, given_scale, codes, scale, fp8=False)
        elif scaling == "row":
            quantize_rows(x, codes, scale, fp8=False)
        else:
            quantize_blocks(x, block, codes, scale, fp8=False)


def _refusal_back(codes: Tensor, scale: Tensor, hadamard: int, dtype: torch.dtype) -> str | None:
    return group_refusal(hadamard) or _launches_back(codes, scale)


@kernel("dequantize_int8", backend="triton", accepts=_refusal_back)
def dequantize_int8(codes: Tensor, scale: Tensor, hadamard: int, dtype: torch.dtype, out: Tensor) -> None:
    with current(codes):
        values = torch.empty_like(out, dtype=torch.float32) if hadamard else out
        dequantize(codes, scale, values, fp8=False)
        if hadamard:
            rotate_matrices(matrices_of(values), hadamard, out)
