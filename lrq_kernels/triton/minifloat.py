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
    magic = tl.where(a < 2, 4194304.0, tl.where(a < 4, 8388608.0, 16777216.0))
    return (a + magic) - magic


@triton.jit
def _code_e2m1(y):
    a = tl.minimum(tl.abs(y), MAX_E2M1)
    # Each of the three is exact on its octave and too large elsewhere.
    biased = tl.minimum(tl.minimum(2 * a + 8388608.0, a + 8388610.0), 0.5 * a + 8388612.0)
    return (biased.to(tl.int32, bitcast=True) & 7) | ((y.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def pack_e2m1(y0, y1, y2, y3, y4, y5, y6, y7, HARDWARE: tl.constexpr):
    """E2M1 codes of eight values, saturating, as four bytes with the even value in the high nibble: uint32."""
    if HARDWARE:
        word = tl.inline_asm_elementwise(
            _PAIRS, "=r,f,f,f,f,f,f,f,f", [y0, y1, y2, y3, y4, y5, y6, y7], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = _code_e2m1(y0) << 4 | _code_e2m1(y1) | _code_e2m1(y2) << 12 | _code_e2m1(y3) << 8
        word |= _code_e2m1(y4) << 20 | _code_e2m1(y5) << 16 | _code_e2m1(y6) << 28 | _code_e2m1(y7) << 24
    return word.to(tl.uint32, bitcast=True)


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
