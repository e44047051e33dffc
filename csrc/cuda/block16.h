// A thread's 16 weights as they lie in memory, and their E2M1 codes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../quotient.h"
#include "load.h"

namespace lrq::cuda {

// Words of 32 bits: two weights of 16 bits, or one of 32.
template <class T>
struct Block16 {
    static constexpr int kWords = 16 * sizeof(T) / sizeof(uint32_t);
    uint32_t words[kWords];

    // From a multiple of 16 bytes.
    __device__ __forceinline__ void load(const T* from) {
        const uint4* const source = reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
            const uint4 loaded = __ldg(source + i);
            words[4 * i] = loaded.x, words[4 * i + 1] = loaded.y;
            words[4 * i + 2] = loaded.z, words[4 * i + 3] = loaded.w;
        }
    }

    // From any place; what lies beyond the row is zero.
    __device__ __forceinline__ void load_part(const T* row, int64_t first, int64_t columns) {
        const int count = static_cast<int>(min(columns - first, int64_t{16}));
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const uint32_t bits = i < count ? bits_of(row[first + i]) : 0;
            if constexpr (sizeof(T) == 4)
                words[i] = bits;
            else if (i % 2)
                words[i / 2] |= bits << 16;
            else
                words[i / 2] = bits;
        }
    }

    // Weights i and i + 1, i even.
    __device__ __forceinline__ float2 pair(int i) const {
        float two[2];
        if constexpr (sizeof(T) == 4) {
            two[0] = __uint_as_float(words[i]), two[1] = __uint_as_float(words[i + 1]);
        } else {
            unpack(words[i / 2], two, T{});
        }
        return make_float2(two[0], two[1]);
    }

    __device__ __forceinline__ float amax() const;

  private:
    static __device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
    static __device__ __forceinline__ uint32_t bits_of(BFloat16 value) { return value.bits; }
    static __device__ __forceinline__ uint32_t bits_of(Float16 value) { return value.bits; }
};

template <>
__device__ __forceinline__ float Block16<float>::amax() const {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) most = fmaxf(most, fabsf(__uint_as_float(words[i])));
    return most;
}

// Two weights at once: max(|w|) = max(max(w), -min(w)).
template <class Pair>
__device__ __forceinline__ Pair amax_pairs(const uint32_t (&words)[8]) {
    const auto pair = [&](int i) { return *reinterpret_cast<const Pair*>(&words[i]); };
    Pair high = __hmax2(__hmax2(pair(0), pair(1)), pair(2)), low = __hmin2(__hmin2(pair(0), pair(1)), pair(2));
    high = __hmax2(__hmax2(high, __hmax2(__hmax2(pair(3), pair(4)), pair(5))), __hmax2(pair(6), pair(7)));
    low = __hmin2(__hmin2(low, __hmin2(__hmin2(pair(3), pair(4)), pair(5))), __hmin2(pair(6), pair(7)));
    return __hmax2(high, __hneg2(low));
}

template <>
__device__ __forceinline__ float Block16<BFloat16>::amax() const {
    const float2 most = __bfloat1622float2(amax_pairs<__nv_bfloat162>(words));
    return fmaxf(fabsf(most.x), fabsf(most.y));
}

template <>
__device__ __forceinline__ float Block16<Float16>::amax() const {
    const float2 most = __half22float2(amax_pairs<__half2>(words));
    return fmaxf(fabsf(most.x), fabsf(most.y));
}

// 0x4b000000 plus the code of the magnitude: one of the sums is the smallest in each range of the exponent. Values from
// 7 on saturate only where `kSaturate`.
template <bool kSaturate>
__device__ __forceinline__ uint32_t biased_e2m1(float value) {
    const float wide = fabsf(value);
    const int fine = __float_as_int(__fmaf_rn(wide, 2.0f, 0x1p23f));
    const int middle = __float_as_int(wide + (0x1p23f + 2.0f));
    const int coarse = __float_as_int(__fmaf_rn(wide, 0.5f, 0x1p23f + 4.0f));
    const int least = __vimin3_s32(fine, middle, coarse);
    return kSaturate ? min(least, 0x4b000007) : least;
}

// Bits 3 of eight nibbles: the signs of eight weights from word `first` on.
template <class T>
__device__ __forceinline__ uint32_t signs_of(const Block16<T>& block, int first) {
    const uint32_t* const words = block.words + first;
    if constexpr (sizeof(T) == 2) {
        const uint32_t a = __byte_perm(words[0], words[1], 0x7351), b = __byte_perm(words[2], words[3], 0x7351);
        return (__byte_perm(a, b, 0x5410) & 0x80808080u) | (__byte_perm(a, b, 0x7632) >> 4 & 0x08080808u);
    } else {
        uint32_t signs = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) signs |= (words[i] & 0x80000000u) >> (31 - (8 * (i / 2) + (i % 2 ? 3 : 7)));
        return signs;
    }
}

// Codes of eight weights from `first` on, the even one of a pair in the high nibble; `scaled` divides by the scale.
template <bool kSaturate, class T, class Scaled>
__device__ __forceinline__ uint32_t encode_e2m1x8(const Block16<T>& block, int first, const Scaled& scaled) {
#ifdef LRQ_CVT_E2M1
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const float2 two = block.pair(first + i);
        // A reciprocal in two parts may lose the sign of zero.
        codes |= encode_e2m1x2(copysignf(scaled(two.x), two.x), copysignf(scaled(two.y), two.y)) << 4 * i;
    }
    return codes;
#else
    uint32_t sum = 0;
#pragma unroll
    for (int i = 6; i >= 0; i -= 2) {
        const float2 two = block.pair(first + i);
        sum = (sum * 16 + biased_e2m1<kSaturate>(scaled(two.x))) * 16 + biased_e2m1<kSaturate>(scaled(two.y));
    }
    // What is left of the eight biases.
    sum -= 0xfb000000u;
    return sum | signs_of(block, first * static_cast<int>(sizeof(T)) / 4);
#endif
}

// Codes at any scale, out of the way of the common case: instructions that are not run would crowd those that are.
template <class T>
__device__ __noinline__ uint2 encode_rarely(const Block16<T> block, float scale) {
    const Quotient by_scale(scale, block.amax());
    if (by_scale.safe()) {
        const auto quotient = [&](float w) { return by_scale.of(w); };
        return make_uint2(encode_e2m1x8<true>(block, 0, quotient), encode_e2m1x8<true>(block, 8, quotient));
    }
    const auto quotient = [&](float w) { return divide(w, scale == 0.0f ? 1.0f : scale); };
    const uint2 codes = make_uint2(encode_e2m1x8<true>(block, 0, quotient), encode_e2m1x8<true>(block, 8, quotient));
    return scale == 0.0f ? make_uint2(0, 0) : codes;
}

// Codes of weights below 2^20 times the scale.
template <bool kSaturate, class T>
__device__ __forceinline__ uint2 encode_e2m1x16(const Block16<T>& block, float scale) {
    if (!TwoPartReciprocal::serves(scale)) return encode_rarely(block, scale);
    const TwoPartReciprocal reciprocal(scale);
    const auto quotient = [&](float w) { return reciprocal.times(w); };
    return make_uint2(encode_e2m1x8<kSaturate>(block, 0, quotient), encode_e2m1x8<kSaturate>(block, 8, quotient));
}

}  // namespace lrq::cuda
