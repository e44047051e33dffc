"""E2M1 and E4M3 on the device, rounded half to even, without the conversion instructions unless they exist.

Magic numbers: adding ``2^(23+k)`` to a smaller non-negative float32 rounds it to a multiple of ``2^k``, ties to even.
"""

import triton
import triton.language as tl

MAX_E2M1 = tl.constexpr(6.0)
MAX_E4M3 = tl.constexpr(448.0)

_PAIRS = tl.constexpr(
    """{
    .reg .b8 b0, b1, b2, b3;
    cvt.rn.satfinite.e2m1x2.f32 b0, $1, $2;
    cvt.rn.satfinite.e2m1x2.f32 b1, $3, $4;
    cvt.rn.satfinite.e2m1x2.f32 b2, $5, $6;
    cvt.rn.satfinite.e2m1x2.f32 b3, $7, $8;
    mov.b32 $0, {b0, b1, b2, b3};
    }"""
)


@triton.jit
def nearest_e2m1(magnitude):
    """Nearest E2M1 value of non-negative values, saturating, float32."""
    a = tl.minimum(magnitude, MAX_E2M1)
    # 2^22 times the octave, or 2^22: its last place is the step of the grid.
    octave = a.to(tl.int32, bitcast=True) & 0x7F800000
    magic = tl.maximum(octave + 0x0B000000, 0x4A800000).to(tl.float32, bitcast=True)
    return (a + magic) - magic


@triton.jit
def biased_e2m1(y, SATURATE: tl.constexpr):
    """0x4b000000 plus the code of the magnitude of ``y``, which is below 7 unless SATURATE."""
    a = tl.abs(y)
    # Each of the three is exact on its octave and too large elsewhere. The products are exact: fused or not.
    fine = tl.fma(a, 2.0, 8388608.0).to(tl.int32, bitcast=True)
    middle = (a + 8388610.0).to(tl.int32, bitcast=True)
    coarse = tl.fma(a, 0.5, 8388612.0).to(tl.int32, bitcast=True)
    least = tl.minimum(tl.minimum(fine, middle), coarse)
    if SATURATE:
        least = tl.minimum(least, 0x4B000007)
    return least.to(tl.uint32, bitcast=True)


@triton.jit
def _signed(y, w):
    sign = w.to(tl.int32, bitcast=True) & -0x80000000
    return ((y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign).to(tl.float32, bitcast=True)


@triton.jit
def pack_e2m1(y, w, HARDWARE: tl.constexpr, SATURATE: tl.constexpr):
    """E2M1 codes of eight values as four bytes with the even value in the high nibble: uint32.

    The magnitudes are those of ``y``, the signs those of ``w``; without SATURATE every magnitude must be below 7.
    """
    if HARDWARE:
        signed = [_signed(y[0], w[0]), _signed(y[1], w[1]), _signed(y[2], w[2]), _signed(y[3], w[3])]
        signed += [_signed(y[4], w[4]), _signed(y[5], w[5]), _signed(y[6], w[6]), _signed(y[7], w[7])]
        word = tl.inline_asm_elementwise(_PAIRS, "=r,f,f,f,f,f,f,f,f", signed, dtype=tl.int32, is_pure=True, pack=1)
        return word.to(tl.uint32, bitcast=True)
    codes = biased_e2m1(y[6], SATURATE)
    for i in tl.static_range(7):
        codes = (codes << 4) + biased_e2m1(y[(6 - i) ^ 1], SATURATE)
    # What is left of the eight biases.
    return (codes - 0xFB000000) | pack_signs(w)


@triton.jit
def pack_signs(w):
    """The sign bits of eight codes in their places, uint32."""
    signs = w[6].to(tl.uint32, bitcast=True) >> 28
    for i in tl.static_range(7):
        # A funnel shift: three bits of the exponent come along.
        signs = signs << 4 | w[(6 - i) ^ 1].to(tl.uint32, bitcast=True) >> 28
    return signs & 0x88888888


@triton.jit
def encode_e4m3(y):
    """Code of the nearest E4M3 value of ``0 <= y <= 448``, int32."""
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = (y + 16384.0).to(tl.int32, bitcast=True) & 15
    return tl.where(y < 0.015625, subnormal, normal)


@triton.jit
def decode_e4m3(code):
    """Value of the E4M3 codes 0 to 126, float32."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def encode_signed_e4m3(y, HARDWARE: tl.constexpr):
    """Code of the nearest E4M3 value, saturating, uint8."""
    if HARDWARE:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    sign = (y.to(tl.int32, bitcast=True) >> 24) & 128
    return (encode_e4m3(tl.minimum(tl.abs(y), MAX_E4M3)) | sign).to(tl.uint8)


@triton.jit
def decode_signed_e4m3(code, HARDWARE: tl.constexpr):
    """Value of any of the 256 codes, uint8, as float32."""
    if HARDWARE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    code = code.to(tl.int32)
    # The exponent's bias of 7 in place of 127; the product is exact.
    value = ((code & 127) << 20 | (code & 128) << 24).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((code & 127) == 127, float("nan"), value)


@triton.jit
def nearest_e4m3(magnitude):
    """Nearest E4M3 value of non-negative values, saturating, float32."""
    bounded = tl.minimum(magnitude, MAX_E4M3)
    octave = (bounded.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    wide = tl.maximum(octave, 0.015625)
    # The products are exact: fused or not.
    return tl.fma(wide, -1048576.0, tl.fma(wide, 1048576.0, bounded))


@triton.jit
def decode_e2m1(code):
    """Value of the low four bits, float32; the product is exact and makes subnormals normal."""
    return ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def decode_e8m0(exponent):
    """``2^(exponent - 127)`` for exponents from 0 to 254, int32."""
    return tl.where(exponent > 0, exponent << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal_e8m0(exponent):
    """``1/2^(exponent - 127)``: a product with it has the bits of the quotient."""
    return decode_e8m0(254 - exponent)
