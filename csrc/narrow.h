// float32 to bfloat16 and float16, ties to even; host and device, the same bits from both.
#pragma once

#include "minifloat.h"

namespace lrq {

LRQ_INLINE void narrow(float value, float& out) { out = value; }

LRQ_INLINE void narrow(float value, BFloat16& out) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

LRQ_INLINE void narrow(float value, Float16& out) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = to_bits(value) & 0x7fffffffu;
    // 1/2 has the smallest subnormal, 2^-24, as its last place: adding rounds.
    const uint32_t subnormal = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
    const uint32_t finite = bits < 113u << 23 ? subnormal : normal;
    const uint32_t above = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // 65520 and more round to infinity.
    out.bits = static_cast<uint16_t>((bits < 0x477ff000u ? finite : above) | (to_bits(value) >> 31 << 15));
#endif
}

}  // namespace lrq
