"""``reference/search.py`` for MXFP8, in the order of ``csrc/mxfp8.h``, every block at its own pace.

In units in which the scale of the start is 1. Doubling a scale moves no weight until one becomes subnormal: the
candidates before that tie with the start, and the smaller wins a tie. Every error is exact, so ``|E|^2`` never falls as
the scale doubles, rounding included.
"""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import largest, tree_sum
from lrq_kernels.triton.minifloat import MAX_E4M3, decode_e8m0, nearest_e4m3, reciprocal_e8m0

SLACK = tl.constexpr(0.999)
ZERO_BELOW = tl.constexpr(2.0**-10)
# Below it, squares may be subnormal and errors no longer exact.
INEXACT = tl.constexpr(1e-10)
# So far below the start the squares overflow, and nothing wins.
LEAST_STEP = tl.constexpr(-100)


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
def _first_coarser(magnitudes):
    """The first step up to a grid that is coarser at the smallest weight but 0 than the one before."""
    # Zero becomes the largest.
    least = magnitudes[0].to(tl.uint32, bitcast=True) - 1
    for i in tl.static_range(1, 32):
        least = tl.minimum(least, magnitudes[i].to(tl.uint32, bitcast=True) - 1)
    return tl.maximum(((least + 1) >> 23).to(tl.int32) - 120, 1)


@triton.jit
def _error(y):
    return nearest_e4m3(y) - y


@triton.jit
def _power(step):
    return decode_e8m0(step + 127)


@triton.jit
def _visit(magnitudes, step, gain):
    """Value and plain error of a candidate."""
    inverse = _power(-step)
    square = _power(step) * _power(step)
    y = [m * inverse for m in magnitudes]
    plain = square * _tree_sum_32([_error(v) * _error(v) for v in y])
    along = square * _tree_sum_32([_error(v) * v for v in y])
    return plain + gain * (along * along), plain


@triton.jit
def _can_win_up(bound, best):
    return (bound < best) | ((bound < INEXACT) & (bound * SLACK <= best))


@triton.jit
def best_exponents(magnitudes, coherence, BLOCKS: tl.constexpr):
    """Exponent of the best scale of every block, int32; 0 for a block that counts as zero."""
    amax = tl.maximum(largest(magnitudes[:16]), largest(magnitudes[16:]))
    start = ruled_exponent(amax)
    live = start > 0
    unit = reciprocal_e8m0(start)
    magnitudes = [m * unit for m in magnitudes]
    amax *= unit
    gain = tl.div_rn(tl.full((BLOCKS,), coherence, tl.float32), _tree_sum_32([m * m for m in magnitudes]))

    least = tl.maximum(1 - start, LEAST_STEP)
    last = 254 - start
    coarser = _first_coarser(magnitudes)
    step = tl.zeros((BLOCKS,), tl.int32)
    down = live
    best = tl.full((BLOCKS,), float("inf"), tl.float32)
    best_step = step
    bound = best
    while tl.max(live.to(tl.int32), axis=0) > 0:
        value, plain = _visit(magnitudes, step, gain)
        # The steps down come before those up: of equal values the smaller scale wins.
        wins = live & ((value < best) | ((value == best) & (step < best_step)))
        best = tl.where(wins, value, best)
        best_step = tl.where(wins, step, best_step)
        bound = tl.where(step >= 0, plain, bound)

        # Below amax the largest weight alone costs (amax - 448 * scale)^2, which grows as the scale falls.
        lower = tl.maximum(step - 1, least)
        clipped = tl.maximum(amax - _power(lower) * MAX_E4M3, 0.0)
        stays_down = down & (step > least) & (clipped * clipped * SLACK <= best)
        higher = tl.where(down, coarser, step + 1)
        down = stays_down
        step = tl.where(down, lower, tl.minimum(higher, last))
        goes_up = (higher <= last) & _can_win_up(bound, best) & (_power(step) * ZERO_BELOW < amax)
        live = live & (down | goes_up)
    return tl.where(start > 0, start + best_step, 0)
