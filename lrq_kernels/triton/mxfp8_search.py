"""``reference/search.py`` for MXFP8, in the order of ``csrc/mxfp8.h``, every block at its own pace.

Doubling a scale moves no weight until one becomes subnormal: the candidates before that tie with the start, and the
smaller wins a tie. Every error is exact, so ``|E|^2`` never falls as the scale doubles, rounding included.
"""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import largest, tree_sum
from lrq_kernels.triton.minifloat import MAX_E4M3, decode_e8m0, nearest_e4m3, reciprocal_e8m0
from lrq_kernels.triton.quotient import exact_quotient, reciprocal

LAST_EXPONENT = tl.constexpr(254)
SLACK = tl.constexpr(0.999)
ZERO_BELOW = tl.constexpr(2.0**-10)
# Below it, squares may be subnormal and errors no longer exact.
INEXACT = tl.constexpr(1e-20)
LEAST_SHIFT = tl.constexpr(-100)


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
def _gain(magnitudes, amax, unit, coherence, FUSED: tl.constexpr):
    if FUSED:
        # The bits of the division wherever the square does not vanish: the divisor lies in [224, 448].
        divisor = amax * unit
        inverse = reciprocal(divisor)
        relative = [exact_quotient(m * unit, divisor, inverse) for m in magnitudes]
    else:
        relative = [tl.div_rn(m, amax) for m in magnitudes]
    return tl.div_rn(coherence, _tree_sum_32([r * r for r in relative]))


@triton.jit
def _first_coarser(magnitudes):
    """The first code whose grid is coarser than that of the code before at the smallest weight but 0; 0: unknown."""
    # Zero becomes the largest.
    least = magnitudes[0].to(tl.uint32, bitcast=True) - 1
    for i in tl.static_range(1, 32):
        least = tl.minimum(least, magnitudes[i].to(tl.uint32, bitcast=True) - 1)
    exponent = ((least + 1) >> 23).to(tl.int32)
    return tl.where(exponent == 0, 0, exponent + 7)


@triton.jit
def _error(y):
    return nearest_e4m3(y) - y


@triton.jit
def _visit(magnitudes, code, square, gain):
    """Value and plain error of a candidate."""
    inverse = reciprocal_e8m0(code)
    y = [m * inverse for m in magnitudes]
    plain = square * _tree_sum_32([_error(v) * _error(v) for v in y])
    along = _tree_sum_32([_error(v) * v for v in y])
    return plain + square * (gain * (square * (along * along))), plain


@triton.jit
def _ratio(code, start, over_amax):
    """Scale over amax; far below the start it is too large, where neither its square nor 1 less it depends on it."""
    return over_amax * decode_e8m0(tl.maximum(code - start, LEAST_SHIFT) + 127)


@triton.jit
def _rounds_to_zero(code, amax):
    return decode_e8m0(code) * ZERO_BELOW >= amax


@triton.jit
def _can_win_up(bound, best):
    return (bound < best) | ((bound < INEXACT) & (bound * SLACK <= best))


@triton.jit
def best_exponents(magnitudes, coherence, BLOCKS: tl.constexpr, FUSED: tl.constexpr):
    """Exponent of the best scale of every block, int32; 0 for a block that counts as zero."""
    amax = tl.maximum(largest(magnitudes[:16]), largest(magnitudes[16:]))
    start = ruled_exponent(amax)
    live = start > 0
    amax = tl.where(live, amax, 1.0)
    start = tl.where(live, start, ruled_exponent(amax))
    unit = reciprocal_e8m0(start)
    over_amax = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), amax * unit)
    gain = tl.zeros((BLOCKS,), tl.float32)
    if coherence != 0:
        gain = _gain(magnitudes, amax, unit, tl.full((BLOCKS,), coherence, tl.float32), FUSED)

    code = start
    down = live
    best = tl.full((BLOCKS,), float("inf"), tl.float32)
    best_code = tl.zeros((BLOCKS,), tl.int32)
    bound = tl.full((BLOCKS,), float("-inf"), tl.float32)
    coarser = _first_coarser(magnitudes)
    while tl.max(live.to(tl.int32), axis=0) > 0:
        ratio = _ratio(code, start, over_amax)
        value, plain = _visit(magnitudes, code, ratio * ratio, gain)
        wins = live & (_rounds_to_zero(code, amax) == 0)
        wins = wins & ((value < best) | ((value == best) & (code < best_code)))
        best = tl.where(wins, value, best)
        best_code = tl.where(wins, code, best_code)
        coarser = tl.where((code == start) & (best == float("inf")), 0, coarser)
        bound = tl.where(code >= start, plain, bound)

        # Below amax the largest weight alone costs (1 - 448 * scale/amax)^2, which grows as the scale falls.
        lower = tl.maximum(code - 1, 1)
        clipped = tl.maximum(1.0 - _ratio(lower, start, over_amax) * MAX_E4M3, 0.0)
        stays_down = down & (code > 1) & (clipped * clipped * SLACK <= best)
        higher = tl.where(down, tl.maximum(coarser, start + 1), code + 1)
        down = stays_down
        goes_up = (higher <= LAST_EXPONENT) & _can_win_up(bound, best)
        code = tl.where(down, lower, tl.minimum(higher, LAST_EXPONENT))
        live = live & (down | (goes_up & (_rounds_to_zero(code, amax) == 0)))
    return best_code
