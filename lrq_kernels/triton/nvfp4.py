"""NVFP4 in two passes: the amax of every matrix, unless the tensor scale is given; then scales and codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.amax import amax_bits
from lrq_kernels.triton.arithmetic import largest, split_blocks, widen
from lrq_kernels.triton.launch import INTERPRETED, MOST_PROGRAMS, current, refusal
from lrq_kernels.triton.minifloat import MAX_E2M1, MAX_E4M3, decode_e4m3, encode_e4m3, pack_e2m1
from lrq_kernels.triton.search import best_scales

_RULE = {"ROWS": 128, "num_warps": 8}
# One warp: blocks wait for the slowest of their program, and its vote takes no barrier.
_SEARCH = {"ROWS": 8, "num_warps": 1}


@triton.jit
def quantize_kernel(
    x,
    outer_source,
    coherence,
    codes,
    block_scales,
    tensor_scale,
    batch_stride,
    row_stride,
    rows,
    columns,
    coded_rows,
    coded_blocks,
    scale_rows,
    scale_tiles,
    ROWS: tl.constexpr,
    GIVEN: tl.constexpr,
    SEARCH: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One tile of ROWS rows by 4 blocks, the width of a scale tile; ``scale_tiles`` of them cover a row."""
    # Backwards: the end of the matrix is what the pass over amax left in the L2 cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1)
    first_row = (tile // scale_tiles) * ROWS
    column_tile = tile % scale_tiles

    outer = tl.load(outer_source + batch)
    if not GIVEN:
        outer = tl.div_rn(outer.to(tl.float32, bitcast=True), MAX_E4M3 * MAX_E2M1)
        outer = tl.where(outer == 0, 1.0, outer)
    if tile == 0:
        tl.store(tensor_scale + batch, outer)

    row = first_row + tl.arange(0, ROWS)
    column = column_tile * 64 + tl.arange(0, 64)
    source = x + batch.to(tl.int64) * batch_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    weights = split_blocks(widen(tl.load(source, inside, 0.0)), ROWS * 4)
    magnitudes = [tl.abs(w) for w in weights]
    amax = largest(magnitudes)
    ratio = tl.minimum(tl.div_rn(tl.div_rn(amax, MAX_E2M1), outer), MAX_E4M3)
    if SEARCH:
        scale = best_scales(magnitudes, amax, ratio, outer, coherence, ROWS * 4)
    else:
        scale = encode_e4m3(ratio)

    total = outer * decode_e4m3(scale)
    divisor = tl.where(total == 0, 1.0, total)
    y = [tl.div_rn(w, divisor) for w in weights]
    low = pack_e2m1(y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7], HARDWARE)
    high = pack_e2m1(y[8], y[9], y[10], y[11], y[12], y[13], y[14], y[15], HARDWARE)
    packed = tl.where(total == 0, 0, low.to(tl.int64) | high.to(tl.int64) << 32)

    index = tl.arange(0, ROWS * 4)
    row = first_row + index // 4
    block = column_tile * 4 + index % 4
    place = codes + (batch.to(tl.int64) * coded_rows + row) * coded_blocks + block
    tl.store(place, packed, (row < coded_rows) & (block < coded_blocks))
    swizzled = (row // 128).to(tl.int64) * scale_tiles + column_tile
    swizzled = swizzled * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + index % 4
    place = block_scales + batch.to(tl.int64) * scale_rows * (scale_tiles * 4) + swizzled
    tl.store(place, scale.to(tl.uint8))


def _programs(x: Tensor, config: dict[str, int]) -> int:
    return triton.cdiv(x.shape[-2], 128) * (128 // config["ROWS"]) * triton.cdiv(x.shape[-1], 64)


def _refusal(x: Tensor, given_scale: Tensor | None, coherence: float | None) -> str | None:
    reason = refusal(x, given_scale)
    if reason is None and _programs(x, _RULE if coherence is None else _SEARCH) > MOST_PROGRAMS:
        reason = f"matrix too large for one launch: {list(x.shape[-2:])}"
    return reason


def _hardware(x: Tensor) -> bool:
    """Whether the GPU has ``cvt.rn.satfinite.e2m1x2.f32``."""
    return x.is_cuda and not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (10, 0)


@kernel("quantize_nvfp4", backend="triton", accepts=_refusal)
def quantize_nvfp4(
    x: Tensor,
    given_scale: Tensor | None,
    coherence: float | None,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
) -> None:
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    matrices = x if x.dim() == 3 else x[None]
    batch, rows, columns = matrices.shape
    config = _RULE if coherence is None else _SEARCH
    with current(x):
        quantize_kernel[_programs(x, config), batch](
            matrices,
            amax_bits(matrices) if given_scale is None else given_scale.detach().contiguous(),
            float(coherence or 0.0),
            codes.view(torch.int64),
            block_scales.view(torch.uint8),
            tensor_scale,
            matrices.stride(0),
            matrices.stride(1),
            rows,
            columns,
            codes.shape[-2],
            codes.shape[-1] // 8,
            block_scales.shape[-2],
            block_scales.shape[-1] // 4,
            GIVEN=given_scale is not None,
            SEARCH=coherence is not None,
            HARDWARE=_hardware(x),
            enable_fp_fusion=False,
            **config,
        )
