import torch
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.minifloat import E4M3_MAX, encode_e4m3
from lrq_kernels.ops.scaling import expand_scale
from lrq_kernels.reference.arithmetic import divide


def shared_amax(x: Tensor, scaling: str, block: int) -> Tensor:
    """Largest magnitude of what shares a scale, float32: [..], [..,M] or [..,M/block,N/block]."""
    if scaling == "tensor":
        return x.abs().amax((-2, -1)).float()
    if scaling == "row":
        return x.abs().amax(-1).float()
    return x.abs().unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).amax((-3, -1)).float()


@kernel("quantize_fp8", backend="reference")
def quantize_fp8(x: Tensor, scaling: str, block: int, given_scale: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    if given_scale is not None:
        scale.copy_(given_scale)
    elif scaling == "tensor":
        quotient = divide(shared_amax(x, scaling, block), E4M3_MAX)
        scale.copy_(torch.where(quotient == 0, 1.0, quotient))
    else:
        scale.copy_(divide(shared_amax(x, scaling, block).clamp(min=1e-12), E4M3_MAX))
    codes.copy_(encode_e4m3(x.float() / expand_scale(scale, x.shape)))


@kernel("dequantize_fp8", backend="reference")
def dequantize_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    out.copy_(codes.float() * expand_scale(scale, codes.shape))
