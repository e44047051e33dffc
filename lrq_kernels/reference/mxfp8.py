import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_kernels.dispatch import kernel
from lrq_kernels.minifloat import E4M3_MAX, LAST_EXPONENT, encode_e4m3, power_of_two
from lrq_kernels.ops.mxfp8 import BLOCK
from lrq_kernels.reference.arithmetic import divide, tree_sum
from lrq_kernels.reference.swizzle import swizzle_scales, unswizzle_scales

ZERO_BELOW = E4M3_MAX * 2.0**-127
"""A block with amax at or below this has no exponent: it is zero."""


def rounded_up_exponent(amax: Tensor) -> Tensor:
    """``ceil(log2(amax/448)) + 127``, exact from the bits, int32; 0 for a block that counts as zero."""
    bits = divide(amax, E4M3_MAX).view(torch.int32)
    return torch.where(amax <= ZERO_BELOW, 0, (bits + 0x7FFFFF) >> 23)


def _objective(blocks: Tensor, step: int, gain: Tensor) -> Tensor:
    """``|E|^2 + gain·<E,W>^2`` of blocks [n,32] under the scale 2^step."""
    y = blocks * 2.0**-step
    error = encode_e4m3(y).float() - y
    along = tree_sum(error * y) * 4.0**step
    return tree_sum(error * error) * 4.0**step + gain * (along * along)


def _searched(blocks: Tensor, start: Tensor, coherence: float) -> Tensor:
    """The better one of the exponents start [n] and start - 1, the smaller of equals, of the blocks [n,32]."""
    found = torch.nonzero(start > 1)[:, 0]
    # In units in which the scale of the start is 1.
    blocks = blocks[found] * power_of_two(LAST_EXPONENT - start[found])[:, None]
    gain = torch.full_like(blocks[:, 0], coherence) / tree_sum(blocks * blocks)
    lower = _objective(blocks, -1, gain) <= _objective(blocks, 0, gain)
    return start.index_add(0, found, -lower.int())


@kernel("quantize_mxfp8", backend="reference")
def quantize_mxfp8(x: Tensor, coherence: float | None, codes: Tensor, block_scales: Tensor) -> None:
    rows, columns = codes.shape[-2:]
    blocks = pad(x.float(), (0, columns - x.shape[-1], 0, rows - x.shape[-2])).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    exponent = rounded_up_exponent(amax)
    if coherence is not None:
        exponent = _searched(blocks.flatten(0, -2), exponent.flatten(), coherence).view(amax.shape)
    y = torch.where(exponent[..., None] > 0, blocks * power_of_two(254 - exponent)[..., None], 0.0)
    codes.copy_(encode_e4m3(y).flatten(-2))
    swizzle_scales(exponent.to(torch.uint8), block_scales)


@kernel("dequantize_mxfp8", backend="reference")
def dequantize_mxfp8(
    codes: Tensor, block_scales: Tensor, rows: int, columns: int, dtype: torch.dtype, out: Tensor
) -> None:
    shape = (*codes.shape[:-1], codes.shape[-1] // BLOCK)
    exponents = block_scales.new_empty(shape)
    unswizzle_scales(block_scales, *shape[-2:], exponents)
    values = codes.float().unflatten(-1, (-1, BLOCK)) * power_of_two(exponents.int())[..., None]
    out.copy_(values.flatten(-2)[..., :rows, :columns])
