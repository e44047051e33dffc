"""NVFP4 with the best scales: by the sieve where it serves, else block by block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_kernels.triton.arithmetic import largest
from lrq_kernels.triton.blocks import load_16, place_blocks
from lrq_kernels.triton.minifloat import pack_signs
from lrq_kernels.triton.nvfp4_rule import encode_blocks, encode_blocks_quickly, load_outer, ratio_of, store_blocks
from lrq_kernels.triton.search import best_of, best_scales, may_fuse
from lrq_kernels.triton.sieve import BELOW, ROWS, WIDTH, load_facts, sieve, table_kernel

_TABLE = {"PART": 128, "num_warps": 4}


@triton.jit
def search_kernel(
    x,
    outer_source,
    codes,
    block_scales,
    tensor_scale,
    table,
    coherence,
    batch_stride,
    row_stride,
    rows,
    columns,
    coded_rows,
    coded_blocks,
    scale_rows,
    BLOCKS: tl.constexpr,
    GIVEN: tl.constexpr,
    FUSED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """BLOCKS blocks, neighbours among the swizzled scales, each with the scale that serves it best."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    fused, sieved = False, False
    if table is not None:
        table, outer, fused, sieved = load_facts(table)
        if tile == 0:
            tl.store(tensor_scale + tl.program_id(1), outer)
    else:
        outer = load_outer(outer_source, tensor_scale, tile == 0, GIVEN)
        if FUSED:
            fused = may_fuse(outer)
    row, block, position = place_blocks(tile, tl.arange(0, BLOCKS), coded_blocks, BLOCKS)
    weights = load_16(x, row, block * 16, batch_stride, row_stride, rows, columns)
    magnitudes = [tl.abs(w) for w in weights]
    amax = largest(magnitudes)
    wanted = (amax == 0) == 0
    scale, packed = tl.zeros(row.shape, tl.int32), tl.zeros(row.shape, tl.int64)
    if table is not None:  # noqa: SIM102
        if sieved:
            signs = pack_signs(weights[:8]), pack_signs(weights[8:])
            code, words, candidates, least, unit, served = sieve(magnitudes, amax, outer, coherence, table)
            served &= wanted
            wanted &= served == 0
            scale = tl.where(served, code, 0)
            low = words[0].to(tl.uint32, bitcast=True) | signs[0]
            high = words[1].to(tl.uint32, bitcast=True) | signs[1]
            packed = tl.where(served, low.to(tl.int64) | high.to(tl.int64) << 32, 0)
            candidates = tl.where(served & ((candidates & candidates - 1) != 0), candidates, 0)
            if tl.max(candidates, axis=0) > 0:
                # Loaded anew, here and below: registers that hold them all the while would keep warps away.
                few = load_16(x, row, block * 16, batch_stride, row_stride, rows, columns)
                code = best_of([tl.abs(w) for w in few], candidates, least - BELOW, unit, outer, coherence)
                scale = tl.where(candidates != 0, code, scale)
                packed = tl.where(candidates != 0, encode_blocks_quickly(few, code, outer, HARDWARE), packed)
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        if table is not None:
            weights = load_16(x, row, block * 16, batch_stride, row_stride, rows, columns)
            magnitudes = [tl.abs(w) for w in weights]
        ratio = ratio_of(amax, outer)
        if fused:
            code = best_scales(magnitudes, amax, ratio, outer, coherence, wanted, BLOCKS, FUSED)
            words = encode_blocks_quickly(weights, code, outer, HARDWARE)
        else:
            code = best_scales(magnitudes, amax, ratio, outer, coherence, wanted, BLOCKS, False)
            words = encode_blocks(weights, code, outer, HARDWARE)
        scale = tl.where(wanted, code, scale)
        packed = tl.where(wanted, words, packed)
    store_blocks(codes, block_scales, packed, scale, row, block, position, coded_rows, coded_blocks, scale_rows)


def table_of(outer_source: Tensor, given: bool, batch: int, coherence: float) -> Tensor:
    """The table of the sieve for every matrix."""
    table = outer_source.new_empty((batch, ROWS.value, WIDTH.value), dtype=torch.int32)
    grid = triton.cdiv(8 * ROWS.value, _TABLE["PART"]), batch
    table_kernel[grid](outer_source, table, coherence, GIVEN=given, enable_fp_fusion=False, **_TABLE)
    return table
