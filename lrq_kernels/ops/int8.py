"""INT8: symmetric integer codes, a float32 scale for the matrix, a row or a square block; optionally rotated."""

import torch
from torch import Tensor

from lrq_kernels.contract import FLOATS, check_matrix, operation
from lrq_kernels.ops.hadamard import check_group
from lrq_kernels.ops.scaling import check_given_scale, check_scale_of, scale_shape


@operation
def quantize_int8(
    x: Tensor, scaling: str = "tensor", block: int = 128, scale: Tensor | None = None, hadamard: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantize to symmetric INT8.

    ``scale = max(amax/127, 1e-30)`` of what shares it, and the code is ``x/scale`` rounded half to even and clamped
    to -127..127; all in float32 with correctly rounded division.

    Args:
        x: [M,N] or [B,M,N], float32, bfloat16 or float16, finite: what shares a scale with a NaN or an infinity, or
            with a sum of the rotation that overflows float32, has no defined codes.
        scaling: ``tensor``, ``row`` or ``block``.
        block: side of the square block, for ``block``; it divides M and N.
        scale: float32 [] or [B], for ``tensor``: use this scale.
        hadamard: rotate groups of this many columns first (:func:`~lrq_kernels.ops.hadamard.rotate_hadamard`); 0: no.

    Returns:
        codes: int8 [..,M,N].
        scale: float32, [..] (tensor), [..,M,1] (row) or [..,M/block,N/block] (block).

    Raises:
        TypeError, ValueError: dtype, shape, scaling or group out of the above.

    Equivalent to (row)::

        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)
        codes = (x.float() / scale).round().to(torch.int8)
    """
    check_matrix("x", x)
    check_given_scale(scale, scaling, x)
    if hadamard:
        check_group(hadamard, x.shape[-1])
    shape = scale_shape(x.shape, scaling, block, row_tail=(1,))
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty(shape, dtype=torch.float32)


@operation
def dequantize_int8(codes: Tensor, scale: Tensor, hadamard: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of :func:`quantize_int8`: ``code * scale`` in float32, rotated back if ``hadamard``, then ``dtype``.

    Equivalent to (row, no rotation)::

        (codes.float() * scale).to(dtype)
    """
    check_matrix("codes", codes, (torch.int8,))
    check_scale_of(scale, codes, row_tail=(1,))
    if hadamard:
        check_group(hadamard, codes.shape[-1])
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
