// Signed E4M3; host and device, the same bits from both.
#pragma once

#include "minifloat.h"

namespace lrq {

// Nearest E4M3 value of a magnitude, ties to even, saturating. The sum has the step of the grid as its last place:
// adding rounds. The product is exact, so a fused sum has the same bits.
LRQ_INLINE float nearest_e4m3(float value) {
    const float bounded = value < kE4M3Max ? value : kE4M3Max;
    const float octave = from_bits(to_bits(bounded) & 0x7f800000u);
    const float wide = octave > 0x1p-6f ? octave : 0x1p-6f;
#ifdef __CUDA_ARCH__
    return __fmaf_rn(wide, -0x1p20f, __fmaf_rn(wide, 0x1p20f, bounded));
#else
    return (bounded + wide * 0x1p20f) - wide * 0x1p20f;
#endif
}

// Nearest E4M3 code, ties to even, saturating; the sign of zero is kept.
LRQ_INLINE uint32_t encode_signed_e4m3(float value) {
    const float wide = magnitude(value);
    return encode_e4m3(wide < kE4M3Max ? wide : kE4M3Max) | (to_bits(value) >> 31 << 7);
}

// Two codes, `high` in the high byte.
LRQ_INLINE uint32_t encode_e4m3x2(float high, float low) {
#ifdef LRQ_CVT_E4M3
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return encode_signed_e4m3(high) << 8 | encode_signed_e4m3(low);
#endif
}

// Value of any of the 256 codes, without a conversion in hardware.
LRQ_INLINE float decode_e4m3_bits(uint32_t code) {
    const uint32_t unsigned_code = code & 0x7fu;
    const uint32_t finite = to_bits(decode_e4m3(unsigned_code));
    return from_bits((unsigned_code == 0x7fu ? 0x7fc00000u : finite) | (code & 0x80u) << 24);
}

// Values of the two codes in the low bytes of `codes`; a half holds every one of them.
LRQ_INLINE void decode_e4m3x2(uint32_t codes, float& high, float& low) {
#ifdef LRQ_CVT_E4M3
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
    low = widen(Float16{static_cast<uint16_t>(halves)});
    high = widen(Float16{static_cast<uint16_t>(halves >> 16)});
#else
    low = decode_e4m3_bits(codes & 0xffu);
    high = decode_e4m3_bits(codes >> 8 & 0xffu);
#endif
}

// Value of any of the 256 codes.
LRQ_INLINE float decode_signed_e4m3(uint32_t code) {
#ifdef LRQ_CVT_E4M3
    float high, low;
    decode_e4m3x2(code, high, low);
    return low;
#else
    return decode_e4m3_bits(code);
#endif
}

// Value of an E2M1 code; the product is exact and makes subnormals normal.
LRQ_INLINE float decode_e2m1(uint32_t code) { return from_bits((code & 7u) << 22 | (code & 8u) << 28) * 0x1p126f; }

// Nearest E4M3 values of two magnitudes, as `nearest_e4m3`.
LRQ_INLINE void nearest_e4m3x2(const float (&values)[2], float (&nearest)[2]) {
#ifdef LRQ_CVT_E4M3
    decode_e4m3x2(encode_e4m3x2(values[1], values[0]), nearest[1], nearest[0]);
#else
    nearest[0] = nearest_e4m3(values[0]), nearest[1] = nearest_e4m3(values[1]);
#endif
}

}  // namespace lrq
