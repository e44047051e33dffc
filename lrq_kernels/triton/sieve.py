"""The best scales of most bfloat16 blocks by integers (``csrc/cuda/sieve.h``, which says why), from a table in memory.

A row of the table has the E2M1 codes of one magnitude under 24 neighbouring scales, eight codes to a word. Kernels
find it in the L1 cache: there is no shared memory that they could address. The window is of 24 scales from lower on:
what lies beside it is rare enough that nobody has to wait for it.
"""

import triton
import triton.language as tl

from lrq_kernels.triton.arithmetic import tree_sum
from lrq_kernels.triton.minifloat import biased_e2m1, encode_e4m3
from lrq_kernels.triton.nvfp4_rule import outer_of_amax
from lrq_kernels.triton.quotient import quotient, reciprocal, times, two_part_reciprocal
from lrq_kernels.triton.search import LAST_SCALE, lowest_bit, may_fuse
from lrq_kernels.triton.words import dot_bytes, dot_high, dot_low, load_four, permute, select, slope

FIRST_OCTAVE = tl.constexpr(-2)
ROWS = tl.constexpr(10 * 128 + 2)
"""The bfloat16 magnitudes from a quarter of the least scale on; row 0 is all that are smaller, and the last row has the
tensor scale, whether reciprocals serve, and whether the table does."""
WIDTH = tl.constexpr(36)
"""Words of a row: three for each of eight first scales, and twice the least values of E2M1."""
COUNT = tl.constexpr(24)
BELOW = tl.constexpr(3)
"""Bits of what may win: bit i is code ``first - BELOW + i``."""
_INSIDE = tl.constexpr((1 << 27) - (1 << 3))
FACTOR = tl.constexpr(0.7)
_SIXTH = tl.constexpr(0.16666667163372040)
_DOUBLED = tl.constexpr(0x03020100)
_DOUBLED_HIGH = tl.constexpr(0x0C080604)
"""Twice the values of E2M1, by code."""
_LOW_NIBBLES = tl.constexpr(0x0F0F0F0F)
_INTEGER = tl.constexpr(0x4B000000)
"""An integer below 2^23 or'ed to it is a float32 as it stands."""


@triton.jit
def _codes_from(weight, mantissa, phase, FIRST: tl.constexpr):
    """Codes of a weight under eight neighbouring scales, which are FIRST and ``phase`` above the least of an octave."""
    codes = phase * 0
    for i in tl.static_range(8):
        code = phase + (FIRST + 7 - i)
        # Where reciprocals don't serve the table does not either.
        high, low = two_part_reciprocal(mantissa * decode_normal(code + 56))
        codes = codes * 16 + biased_e2m1(times(weight, high, low), True).to(tl.int32, bitcast=True) - _INTEGER
    return codes


@triton.jit
def table_kernel(outer_source, table, coherence, GIVEN: tl.constexpr, PART: tl.constexpr):
    """The table int32 [ROWS,WIDTH] of every matrix, which are the second dimension of the grid."""
    outer = tl.load(outer_source + tl.program_id(1))
    if not GIVEN:
        outer = outer_of_amax(outer)
    bits = outer.to(tl.int32, bitcast=True)
    mantissa = (bits & 0x7FFFFF | 127 << 23).to(tl.float32, bitcast=True)
    index = tl.program_id(0) * PART + tl.arange(0, PART)
    row, phase = index >> 3, index & 7
    weight = (row + ((127 + FIRST_OCTAVE) * 128 - 1) << 16).to(tl.float32, bitcast=True)
    weight = tl.where(row > 0, weight, 0.0)
    fused = may_fuse(outer)
    sieved = fused & (coherence >= 0) & (coherence <= 64)
    there, last = row < ROWS, row == ROWS - 1
    place = table + (tl.program_id(1) * ROWS + row).to(tl.int64) * WIDTH + phase * 4
    tl.store(place, tl.where(last, bits, _codes_from(weight, mantissa, phase, 0)), there)
    tl.store(place + 1, tl.where(last, fused.to(tl.int32), _codes_from(weight, mantissa, phase, 8)), there)
    tl.store(place + 2, tl.where(last, sieved.to(tl.int32), _codes_from(weight, mantissa, phase, 16)), there)
    tl.store(place + 3, row * 0 + _DOUBLED, there)


@triton.jit
def load_facts(table):
    """The table of this program's matrix, and of its last row the tensor scale and what serves, scalars."""
    table += tl.program_id(1).to(tl.int64) * (ROWS * WIDTH)
    last = table + (ROWS - 1) * WIDTH
    return table, tl.load(last).to(tl.float32, bitcast=True), tl.load(last + 1) != 0, tl.load(last + 2) != 0


