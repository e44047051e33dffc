// E2M1, E4M3 and E8M0 (OCP Microscaling Formats 1.0, section 5.3), host and device, the same bits from both.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LRQ_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define LRQ_INLINE __forceinline
#else
#define LRQ_INLINE inline __attribute__((always_inline))
#endif

// On a GPU an array of constant indices lives in registers; a loop that GCC unrolls early is not vectorised.
#if defined(__CUDACC__)
#define LRQ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__)
#define LRQ_UNROLL _Pragma("GCC unroll 1")
#else
#define LRQ_UNROLL
#endif

// PTX ISA, cvt: E2M1 needs an `a` or `f` target from sm_100 on.
#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#if __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1000
#define LRQ_CVT_E2M1
#endif
#endif

#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 890
#define LRQ_CVT_E4M3
#endif
#endif

namespace lrq {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

LRQ_INLINE uint32_t to_bits(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

LRQ_INLINE float from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

LRQ_INLINE float magnitude(float value) { return fabsf(value); }

// Correctly rounded even where a build asks for fast division.
LRQ_INLINE float divide(float dividend, float divisor) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(dividend, divisor);
#else
    return dividend / divisor;
#endif
}

LRQ_INLINE float widen(float value) { return value; }

LRQ_INLINE float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

LRQ_INLINE float widen(Float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    // The product is exact and makes subnormals normal.
    const uint32_t bits = value.bits & 0x7fffu;
    const uint32_t finite = to_bits(from_bits(bits << 13) * 0x1p112f);
    const uint32_t wide = bits < 0x7c00u ? finite : (bits << 13) | 0x7f800000u;
    return from_bits(wide | (static_cast<uint32_t>(value.bits) & 0x8000u) << 16);
#endif
}

constexpr float kE2M1Max = 6.0f;
constexpr float kE4M3Max = 448.0f;
constexpr int kE4M3LastCode = 126;

// Nearest E2M1 value of a magnitude, ties to even, saturating. The sum has the step of the grid as its last place:
// adding rounds. Free of branches, which the search would mispredict.
LRQ_INLINE float nearest_e2m1(float value) {
#ifdef __CUDA_ARCH__
    const float bounded = value < kE2M1Max ? value : kE2M1Max;
    const int exponent = static_cast<int>(to_bits(bounded) & 0x7f800000u);
    const float shift = __int_as_float(__viaddmax_s32(exponent, 22 << 23, (127 + 22) << 23));
#else
    // The order of the bits of magnitudes is their order, and GCC vectorises it everywhere.
    const uint32_t bits = to_bits(value) < 0x40c00000u ? to_bits(value) : 0x40c00000u;
    const uint32_t octave = bits & 0x7f800000u;
    const float bounded = from_bits(bits);
    const float shift = from_bits((octave > 127u << 23 ? octave : 127u << 23) + (22u << 23));
#endif
    return (bounded + shift) - shift;
}

// Nearest E2M1 code, ties to even, saturating; the sign of zero is kept. In each of the three ranges of the exponent
// one of the sums is the smallest, and its low bits are the code.
LRQ_INLINE uint32_t encode_e2m1(float value) {
    const uint32_t bits = to_bits(value);
    const float wide = magnitude(value);
    const float bounded = wide < kE2M1Max ? wide : kE2M1Max;
    const float fine = bounded * 2.0f + 0x1p23f;
    const float middle = bounded + (0x1p23f + 2.0f);
    const float coarse = bounded * 0.5f + (0x1p23f + 4.0f);
    const float finest = fine < middle ? fine : middle;
    return (to_bits(finest < coarse ? finest : coarse) & 7u) | (bits >> 31 << 3);
}

// Two E2M1 codes in a byte, `high` in the high nibble.
LRQ_INLINE uint32_t encode_e2m1x2(float high, float low) {
#ifdef LRQ_CVT_E2M1
    uint16_t packed;
    asm("{\n"
        ".reg .b8 byte;\n"
        "cvt.rn.satfinite.e2m1x2.f32 byte, %1, %2;\n"
        "mov.b16 %0, {byte, 0};\n"
        "}"
        : "=h"(packed)
        : "f"(high), "f"(low));
    return packed;
#else
    return encode_e2m1(high) << 4 | encode_e2m1(low);
#endif
}

// Nearest E4M3 code of a value in [0, 448], ties to even.
LRQ_INLINE uint32_t encode_e4m3(float value) {
#ifdef LRQ_CVT_E4M3
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(0.0f), "f"(value));
    return packed & 0xffu;
#else
    const uint32_t bits = to_bits(value);
    // 2^14 has the smallest subnormal, 2^-9, as its last place: adding rounds.
    const uint32_t subnormal = to_bits(value + 0x1p14f) - 0x46800000u;
    const uint32_t normal = (bits - (120u << 23) + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
    return bits < 121u << 23 ? subnormal : normal;
#endif
}

// Value of an E4M3 code, 0 to 126. The product is exact and makes subnormals normal.
LRQ_INLINE float decode_e4m3(uint32_t code) { return from_bits(code << 20) * 0x1p120f; }

LRQ_INLINE float decode_e8m0(uint32_t exponent) { return from_bits(exponent ? exponent << 23 : 0x400000u); }

}  // namespace lrq
