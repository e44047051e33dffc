"""Codes of one byte, E4M3 or INT8, and what they stand for.

Constants of the kernels: FP8 or else INT8; FUSED, where ``tl.fma`` is one instruction (the interpreter's rounds twice);
HARDWARE, where the GPU converts E4M3.
"""

import triton
import triton.language as tl

from lrq_kernels.triton.minifloat import MAX_E4M3, decode_signed_e4m3, encode_signed_e4m3
from lrq_kernels.triton.quotient import quotient

MAX_INT8 = tl.constexpr(127.0)
_ROUNDS = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def scale_of(amax, TENSOR: tl.constexpr, FP8: tl.constexpr):
    """The scale of weights up to ``amax``."""
    if FP8:
        if TENSOR:
            scale = tl.div_rn(amax, MAX_E4M3)
            return tl.where(scale == 0, 1.0, scale)
        else:
            return tl.div_rn(tl.maximum(amax, 1e-12), MAX_E4M3)
    else:
        return tl.maximum(tl.div_rn(amax, MAX_INT8), 1e-30)


@triton.jit
def _bounded(values, bound):
    return tl.minimum(tl.maximum(values, -bound), bound)


@triton.jit
def _codes(y, FP8: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes of values that round to 127 at most if they are for INT8."""
    if FP8:
        codes = encode_signed_e4m3(y, HARDWARE)
    else:
        # The sum has 1 as its last place: adding rounds, and the low bits are the integer.
        codes = (y + _ROUNDS).to(tl.int32, bitcast=True).to(tl.uint8)
    return codes


@triton.jit
def _exact(values, scale, FP8: tl.constexpr):
    return _bounded(tl.div_rn(values, scale + tl.zeros_like(values)), MAX_E4M3 if FP8 else MAX_INT8)


@triton.jit
def reciprocal_of(scale):
    """A power of two by which remainders of divisions by ``scale`` can't underflow; the scale by it, and 1 by that."""
    unit = tl.where(scale < 2.0**-80, 2.0**100, tl.where(scale > 2.0**80, 2.0**-60, 1.0))
    divisor = scale * unit
    return unit, divisor, tl.div_rn(tl.zeros_like(divisor) + 1.0, divisor)


@triton.jit
def encode(values, scale, parts, FP8: tl.constexpr, FUSED: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes of ``values/scale``, where the scale is that of their amax or more; ``parts`` are `reciprocal_of` it.

    Without a branch, through which Triton 3.7 would trace layouts back into the rotation, and spill.
    """
    if FUSED:
        unit, divisor, reciprocal = parts
        y = quotient(values * unit, divisor, reciprocal)
    else:
        y = _exact(values, scale, FP8)
    return _codes(y, FP8, HARDWARE)


@triton.jit
def encode_by_given(values, scale, FP8: tl.constexpr, FUSED: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes of ``values/scale``, saturating, whatever the scale, a scalar.

    Quotients leave the branches, not codes: of 32 codes of a thread Triton 3.6 on an H200 got one wrong.
    """
    if FUSED and scale > 0:
        # What is beyond the largest times the scale saturates, and so does that product.
        bounded = _bounded(values, scale * (MAX_E4M3 if FP8 else MAX_INT8))
        unit, divisor, reciprocal = reciprocal_of(scale)
        y = quotient(bounded * unit, divisor, reciprocal)
    else:
        y = _exact(values, scale, FP8)
    return _codes(y, FP8, HARDWARE)


@triton.jit
def decode(codes, FP8: tl.constexpr, HARDWARE: tl.constexpr):
    """Values of codes (uint8), float32."""
    if FP8:
        values = decode_signed_e4m3(codes, HARDWARE)
    else:
        values = codes.to(tl.int8, bitcast=True).to(tl.float32)
    return values
