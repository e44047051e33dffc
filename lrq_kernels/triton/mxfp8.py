"""MXFP8 in one pass: the exponents of the blocks, by the rule or by a search, and the codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.dispatch import kernel
from lrq_kernels.triton.arithmetic import widen
from lrq_kernels.triton.blocks import load_16, load_scales, place_blocks, programs, store_scales, store_values
from lrq_kernels.triton.launch import INTERPRETED, accepts, current, has_e4m3, matrices_of
from lrq_kernels.triton.minifloat import decode_e8m0, decode_signed_e4m3, encode_signed_e4m3, reciprocal_e8m0
from lrq_kernels.triton.mxfp8_search import best_exponents, ruled_exponent

_RULE = {"BLOCKS": 128, "num_warps": 4}
_SEARCH = {"BLOCKS": 64, "num_warps": 2}
_EXPAND = {"BLOCKS": 128, "num_warps": 4}


@triton.jit
def _load(x, row, block, batch_stride, row_stride, rows, columns):
    column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x += tl.program_id(1).to(tl.int64) * batch_stride
    inside = (row < rows)[:, None] & (column < columns)
    return widen(tl.load(x + row.to(tl.int64)[:, None] * row_stride + column, inside, 0.0))


@triton.jit
def _store(codes, values, exponent, row, block, coded_rows, coded_blocks, HARDWARE: tl.constexpr):
    # A block without an exponent has codes 0, whatever the signs.
    y = values * reciprocal_e8m0(exponent)[:, None]
    code = encode_signed_e4m3(tl.where(exponent[:, None] > 0, y, 0.0), HARDWARE)
    place = codes + ((tl.program_id(1).to(tl.int64) * coded_rows + row) * coded_blocks + block)[:, None] * 32
    inside = (row < coded_rows) & (block < coded_blocks)
    tl.store(place + tl.arange(0, 32)[None, :], code, inside[:, None])


@triton.jit
def rule_kernel(
    x,
    codes,
    block_scales,
    batch_stride,
    row_stride,
    rows,
    columns,
    coded_rows,
    coded_blocks,
    scale_rows,
    BLOCKS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """BLOCKS blocks, neighbours among the swizzled scales, by the rule of amax."""
    row, block, position = place_blocks(tl.program_id(0), tl.arange(0, BLOCKS), coded_blocks, BLOCKS)
    values = _load(x, row, block, batch_stride, row_stride, rows, columns)
    exponent = ruled_exponent(tl.max(tl.abs(values), 1))
    _store(codes, values, exponent, row, block, coded_rows, coded_blocks, HARDWARE)
    store_scales(block_scales, position, exponent, scale_rows, coded_blocks)


@triton.jit
def search_kernel(
    x,
    codes,
    block_scales,
    coherence,
    batch_stride,
    row_stride,
    rows,
    columns,
    coded_rows,
    coded_blocks,
    scale_rows,
    BLOCKS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """BLOCKS blocks, neighbours among the swizzled scales, each with the better one of two scales."""
    row, block, position = place_blocks(tl.program_id(0), tl.arange(0, BLOCKS), coded_blocks, BLOCKS)
    weights = load_16(x, row, block * 32, batch_stride, row_stride, rows, columns)
    weights += load_16(x, row, block * 32 + 16, batch_stride, row_stride, rows, columns)
    exponent = best_exponents([tl.abs(w) for w in weights], coherence, BLOCKS, HARDWARE)
    # Again, from a cache: codes are stored by threads that are neighbours in a block.
    values = _load(x, row, block, batch_stride, row_stride, rows, columns)
    _store(codes, values, exponent, row, block, coded_rows, coded_blocks, HARDWARE)
    store_scales(block_scales, position, exponent, scale_rows, coded_blocks)


@triton.jit
def expand_kernel(
    codes,
    block_scales,
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
    """Values of BLOCKS blocks; a thread takes WIDTH neighbours."""
    units: tl.constexpr = 32 // WIDTH
    index = tl.arange(0, BLOCKS * units)
    row, block, position = place_blocks(tl.program_id(0), index // units, coded_blocks, BLOCKS)
    column = block * 32 + index % units * WIDTH
    place = codes + (tl.program_id(1).to(tl.int64) * coded_rows + row) * (coded_blocks * 32) + column
    inside = (row < coded_rows) & (block < coded_blocks)
    code = tl.load(place[:, None] + tl.arange(0, WIDTH)[None, :], inside[:, None], 0)
    scale = decode_e8m0(load_scales(block_scales, position, scale_rows, coded_blocks))
    store_values(out, decode_signed_e4m3(code, HARDWARE) * scale[:, None], row, column, rows, columns)


def _config(coherence: float | None) -> dict[str, int]:
    # The interpreter takes as long for many blocks as for few.
    return {"BLOCKS": 512} if INTERPRETED else _RULE if coherence is None else _SEARCH


def _quantize_programs(x: Tensor, coherence: float | None) -> int:
    return programs(*x.shape[-2:], 32, _config(coherence)["BLOCKS"])


_fits = accepts(_quantize_programs)


def _quantize_refusal(x: Tensor, coherence: float | None) -> str | None:
    if coherence is not None and x.shape[-1] == 1 and not INTERPRETED:
        return "a search over a single column comes out wrong from Triton 3.6 (seen on an H100)"
    return _fits(x, coherence)


@kernel("quantize_mxfp8", backend="triton", accepts=_quantize_refusal)
def quantize_mxfp8(x: Tensor, coherence: float | None, codes: Tensor, block_scales: Tensor) -> None:
    matrices = matrices_of(x)
    batch, rows, columns = matrices.shape
    tensors = matrices, codes.view(torch.uint8), block_scales
    strides = matrices.stride()[:2]
    sizes = rows, columns, codes.shape[-2], codes.shape[-1] // 32, block_scales.shape[-2]
    grid = _quantize_programs(x, coherence), batch
    fixed = dict(_config(coherence), HARDWARE=has_e4m3(x), enable_fp_fusion=False)
    with current(x):
        if coherence is None:
            rule_kernel[grid](*tensors, *strides, *sizes, **fixed)
        else:
            search_kernel[grid](*tensors, float(coherence), *strides, *sizes, **fixed)


def _expand_programs(codes: Tensor, block_scales: Tensor, rows: int, columns: int, dtype: torch.dtype) -> int:
    return programs(rows, columns, 32, _EXPAND["BLOCKS"])


@kernel("dequantize_mxfp8", backend="triton", accepts=accepts(_expand_programs))
def dequantize_mxfp8(
    codes: Tensor, block_scales: Tensor, rows: int, columns: int, dtype: torch.dtype, out: Tensor
) -> None:
    grid = programs(rows, columns, 32, _EXPAND["BLOCKS"]), out.shape[:-2].numel()
    with current(codes):
        expand_kernel[grid](
            codes.contiguous().view(torch.uint8),
            block_scales.contiguous(),
            out,
            rows,
            columns,
            codes.shape[-2],
            codes.shape[-1] // 32,
            block_scales.shape[-2],
            # 16 bytes a store.
            WIDTH=16 // dtype.itemsize,
            HARDWARE=has_e4m3(codes),
            enable_fp_fusion=False,
            **_EXPAND,
        )
