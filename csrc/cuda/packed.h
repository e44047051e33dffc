// Instructions on the bytes and halves of a word; host and device.
#pragma once

#include "../minifloat.h"

namespace lrq::cuda {

// Byte i of the result is byte `selectors[i]` of the eight of `low` and `high`.
LRQ_INLINE uint32_t permute(uint32_t low, uint32_t high, uint32_t selectors) {
#ifdef __CUDA_ARCH__
    // The intrinsic would mask selectors, which are below 8.
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selectors));
    return result;
#else
    const uint64_t both = uint64_t{high} << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selectors >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
#endif
}

// Bits of `a` where the mask has ones, else of `b`: one instruction, which the compiler does not find.
LRQ_INLINE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
    return result;
#else
    return (mask & a) | (~mask & b);
#endif
}

// The low word of both, shifted to the right.
LRQ_INLINE uint32_t funnel(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
    return __funnelshift_r(low, high, shift);
#else
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift);
#endif
}

LRQ_INLINE uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t sum) {
#ifdef __CUDA_ARCH__
    return __dp4a(a, b, sum);
#else
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xff) * (b >> i & 0xff);
    return sum;
#endif
}

// Of the halves of `pair` and two bytes, those of the low or the high half.
LRQ_INLINE uint32_t dot_low(uint32_t pair, uint32_t bytes, uint32_t sum) {
#ifdef __CUDA_ARCH__
    return __dp2a_lo(pair, bytes, sum);
#else
    return sum + (pair & 0xffff) * (bytes & 0xff) + (pair >> 16) * (bytes >> 8 & 0xff);
#endif
}

LRQ_INLINE uint32_t dot_high(uint32_t pair, uint32_t bytes, uint32_t sum) {
#ifdef __CUDA_ARCH__
    return __dp2a_hi(pair, bytes, sum);
#else
    return dot_low(pair, bytes >> 16, sum);
#endif
}

// max(a + b, 0) of either half, signed.
LRQ_INLINE uint32_t add_above_zero(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __viaddmax_s16x2(a, b, 0u);
#else
    uint32_t result = 0;
    for (int i = 0; i < 32; i += 16) {
        const int16_t sum = static_cast<int16_t>((a >> i) + (b >> i));
        result |= static_cast<uint32_t>(sum > 0 ? sum : 0) << i;
    }
    return result;
#endif
}

}  // namespace lrq::cuda