@triton.jit
def _row(table, bits, before, place):
    """Codes of a weight, by the bits of its magnitude, under 24 scales."""
    row = tl.maximum((bits >> 16) - before, 0)
    a, b, c, _ = load_four(table, row, place)
    return a, b, c


@triton.jit
def _transpose(a, b, c, d):
    """Four codes of eight scales each, of words for each of four weights with codes of eight scales.

    Words have scales 0, 1, 4, 5 in their low halves and those two above in their high ones, in the order in which
    codes are stored.
    """
    even, more_even = select(_LOW_NIBBLES, b, a << 4), select(_LOW_NIBBLES, d, c << 4)
    odd, more_odd = select(_LOW_NIBBLES, b >> 4, a), select(_LOW_NIBBLES, d >> 4, c)
    return (
        permute(even, more_even, 0x5140),
        permute(odd, more_odd, 0x5140),
        permute(even, more_even, 0x7362),
        permute(odd, more_odd, 0x7362),
    )


@triton.jit
def _objective(codes, doubles, scale, total, gain, low):
    """Value and plain error of the scale under which the weights have these codes, four words of four."""
    none = codes[0] * 0
    squares, products = none + _INTEGER, none + _INTEGER
    for part in tl.static_range(4):
        values = permute(low, none + _DOUBLED_HIGH, codes[part])
        squares = dot_bytes(values, values, squares)
        products = dot_low(doubles[2 * part], values, products)
        products = dot_high(doubles[2 * part + 1], values, products)
    q = squares.to(tl.float32, bitcast=True) - 8388608.0
    r = products.to(tl.float32, bitcast=True) - 8388608.0
    plain = tl.fma(scale, tl.fma(scale, q, r * -1.0), total)
    along = tl.fma(scale, r, total * -2.0)
    return tl.fma(along * gain, along, plain), plain


@triton.jit
def _two(words, doubles, half, base, code: tl.constexpr, total, gain, low, kept, best):
    """Values of the scales of ``code`` and of two codes above, and the words of the better pair with its first code.

    ``base`` has the bits of the scale of code 0.
    """
    near = half * (base + (code << 20)).to(tl.float32, bitcast=True)
    far = half * (base + (code + 2 << 20)).to(tl.float32, bitcast=True)
    value, plain = _objective(words, doubles, near, total, gain, low)
    later = (words[0] >> 16, words[1] >> 16, words[2] >> 16, words[3] >> 16)
    other, other_plain = _objective(later, doubles, far, total, gain, low)
    least = tl.minimum(value, other)
    wins = least < best
    kept = (
        tl.where(wins, words[0], kept[0]),
        tl.where(wins, words[1], kept[1]),
        tl.where(wins, words[2], kept[2]),
        tl.where(wins, words[3], kept[3]),
        tl.where(wins, code, kept[4]),
    )
    return value, other, plain, other_plain, kept, tl.minimum(least, best)


@triton.jit
def decode_normal(code):
    """Value of an E4M3 code from 8 on."""
    return ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _eight(w, doubles, half, base, code: tl.constexpr, total, gain, low, kept, best):
    """Values and plain errors of eight scales from ``code`` on, which counts from the first; the best two so far."""
    a, b = _transpose(w[0], w[1], w[2], w[3]), _transpose(w[4], w[5], w[6], w[7])
    c, d = _transpose(w[8], w[9], w[10], w[11]), _transpose(w[12], w[13], w[14], w[15])
    first = (a[0], b[0], c[0], d[0])
    v0, v2, p0, p2, kept, best = _two(first, doubles, half, base, code, total, gain, low, kept, best)
    second = (a[1], b[1], c[1], d[1])
    v1, v3, p1, p3, kept, best = _two(second, doubles, half, base, code + 1, total, gain, low, kept, best)
    third = (a[2], b[2], c[2], d[2])
    v4, v6, p4, p6, kept, best = _two(third, doubles, half, base, code + 4, total, gain, low, kept, best)
    fourth = (a[3], b[3], c[3], d[3])
    v5, v7, p5, p7, kept, best = _two(fourth, doubles, half, base, code + 5, total, gain, low, kept, best)
    return (v0, v1, v2, v3, v4, v5, v6, v7), (p0, p1, p2, p3, p4, p5, p6, p7), kept, best


