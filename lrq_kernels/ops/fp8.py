"""FP8: E4M3 codes, a float32 scale for the matrix, a row or a square block."""

import torch
from torch import Tensor

from lrq_kernels.contract import FLOATS, check_matrix, operation
from lrq_kernels.ops.scaling import check_given_scale, check_scale_of, scale_shape


@operation
def quantize_fp8(
    x: Tensor, scaling: str = "tensor", block: int = 128, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize to FP8 E4M3.

    ``scale = amax/448`` of what shares it (tensor: 1 where amax/448 is 0; row and block: ``max(amax,1e-12)/448``),
    and the code is the nearest E4M3 value, ties to even, of ``clamp(x/scale, -448, 448)``; all in float32 with
    correctly rounded division.

    Args:
        x: [M,N] or [B,M,N], float32, bfloat16 or float16, finite: what shares a scale with a NaN or an infinity has no
            defined codes.
        scaling: ``tensor``, ``row`` or ``block``.
        block: side of the square block, for ``block``; it divides M and N.
        scale: float32 [] or [B], for ``tensor``: use this scale.

    Returns:
        codes: float8_e4m3fn [..,M,N].
        scale: float32, [..] (tensor), [..,M] (row) or [..,M/block,N/block] (block).

    Raises:
        TypeError, ValueError: dtype, shape or scaling out of the above.

    Equivalent to (tensor)::

        scale = x.abs().max().float() / 448
        codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    """
    check_matrix("x", x)
    check_given_scale(scale, scaling, x)
    shape = scale_shape(x.shape, scaling, block, row_tail=())
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return codes, x.new_empty(shape, dtype=torch.float32)


@operation
def dequantize_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize_fp8`: ``E4M3(code) * scale`` in float32, then ``dtype``; [..,M,N].

    Equivalent to (tensor)::

        (codes.float() * scale).to(dtype)
    """
    check_matrix("codes", codes, (torch.float8_e4m3fn,))
    check_scale_of(scale, codes, row_tail=())
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
