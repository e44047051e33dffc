"""NVFP4 in two passes: the amax of every matrix, unless the tensor scale is given; then scales and codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.amax import amax_bits
from lrq_kernels.triton.arithmetic import largest
from lrq_kernels.triton.blocks import load_16, load_scales, place_blocks, programs, store_values
from lrq_kernels.triton.launch import INTERPRETED, accepts, current, dense, has_e4m3, matrices_of, size_refusal
from lrq_kernels.triton.minifloat import decode_e2m1, decode_signed_e4m3, encode_e4m3
from lrq_kernels.triton.nvfp4_rule import (
    LEAST_OUTER,
    MOST_OUTER,
    encode_blocks,
    load_outer,
    quick_rule,
    ratio_of,
    store_blocks,
)
from lrq_kernels.triton.nvfp4_search import search_kernel, table_of
from lrq_kernels.triton.quotient import reciprocal

FUSED = not INTERPRETED
"""Whether products and sums have one rounding: the interpreter fuses nothing."""
_RULE = {"BLOCKS": 256, "num_warps": 2}
# One warp: blocks wait for the slowest of their program, and its vote takes no barrier.
_SEARCH = {"BLOCKS": 32, "num_warps": 1}
_EXPAND = {"BLOCKS": 256, "num_warps": 4}


@triton.jit
def rule_kernel(
    x,
    outer_source,
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
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    GIVEN: tl.constexpr,
    FUSED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """BLOCKS blocks, neighbours among the swizzled scales, by the rule of amax."""
    # Backwards: the end of the matrix is what the pass over amax left in the L2 cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    outer = load_outer(outer_source, tensor_scale, tile == 0, GIVEN)
    remain = True
    if FUSED:
        row, block, position = place_blocks(tile, tl.arange(0, BLOCKS), coded_blocks, BLOCKS)
        weights = load_16(x, row, block * 16, batch_stride, row_stride, rows, columns)
        scale, packed, right = quick_rule(weights, outer, reciprocal(outer), HARDWARE)
        remain = (tl.min(right.to(tl.int32)) == 0) | (outer < LEAST_OUTER) | (outer > MOST_OUTER)
        if not remain:
            store_blocks(codes, block_scales, packed, scale, row, block, position, coded_rows, coded_blocks, scale_rows)
    if remain:
        for first in range(0, BLOCKS, CHUNK):
            place = place_blocks(tile, first + tl.arange(0, CHUNK), coded_blocks, BLOCKS)
            few = load_16(x, place[0], place[1] * 16, batch_stride, row_stride, rows, columns)
            ruled = encode_e4m3(ratio_of(largest([tl.abs(w) for w in few]), outer))
            few = encode_blocks(few, ruled, outer, HARDWARE)
            store_blocks(
                codes, block_scales, few, ruled, place[0], place[1], place[2], coded_rows, coded_blocks, scale_rows
            )


@triton.jit
def expand_kernel(
    codes,
    block_scales,
    tensor_scale,
    out,
    rows,
    columns,
    coded_rows,
    coded_blocks,
    scale_rows,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Values of BLOCKS blocks; a thread takes WIDTH neighbours, whose codes are one integer."""
    units: tl.constexpr = 16 // WIDTH
    index = tl.arange(0, BLOCKS * units)
    # A mask: of a remainder it would be known that neighbours are, and one thread would load them all.
    unit = index & (units - 1)
    row, block, position = place_blocks(tl.program_id(0), index // units, coded_blocks, BLOCKS)
    batch = tl.program_id(1).to(tl.int64)
    place = codes + (batch * coded_rows + row) * (coded_blocks * units) + block * units + unit
    word = tl.load(place, (row < coded_rows) & (block < coded_blocks), 0).to(tl.int32)
    scale = load_scales(block_scales, position, scale_rows, coded_blocks).to(tl.uint8)
    total = tl.load(tensor_scale + batch) * decode_signed_e4m3(scale, HARDWARE)
    # The even column is in the high nibble.
    shift = 4 * (tl.arange(0, WIDTH) ^ 1)
    values = decode_e2m1(word[:, None] >> shift[None, :]) * total[:, None]
    store_values(out, values, row, block * 16 + unit * WIDTH, rows, columns)


def _config(coherence: float | None) -> dict[str, int]:
    # The interpreter takes as long for many blocks as for few.
    return {"BLOCKS": 512} if INTERPRETED else _RULE if coherence is None else _SEARCH


def _quantize_programs(x: Tensor, given_scale: Tensor | None, coherence: float | None) -> int:
    return programs(*x.shape[-2:], 16, _config(coherence)["BLOCKS"])


def _hardware(x: Tensor) -> bool:
    """Whether the GPU has ``cvt.rn.satfinite.e2m1x2.f32``."""
    return x.is_cuda and not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (10, 0)


def _chunk(config: dict[str, int]) -> int:
    """Blocks that a program divides at a time."""
    return config["BLOCKS"] if INTERPRETED else 32 * config["num_warps"]


@kernel("quantize_nvfp4", backend="triton", accepts=accepts(_quantize_programs))
def quantize_nvfp4(
    x: Tensor,
    given_scale: Tensor | None,
    coherence: float | None,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
) -> None:
    matrices = matrices_of(x)
    batch, rows, columns = matrices.shape
    config = _config(coherence)
    given = given_scale is not None
    with current(x):
        tensors = (
            matrices,
            given_scale.detach().contiguous() if given else amax_bits(matrices),
            codes.view(torch.int64),
            block_scales.view(torch.uint8),
            tensor_scale,
        )
        sizes = (
            matrices.stride(0),
            matrices.stride(1),
            rows,
            columns,
            codes.shape[-2],
            codes.shape[-1] // 8,
            block_scales.shape[-2],
        )
        grid = _quantize_programs(x, given_scale, coherence), batch
        fixed = dict(config, GIVEN=given, FUSED=FUSED, HARDWARE=_hardware(x), enable_fp_fusion=False)
        if coherence is None:
            rule_kernel[grid](*tensors, *sizes, CHUNK=_chunk(config), **fixed)
        else:
            gamma = float(coherence)
            table = table_of(tensors[1], given, batch, gamma) if FUSED and x.dtype == torch.bfloat16 else None
            search_kernel[grid](*tensors, table, gamma, *sizes, **fixed)


def _expand_programs(
    codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> int:
    return programs(rows, columns, 16, _EXPAND["BLOCKS"])


_fits = accepts(_expand_programs)


def _expand_refusal(
    codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> str | None:
    # Codes have half as many columns.
    return size_refusal(rows, columns) or _fits(codes, block_scales, tensor_scale, rows, columns, dtype)


@kernel("dequantize_nvfp4", backend="triton", accepts=_expand_refusal)
def dequantize_nvfp4(
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    # 16 bytes a store.
    width = 16 // dtype.itemsize
    with current(codes):
        expand_kernel[
            _expand_programs(codes, block_scales, tensor_scale, rows, columns, dtype), out.shape[:-2].numel()
        ](
            dense(codes, width // 2).view({8: torch.int32, 4: torch.int16}[width]),
            block_scales.contiguous().view(torch.uint8),
            tensor_scale.detach().contiguous(),
            out,
            rows,
            columns,
            codes.shape[-2],
            codes.shape[-1] // 8,
            block_scales.shape[-2],
            WIDTH=width,
            HARDWARE=has_e4m3(codes),
            enable_fp_fusion=False,
            **_EXPAND,
        )
