"""Quotients by one divisor without a division each (``csrc/quotient.h``), on a GPU: the interpreter fuses nothing.

They lie on the same side of every tie of E2M1 and E4M3 as the correctly rounded quotient, or on it.
"""

import triton
import triton.language as tl


@triton.jit
def negative(x):
    """-x; Triton's own minus is 0 - x, which loses the sign of zero."""
    return x * -1.0


@triton.jit
def reciprocal(divisor):
    """1/divisor, correctly rounded for normal divisors up to 2^100: what division itself starts from."""
    near = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.fma(near, tl.fma(negative(divisor), near, 1.0), near)


@triton.jit
def quotient(dividend, divisor, inverse):
    """dividend/divisor with ``inverse`` the rounded 1/divisor, where no remainder underflows."""
    near = dividend * inverse
    return tl.fma(negative(tl.fma(near, divisor, negative(dividend))), inverse, near)


@triton.jit
def serves(divisor):
    """Whether a reciprocal in two parts may be used, of a divisor between 2^-80 and 2^80: only one mantissa fails."""
    return (divisor.to(tl.int32, bitcast=True) & 0x7FFFFF) != 0x7FFFFF


@triton.jit
def two_part_reciprocal(divisor):
    """1/divisor, correctly rounded, and what is left of it."""
    high = reciprocal(divisor)
    return high, tl.fma(negative(divisor), high, 1.0) * high


@triton.jit
def times(dividend, high, low):
    """dividend/divisor for E2M1, but for the sign of zero."""
    return tl.fma(dividend, high, dividend * low)
