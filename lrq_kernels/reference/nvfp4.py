import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_kernels.dispatch import kernel
from lrq_kernels.minifloat import (
    E2M1_MAX,
    E4M3_MAX,
    LAST_EXPONENT,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    nearest_e2m1,
    power_of_two,
)
from lrq_kernels.ops.nvfp4 import BLOCK
from lrq_kernels.reference.arithmetic import divide
from lrq_kernels.reference.fp4 import pack_fp4, unpack_fp4
from lrq_kernels.reference.search import Candidates, best_scales
from lrq_kernels.reference.swizzle import swizzle_scales, unswizzle_scales

LAST_SCALE = 126  # 448, the largest E4M3 value
FAR = 2.0**20


def _searched(blocks: Tensor, amax: Tensor, ratio: Tensor, tensor_scale: Tensor, coherence: float) -> Tensor:
    """Best scale codes of the blocks [n,16], whose rule gives ``ratio``; uint8 [n]."""
    code = ratio.to(torch.float8_e4m3fn).view(torch.uint8).int().clamp(min=1)
    total = tensor_scale * decode_e4m3(code)
    saturates = amax / total > E2M1_MAX
    start = torch.where((amax > 0) & (total > 0), (code + saturates).clamp(max=LAST_SCALE), 0)
    total = tensor_scale * decode_e4m3(start)
    # Of a block far beyond the last scale that is the best one: its largest weight decides.
    found = torch.nonzero((start > 0) & (amax <= FAR * total))[:, 0]
    blocks, amax, tensor_scale = blocks[found], amax[found], tensor_scale[found]
    unit = power_of_two(LAST_EXPONENT - (total[found].view(torch.int32) >> 23))
    blocks, amax = blocks * unit[:, None], amax * unit

    def candidates(part: slice) -> Candidates:
        scale, units = tensor_scale[part], unit[part]
        return Candidates(
            first=1,
            last=LAST_SCALE,
            octave=8,
            doubles_from=16,
            scale=lambda index, code: scale[index] * decode_e4m3(code) * units[index],
            nearest=nearest_e2m1,
            largest=E2M1_MAX,
            zero_below=0.25,
        )

    start[found] = best_scales(blocks, amax, start[found], coherence, candidates)
    return start.to(torch.uint8)


@kernel("quantize_nvfp4", backend="reference")
def quantize_nvfp4(
    x: Tensor,
    given_scale: Tensor | None,
    coherence: float | None,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
) -> None:
    if given_scale is not None:
        tensor_scale.copy_(given_scale)
    else:
        quotient = divide(x.abs().amax((-2, -1)).float(), E4M3_MAX * E2M1_MAX)
        tensor_scale.copy_(torch.where(quotient == 0, 1.0, quotient))
    rows, columns = codes.shape[-2], codes.shape[-1] * 2
    blocks = pad(x.float(), (0, columns - x.shape[-1], 0, rows - x.shape[-2])).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    outer = tensor_scale[..., None, None].expand(amax.shape)
    ratio = (divide(amax, E2M1_MAX) / outer).clamp(max=E4M3_MAX)
    if coherence is None:
        scales = ratio.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        flat = _searched(blocks.flatten(0, -2), amax.flatten(), ratio.flatten(), outer.flatten(), coherence)
        scales = flat.view(amax.shape)
    total = (outer * decode_e4m3(scales))[..., None]
    y = torch.where(total == 0, 0.0, blocks / torch.where(total == 0, 1.0, total))
    pack_fp4(encode_e2m1(nearest_e2m1(y)).flatten(-2), True, codes)
    swizzle_scales(scales.view(torch.float8_e4m3fn), block_scales)


@kernel("dequantize_nvfp4", backend="reference")
def dequantize_nvfp4(
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    unpacked = codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 2))
    unpack_fp4(codes, True, unpacked)
    shape = (*unpacked.shape[:-1], unpacked.shape[-1] // BLOCK)
    scales = block_scales.new_empty(shape)
    unswizzle_scales(block_scales, *shape[-2:], scales)
    total = tensor_scale[..., None, None] * scales.float()
    values = decode_e2m1(unpacked).unflatten(-1, (-1, BLOCK)) * total[..., None]
    out.copy_(values.flatten(-2)[..., :rows, :columns])
