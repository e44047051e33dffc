"""NVFP4: E2M1 codes, an E4M3 scale for every 16 columns, a float32 scale for the matrix."""

import torch
from torch import Tensor

from lrq_kernels.contract import FLOATS, check_device, check_matrix, check_shape, check_size, operation, round_up
from lrq_kernels.ops.swizzle import swizzled_shape

BLOCK = 16
ROW_MULTIPLE = 16


@operation
def quantize_nvfp4(
    x: Tensor, tensor_scale: Tensor | None = None, coherence: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to NVFP4 as ComfyUI stores it.

    With ``amax`` the largest magnitude of the matrix, or of a block: ``tensor_scale = amax/(448*6)`` unless given
    (1 for an all-zero matrix), ``scale = E4M3(min((amax_block/6)/tensor_scale, 448))``, and the code is the
    nearest E2M1 value, ties to even, of ``clamp(x/(tensor_scale*scale), -6, 6)``; all in float32 with correctly
    rounded division. A block whose scale is 0 has codes 0. (NVIDIA, "Pretraining LLMs with NVFP4", appendix C.)

    With ``coherence`` = γ the scale of every block is instead the E4M3 value that minimises
    ``|E|^2 + γ <E,W>^2/|W|^2`` over the block, W the block and E its error; the smaller scale wins a tie.

    Args:
        x: [M,N] or [B,M,N], float32, bfloat16 or float16, finite: what shares a scale with a NaN or an infinity has no
            defined codes.
        tensor_scale: float32 [] or [B], positive; computed if absent.
        coherence: γ >= 0 searches the best scales; None takes the rule above.

    Returns:
        codes: uint8 [..,16*ceil(M/16),8*ceil(N/16)], the even column in the high nibble, zero padded.
        block_scales: float8_e4m3fn, swizzled (:func:`~lrq_kernels.ops.swizzle.swizzle_scales`), zero padded.
        tensor_scale: float32 [] or [B], a copy of the one used.

    Raises:
        TypeError, ValueError: dtype, shape or ``coherence`` out of the above.
    """
    check_matrix("x", x)
    if tensor_scale is not None:
        check_shape("tensor_scale", tensor_scale, x.shape[:-2], torch.float32)
        check_device("tensor_scale", tensor_scale, x)
    if coherence is not None and not 0 <= coherence < float("inf"):
        raise ValueError(f"coherence must be finite and not negative, got {coherence}")
    batch = x.shape[:-2]
    rows, columns = round_up(x.shape[-2], ROW_MULTIPLE), round_up(x.shape[-1], BLOCK)
    return (
        x.new_empty((*batch, rows, columns // 2), dtype=torch.uint8),
        x.new_empty((*batch, *swizzled_shape(rows, columns // BLOCK)), dtype=torch.float8_e4m3fn),
        x.new_empty(batch, dtype=torch.float32),
    )


@operation
def dequantize_nvfp4(
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Inverse of :func:`quantize_nvfp4`: ``E2M1(code) * (tensor_scale * scale)`` in float32, then ``dtype``.

    Args:
        codes, block_scales, tensor_scale: as :func:`quantize_nvfp4` returns them.
        rows, columns: M and N of the matrix, without padding.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``dtype`` [..,rows,columns].
    """
    check_matrix("codes", codes, (torch.uint8,))
    check_size(rows, columns)
    batch = codes.shape[:-2]
    padded = round_up(rows, ROW_MULTIPLE), round_up(columns, BLOCK)
    check_shape("codes", codes, (*batch, padded[0], padded[1] // 2), torch.uint8)
    scales_shape = (*batch, *swizzled_shape(padded[0], padded[1] // BLOCK))
    check_shape("block_scales", block_scales, scales_shape, torch.float8_e4m3fn)
    check_shape("tensor_scale", tensor_scale, batch, torch.float32)
    check_device("block_scales", block_scales, codes)
    check_device("tensor_scale", tensor_scale, codes)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return codes.new_empty((*batch, rows, columns), dtype=dtype)
