import torch
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.ops.scaling import expand_scale
from lrq_kernels.reference.arithmetic import divide
from lrq_kernels.reference.fp8 import shared_amax
from lrq_kernels.reference.hadamard import rotate


@kernel("quantize_int8", backend="reference")
def quantize_int8(
    x: Tensor, scaling: str, block: int, given_scale: Tensor | None, hadamard: int, codes: Tensor, scale: Tensor
) -> None:
    if hadamard:
        x = rotate(x, hadamard)
    if given_scale is not None:
        scale.copy_(given_scale)
    else:
        scale.copy_(divide(shared_amax(x, scaling, block), 127).clamp(min=1e-30).reshape(scale.shape))
    codes.copy_((x.float() / expand_scale(scale, x.shape)).round().clamp(-127, 127))


@kernel("dequantize_int8", backend="reference")
def dequantize_int8(codes: Tensor, scale: Tensor, hadamard: int, dtype: torch.dtype, out: Tensor) -> None:
    values = codes.float() * expand_scale(scale, codes.shape)
    out.copy_(rotate(values, hadamard) if hadamard else values)
