"""``reference/search.py`` for NVFP4: the same candidates of a block in the same order, every block at its own pace."""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import tree_sum
from lrq_kernels.triton.minifloat import MAX_E2M1, decode_e4m3, encode_e4m3, nearest_e2m1, reciprocal_e8m0
from lrq_kernels.triton.quotient import serves, times, two_part_reciprocal

SLACK = tl.constexpr(0.999)
LAST_SCALE = tl.constexpr(126)
OCTAVE = tl.constexpr(8)
DOUBLES_FROM = tl.constexpr(16)
ZERO_BELOW = tl.constexpr(0.25)
# So far above the last scale that is the best one.
FAR = tl.constexpr(2.0**20)
# With these no scale leaves the normal numbers.
LEAST_FUSED, MOST_FUSED = tl.constexpr(2.0**-40), tl.constexpr(2.0**40)


@triton.jit
def _visit(magnitudes, scale, gain, FUSED: tl.constexpr):
    """Value and plain error of a candidate."""
    if FUSED:
        inverse, rest = two_part_reciprocal(scale)
        errors = [nearest_e2m1(times(m, inverse, rest)) - m * inverse for m in magnitudes]
        along = tree_sum([(nearest_e2m1(times(m, inverse, rest)) - m * inverse) * (m * inverse) for m in magnitudes])
    else:
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        errors = [nearest_e2m1(tl.div_rn(m, scale)) - m * inverse for m in magnitudes]
        along = tree_sum([(nearest_e2m1(tl.div_rn(m, scale)) - m * inverse) * (m * inverse) for m in magnitudes])
    square = scale * scale
    plain = square * tree_sum([e * e for e in errors])
    along = square * along
    return plain + gain * (along * along), plain


@triton.jit
def may_fuse(outer):
    """Whether reciprocals serve every candidate, a scalar."""
    fits = (outer >= LEAST_FUSED) & (outer <= MOST_FUSED)
    # The scales have the eight mantissas of these products.
    for eighths in tl.static_range(8, 16):
        fits = fits & serves(outer * eighths)
    return fits


@triton.jit
def best_of(magnitudes, candidates, least, unit, outer, coherence):
    """The best code of each block's candidates, of which bit i is code ``least + i``, by reciprocals.

    ``unit`` takes weights to where nothing over- or underflows; the scales are normal numbers of E4M3.
    """
    magnitudes = [m * unit for m in magnitudes]
    gain = tl.div_rn(unit * 0 + coherence, tree_sum([m * m for m in magnitudes]))
    best = tl.full(unit.shape, float("inf"), tl.float32)
    best_code = candidates * 0
    while tl.max(candidates, axis=0) > 0:
        code = tl.maximum(least + lowest_bit(candidates), 8)
        value, _ = _visit(magnitudes, outer * decode_e4m3(code) * unit, gain, True)
        wins = (candidates != 0) & (value < best)
        best = tl.where(wins, value, best)
        best_code = tl.where(wins, code, best_code)
        candidates &= candidates - 1
    return best_code


@triton.jit
def lowest_bit(bits):
    """Index of the lowest one."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _open_phases(bounds, best):
    """Bit j says whether a candidate of phase j can still win."""
    low = (bounds[0] <= best).to(tl.int32) | (bounds[1] <= best).to(tl.int32) << 1
    low |= (bounds[2] <= best).to(tl.int32) << 2 | (bounds[3] <= best).to(tl.int32) << 3
    high = (bounds[4] <= best).to(tl.int32) | (bounds[5] <= best).to(tl.int32) << 1
    high |= (bounds[6] <= best).to(tl.int32) << 2 | (bounds[7] <= best).to(tl.int32) << 3
    return low | high << 4


@triton.jit
def _with_bound(bounds, phase, bound):
    return (
        tl.where(phase == 0, bound, bounds[0]),
        tl.where(phase == 1, bound, bounds[1]),
        tl.where(phase == 2, bound, bounds[2]),
        tl.where(phase == 3, bound, bounds[3]),
        tl.where(phase == 4, bound, bounds[4]),
        tl.where(phase == 5, bound, bounds[5]),
        tl.where(phase == 6, bound, bounds[6]),
        tl.where(phase == 7, bound, bounds[7]),
    )


@triton.jit
def _next_upwards(code, phase, phases):
    """The next code upwards whose phase is open; past the last code if there is none."""
    # Bit j of `turned` is the phase of code + 1 + j.
    turned = ((phases | phases << 8) >> (phase + 1)) & 255
    lowest = (turned & -turned).to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(turned == 0, LAST_SCALE + 1, code + ((lowest >> 23) - 126))


@triton.jit
def best_scales(magnitudes, amax, ratio, outer, coherence, wanted, BLOCKS: tl.constexpr, FUSED: tl.constexpr):
    """Code of the best scale of every block that is ``wanted``, int32; 0 where every weight would round to zero.

    ``magnitudes`` are the 16 weights of the blocks without their signs: no term of the objective depends on them.
    FUSED by reciprocals, where `may_fuse`.
    """
    start = tl.maximum(encode_e4m3(ratio), 1)
    total = outer * decode_e4m3(start)
    live = wanted & (amax > 0) & (total > 0)
    saturates = tl.div_rn(amax, tl.where(live, total, 1.0)) > MAX_E2M1
    start = tl.minimum(start + saturates.to(tl.int32), LAST_SCALE)
    total = tl.where(live, outer * decode_e4m3(start), 1.0)
    far = live & (amax > total * FAR)
    live = live & (far == 0)
    # In units in which the scale of the start is near 1: nothing overflows.
    unit = reciprocal_e8m0(total.to(tl.int32, bitcast=True) >> 23)
    magnitudes = [m * unit for m in magnitudes]
    amax *= unit
    gain = tl.div_rn(tl.full((BLOCKS,), coherence, tl.float32), tree_sum([m * m for m in magnitudes]))

    code = start
    upwards = live
    best = tl.full((BLOCKS,), float("inf"), tl.float32)
    best_code = tl.zeros((BLOCKS,), tl.int32)
    unseen = tl.full((BLOCKS,), float("-inf"), tl.float32)
    bounds = (unseen, unseen, unseen, unseen, unseen, unseen, unseen, unseen)
    while tl.max(live.to(tl.int32), axis=0) > 0:
        scale = outer * decode_e4m3(code) * unit
        value, plain = _visit(magnitudes, scale, gain, FUSED)
        nonzero = scale * ZERO_BELOW < amax
        wins = live & nonzero & ((value < best) | ((value == best) & (code < best_code)))
        best = tl.where(wins, value, best)
        best_code = tl.where(wins, code, best_code)

        phase = (code - start) & (OCTAVE - 1)
        bound = tl.where(code + OCTAVE >= DOUBLES_FROM, plain * SLACK, float("-inf"))
        bounds = _with_bound(bounds, tl.where(upwards, phase, OCTAVE), bound)
        higher = _next_upwards(code, phase, _open_phases(bounds, best))
        lower = tl.where(upwards, start, code) - 1
        # No larger scale can win over an error of zero, or after one that rounds every weight to zero: the reference
        # visits them all the same, but here a block would keep its program waiting.
        upwards = upwards & (higher <= LAST_SCALE) & (best > 0) & nonzero
        clipped = tl.maximum(amax - outer * decode_e4m3(tl.maximum(lower, 1)) * unit * MAX_E2M1, 0.0)
        code = tl.where(upwards, higher, tl.maximum(lower, 1))
        live = live & (upwards | ((clipped * clipped * SLACK <= best) & (lower >= 1)))
    return tl.where(far, start, best_code)
