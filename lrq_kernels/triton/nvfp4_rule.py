"""Scales and codes of NVFP4 blocks, their 16 columns a tensor each: by division, or nearly always by reciprocals."""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import largest
from lrq_kernels.triton.blocks import store_scales
from lrq_kernels.triton.minifloat import MAX_E2M1, MAX_E4M3, decode_e4m3, encode_e4m3, pack_e2m1
from lrq_kernels.triton.quotient import quotient, serves, times, two_part_reciprocal

# With these no product of a tensor scale and a block scale leaves 2^-80 to 2^80.
LEAST_OUTER, MOST_OUTER = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
_LEAST_NORMAL = tl.constexpr(0.015625)
_SIXTH = tl.constexpr(0.16666667163372040)


@triton.jit
def pack_blocks(y, w, HARDWARE: tl.constexpr, SATURATE: tl.constexpr):
    """Codes of the 16 columns of blocks, int64."""
    low = pack_e2m1(y[:8], w[:8], HARDWARE, SATURATE)
    high = pack_e2m1(y[8:], w[8:], HARDWARE, SATURATE)
    return low.to(tl.int64) | high.to(tl.int64) << 32


@triton.jit
def encode_blocks(weights, scale, outer, HARDWARE: tl.constexpr):
    """Codes at any scale."""
    total = outer * decode_e4m3(scale)
    divisor = tl.where(total == 0, 1.0, total)
    packed = pack_blocks([tl.div_rn(w, divisor) for w in weights], weights, HARDWARE, True)
    return tl.where(total == 0, 0, packed)


@triton.jit
def encode_blocks_quickly(weights, scale, outer, HARDWARE: tl.constexpr):
    """Codes at scales that reciprocals serve."""
    high, low = two_part_reciprocal(outer * decode_e4m3(scale))
    packed = pack_blocks([times(w, high, low) for w in weights], weights, HARDWARE, True)
    return tl.where(scale == 0, 0, packed)


@triton.jit
def ratio_of(amax, outer):
    """What the rule rounds to a block scale."""
    return tl.minimum(tl.div_rn(tl.div_rn(amax, MAX_E2M1), outer), MAX_E4M3)


@triton.jit
def quick_rule(weights, outer, by_outer, HARDWARE: tl.constexpr):
    """Scales and codes of the rule by reciprocals, and where they are right: nearly everywhere.

    ``outer`` lies between LEAST_OUTER and MOST_OUTER.
    """
    amax = largest([tl.abs(w) for w in weights])
    ratio = quotient(quotient(amax, MAX_E2M1, _SIXTH), outer, by_outer)
    scale = encode_e4m3(ratio)
    total = outer * decode_e4m3(scale)
    high, low = two_part_reciprocal(total)
    # The scale is rounded by at most a sixteenth: no weight reaches 7.
    packed = pack_blocks([times(w, high, low) for w in weights], weights, HARDWARE, False)
    right = (ratio >= _LEAST_NORMAL) & (ratio <= MAX_E4M3 + 0.5) & serves(total)
    return scale, tl.where(amax == 0, 0, packed), right | (amax == 0)


@triton.jit
def outer_of_amax(bits):
    """The tensor scale of a matrix from the bits of its amax."""
    outer = tl.div_rn(bits.to(tl.float32, bitcast=True), MAX_E4M3 * MAX_E2M1)
    return tl.where(outer == 0, 1.0, outer)


@triton.jit
def load_outer(outer_source, tensor_scale, first, GIVEN: tl.constexpr):
    """The tensor scale of this program's matrix; the ``first`` program of the matrix stores it."""
    outer = tl.load(outer_source + tl.program_id(1))
    if not GIVEN:
        outer = outer_of_amax(outer)
    if first:
        tl.store(tensor_scale + tl.program_id(1), outer)
    return outer


@triton.jit
def store_blocks(codes, block_scales, packed, scale, row, block, position, coded_rows, coded_blocks, scale_rows):
    batch = tl.program_id(1).to(tl.int64)
    place = codes + (batch * coded_rows + row) * coded_blocks + block
    tl.store(place, packed, (row < coded_rows) & (block < coded_blocks))
    store_scales(block_scales, position, scale, scale_rows, coded_blocks)
