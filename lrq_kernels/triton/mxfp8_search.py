"""The better one of two scales of a block of MXFP8, in the order of additions of ``csrc/mxfp8.h``."""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import largest, tree_sum
from lrq_kernels.triton.minifloat import nearest_e4m3, reciprocal_e8m0


@triton.jit
def ruled_exponent(amax):
    """The smallest e with ``amax <= 448 * 2^(e-127)``, int32; 0 for a block that counts as zero."""
    # 448 is 1.75 * 2^8. The rounded quotient amax/448 has the same exponent.
    return tl.maximum(((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 0)


@triton.jit
def _tree_sum_32(t):
    halves = (t[0] + t[16],)
    for i in tl.static_range(1, 16):
        halves += (t[i] + t[i + 16],)
    return tree_sum(halves)


@triton.jit
def _nearest(y, HARDWARE: tl.constexpr):
    return y.to(tl.float8e4nv).to(tl.float32) if HARDWARE else nearest_e4m3(y)


@triton.jit
def _objective(magnitudes, scale: tl.constexpr, gain, HARDWARE: tl.constexpr):
    """``|E|^2 + gain <E,W>^2`` under a scale, a power of two."""
    y = [m * (1.0 / scale) for m in magnitudes]
    errors = [_nearest(v, HARDWARE) - v for v in y]
    plain = tl.full(gain.shape, scale * scale, tl.float32) * _tree_sum_32([e * e for e in errors])
    products = (errors[0] * y[0],)
    for i in tl.static_range(1, 32):
        products += (errors[i] * y[i],)
    along = tl.full(gain.shape, scale * scale, tl.float32) * _tree_sum_32(products)
    return plain + gain * (along * along)


@triton.jit
def best_exponents(magnitudes, coherence, BLOCKS: tl.constexpr, HARDWARE: tl.constexpr):
    """Exponent of the best scale of every block, int32; 0 for a block that counts as zero.

    HARDWARE: the GPU converts to E4M3 and back.
    """
    start = ruled_exponent(tl.maximum(largest(magnitudes[:16]), largest(magnitudes[16:])))
    # In units in which the scale of the start is 1.
    unit = reciprocal_e8m0(start)
    magnitudes = [m * unit for m in magnitudes]
    gain = tl.div_rn(tl.full((BLOCKS,), coherence, tl.float32), _tree_sum_32([m * m for m in magnitudes]))
    lower = _objective(magnitudes, 0.5, gain, HARDWARE) <= _objective(magnitudes, 1.0, gain, HARDWARE)
    return start - (lower & (start > 1)).to(tl.int32)