@triton.jit
def _below(values, limit):
    """Bit i says whether value i of eight is below the limit."""
    # Products and sums: comparisons and bits would crowd the units of integers, for which all else waits.
    steep = limit * 2.0**40
    bits = slope(values[7], -(2.0**40), steep)
    for i in tl.static_range(7):
        bits = tl.fma(bits, 2.0, slope(values[6 - i], -(2.0**40), steep))
    return (bits + 8388608.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _clips(most, half, code, limit):
    """Whether a code can win though the largest weight is clipped: that alone costs (amax - 6 scale)^2."""
    open = tl.maximum(most - 12.0 * (half * decode_normal(code)), 0.0)
    return open * open * 0.999 <= limit


@triton.jit
def sieve(magnitudes, amax, outer, coherence, table):
    """The best scale codes, the E2M1 codes under them, two words without signs, and which blocks are served; and what
    `best_of` takes of blocks with more than one candidate: these, ``first``, from BELOW codes under which they count,
    and the unit.
    """
    bits = [m.to(tl.int32, bitcast=True) for m in magnitudes]
    most = amax.to(tl.int32, bitcast=True)
    ratio = quotient(amax * _SIXTH, outer, reciprocal(outer))
    fits = (amax > 2.0**-60) & (amax < 2.0**60) & (ratio >= 2.0**-5) & (ratio <= 504.0)
    ratio = tl.where(fits, ratio, 1.0)
    first = tl.minimum(encode_e4m3(ratio * FACTOR), LAST_SCALE + 1 - COUNT)
    # In units in which twice the largest weight is an integer of 15 bits. Where a smaller one is none, its codes are 0.
    unit = tl.where(fits, (134 << 23) - (most & 0x7F800000) + (134 << 23), 0).to(tl.float32, bitcast=True)
    whole = [(m * unit + 8388608.0).to(tl.int32, bitcast=True) for m in magnitudes]
    doubles = (
        permute(whole[1], whole[0], 0x5410),
        permute(whole[3], whole[2], 0x5410),
        permute(whole[5], whole[4], 0x5410),
        permute(whole[7], whole[6], 0x5410),
        permute(whole[9], whole[8], 0x5410),
        permute(whole[11], whole[10], 0x5410),
        permute(whole[13], whole[12], 0x5410),
        permute(whole[15], whole[14], 0x5410),
    )
    unit *= 0.5
    half = outer * unit * 0.5
    total = tree_sum([m * m for m in magnitudes]) * unit * unit
    gain = coherence * 0.25 * reciprocal(tl.where(fits, total, 1.0))
    exponent = (outer.to(tl.int32, bitcast=True) >> 23) + (first >> 3) - 7
    before = tl.where(fits, (exponent + FIRST_OCTAVE << 7) - 1, 1 << 20)
    place = (first & 7) * 4
    rows = [_row(table, b, before, place) for b in bits]
    base = (first << 20) + (120 << 23)
    # A constant would be copied for every use.
    low_values = most * 0 + tl.load(table + 3)
    best = tl.full(amax.shape, float("inf"), tl.float32)
    kept = (most * 0, most * 0, most * 0, most * 0, most * 0)
    low, _, kept, best = _eight([r[0] for r in rows], doubles, half, base, 0, total, gain, low_values, kept, best)
    middle, _, kept, best = _eight([r[1] for r in rows], doubles, half, base, 8, total, gain, low_values, kept, best)
    high, plain, kept, best = _eight([r[2] for r in rows], doubles, half, base, 16, total, gain, low_values, kept, best)
    # What is above it is above the best for the reference, too.
    limit = best + (0.75 * 2.0**-20 * total + 2.0**-16 * (coherence * best))
    doubtful = (_below(low, limit) | _below(middle, limit) << 8 | _below(high, limit) << 16) << BELOW
    most = amax * unit
    for i in tl.static_range(1, BELOW + 1):
        doubtful |= _clips(most, half, first - i, limit).to(tl.int32) << BELOW - i
    # Doubling a scale that saturates nothing can't lower |E|^2; above the last window there is none.
    a, b = tl.minimum(plain[0], plain[1]), tl.minimum(plain[2], plain[3])
    beyond = tl.minimum(tl.minimum(a, b), tl.minimum(tl.minimum(plain[4], plain[5]), tl.minimum(plain[6], plain[7])))
    served = fits & (best > total * 2.0**-12) & ((beyond > limit) | (first == LAST_SCALE + 1 - COUNT))
    served &= _clips(most, half, first - BELOW - 1, limit) == 0
    inside = doubtful & _INSIDE
    code = first - BELOW + lowest_bit(inside)
    later = ((code - first) & 2) != 0
    selectors = tl.where(later, 0x7632, 0x5410)
    packed = permute(kept[0], kept[1], selectors), permute(kept[2], kept[3], selectors)
    # The double of a scale under which all values are even, and none beyond 7 half steps, has the same values: of such
    # a tie, which is one for the reference as well, the smaller scale wins.
    odd = (packed[0] & (packed[0] >> 2 ^ -1) | packed[1] & (packed[1] >> 2 ^ -1)) & 0x11111111
    twice = (inside & -inside) * ((1 << 8) + 1)
    ties = (doubtful == twice) & (odd == 0) & (most < 13.9 * half * decode_normal(code))
    ties &= (code - first == kept[4]) | (code - first == kept[4] + 2)
    return code, packed, tl.where(ties, 0, doubtful), first, unit, served
