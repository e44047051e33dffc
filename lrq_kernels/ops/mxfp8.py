"""MXFP8: E4M3 codes, a power-of-two (E8M0) scale for every 32 columns."""

import torch
from torch import Tensor

from lrq_kernels.contract import FLOATS, check_device, check_matrix, check_shape, check_size, operation, round_up
from lrq_kernels.ops.swizzle import swizzled_shape

BLOCK = 32
ROW_MULTIPLE = 32


@operation
def quantize_mxfp8(x: Tensor, coherence: float | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to MXFP8 as ComfyUI stores it.

    The scale of a block is ``2^(e-127)`` with ``e = ceil(log2(amax_block/448)) + 127``, rounded UP so that nothing
    saturates and computed exactly from the bits; the code is the nearest E4M3 value, ties to even, of
    ``x/2^(e-127)``. A block with ``e <= 0`` (amax at most about 2.6e-36) has codes 0 and scale byte 0.
    (OCP Microscaling Formats 1.0, section 6.3, with the scale rounded up as NVIDIA's recipe does.)

    With ``coherence`` = γ the scale of every block is that, or the one below, under which the largest weights saturate:
    the one with the smaller ``|E|^2 + γ <E,W>^2/|W|^2`` over the block, W the block and E its error; the smaller scale
    wins a tie. A scale above the rule's moves only small weights, to a coarser grid.

    Args:
        x: [M,N] or [B,M,N], float32, bfloat16 or float16, finite: what shares a scale with a NaN or an infinity has no
            defined codes.
        coherence: γ >= 0 takes the better scale of two; None takes the rule above.

    Returns:
        codes: float8_e4m3fn [..,32*ceil(M/32),32*ceil(N/32)], zero padded.
        block_scales: uint8 E8M0 bytes, swizzled (:func:`~lrq_kernels.ops.swizzle.swizzle_scales`), zero padded.

    Raises:
        TypeError, ValueError: dtype, shape or ``coherence`` out of the above.
    """
    check_matrix("x", x)
    if coherence is not None and not 0 <= coherence < float("inf"):
        raise ValueError(f"coherence must be finite and not negative, got {coherence}")
    batch = x.shape[:-2]
    rows, columns = round_up(x.shape[-2], ROW_MULTIPLE), round_up(x.shape[-1], BLOCK)
    return (
        x.new_empty((*batch, rows, columns), dtype=torch.float8_e4m3fn),
        x.new_empty((*batch, *swizzled_shape(rows, columns // BLOCK)), dtype=torch.uint8),
    )


@operation
def dequantize_mxfp8(
    codes: Tensor, block_scales: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of :func:`quantize_mxfp8`: ``E4M3(code) * 2^(e-127)`` in float32, then ``dtype``.

    Args:
        codes, block_scales: as :func:`quantize_mxfp8` returns them.
        rows, columns: M and N of the matrix, without padding.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``dtype`` [..,rows,columns].
    """
    check_matrix("codes", codes, (torch.float8_e4m3fn,))
    check_size(rows, columns)
    batch = codes.shape[:-2]
    padded = round_up(rows, ROW_MULTIPLE), round_up(columns, BLOCK)
    check_shape("codes", codes, (*batch, *padded), torch.float8_e4m3fn)
    check_shape("block_scales", block_scales, (*batch, *swizzled_shape(padded[0], padded[1] // BLOCK)), torch.uint8)
    check_device("block_scales", block_scales, codes)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return codes.new_empty((*batch, rows, columns), dtype=dtype)
