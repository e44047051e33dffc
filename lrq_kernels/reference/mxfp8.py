import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_kernels.dispatch import kernel
from lrq_kernels.minifloat import E4M3_MAX, LAST_EXPONENT, encode_e4m3, power_of_two
from lrq_kernels.ops.mxfp8 import BLOCK
from lrq_kernels.reference.arithmetic import divide
from lrq_kernels.reference.search import Candidates, best_scales
from lrq_kernels.reference.swizzle import swizzle_scales, unswizzle_scales

ZERO_BELOW = E4M3_MAX * 2.0**-127
"""A block with amax at or below this has no exponent: it is zero."""


def rounded_up_exponent(amax: Tensor) -> Tensor:
    """``ceil(log2(amax/448)) + 127``, exact from the bits, int32; 0 for a block that counts as zero."""
    bits = divide(amax, E4M3_MAX).view(torch.int32)
    return torch.where(amax <= ZERO_BELOW, 0, (bits + 0x7FFFFF) >> 23)


def _searched(blocks: Tensor, amax: Tensor, start: Tensor, coherence: float) -> Tensor:
    """Best exponents of the blocks [n,32]."""
    found = torch.nonzero(start > 0)[:, 0]
    unit = power_of_two(LAST_EXPONENT - start[found])

    def candidates(part: slice) -> Candidates:
        units = unit[part]
        return Candidates(
            first=1,
            last=LAST_EXPONENT,
            octave=1,
            doubles_from=1,
            scale=lambda index, code: power_of_two(code) * units[index],
            nearest=lambda y: encode_e4m3(y).float(),
            largest=E4M3_MAX,
            zero_below=2.0**-10,
        )

    exponents = torch.zeros_like(start)
    blocks, amax = blocks[found] * unit[:, None], amax[found] * unit
    exponents[found] = best_scales(blocks, amax, start[found], coherence, candidates)
    return exponents


@kernel("quantize_mxfp8", backend="reference")
def quantize_mxfp8(x: Tensor, coherence: float | None, codes: Tensor, block_scales: Tensor) -> None:
    rows, columns = codes.shape[-2:]
    blocks = pad(x.float(), (0, columns - x.shape[-1], 0, rows - x.shape[-2])).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    exponent = rounded_up_exponent(amax)
    if coherence is not None:
        exponent = _searched(blocks.flatten(0, -2), amax.flatten(), exponent.flatten(), coherence).view(amax.shape)
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
