// Quotients by one divisor without a division each (Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", 1990), for callers that round them onto a coarse grid; host and device.
#pragma once

#include "minifloat.h"

namespace lrq {

LRQ_INLINE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}

LRQ_INLINE float reciprocal_of(float value) {
#ifdef __CUDA_ARCH__
    return __frcp_rn(value);
#else
    return 1.0f / value;
#endif
}

// `of` lies on the same side of every tie of E2M1, of E4M3 and of the integers to 127, or on it, as the correctly
// rounded quotient, and keeps the sign of zero: tests/lrq_kernels/quotient.cpp compares the two. Where not `safe`, the
// caller divides: the remainder could underflow, or the quotient overflow. One test for all the weights of a divisor.
class Quotient {
  public:
    // `largest` bounds the magnitude of every dividend.
    LRQ_INLINE Quotient(float divisor, float largest)
        : divisor_(divisor),
          reciprocal_(reciprocal_of(divisor)),
          safe_(divisor >= 0x1p-80f && divisor <= 0x1p80f && largest * reciprocal_ <= 0x1p100f) {}

    // For a divisor that is known when the kernel is compiled, with its correctly rounded reciprocal.
    LRQ_INLINE constexpr Quotient(float divisor, float reciprocal, bool safe)
        : divisor_(divisor), reciprocal_(reciprocal), safe_(safe) {}

    LRQ_INLINE bool safe() const { return safe_; }

    // Signs are such that -0 stays -0.
    LRQ_INLINE float of(float dividend) const {
        const float near = dividend * reciprocal_;
        return fused(-fused(near, divisor_, -dividend), reciprocal_, near);
    }

    // The correctly rounded quotient of any dividend: the first correction makes it faithful, the second exact. On a
    // CPU dividing is as fast.
    LRQ_INLINE float exact(float dividend) const {
#ifdef __CUDA_ARCH__
        const float near = of(dividend);
        return fused(-fused(near, divisor_, -dividend), reciprocal_, near);
#else
        return dividend / divisor_;
#endif
    }

  private:
    float divisor_, reciprocal_;
    bool safe_;
};

// Whether w * (1/divisor), from a reciprocal that is off by an ulp at most, may round to another E2M1 value than
// w / divisor, for any w whose mantissa ends in `kZeros` zeros (16 for bfloat16, 13 for float16, 0: unknown). It can't
// unless w lies within 4 ulp of a tie times the divisor; such weights are sparse, and ties are 1, 1.25, 1.5 or 1.75
// times a power of two.
template <int kZeros>
LRQ_INLINE bool may_cross_tie(float divisor) {
    if constexpr (kZeros == 0) {
        return true;
    } else {
        constexpr uint32_t kMargin = 8;
        uint32_t least = 0xffffffffu;
        LRQ_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint32_t above = (to_bits(divisor * (1.0f + 0.25f * i)) + kMargin) << (32 - kZeros);
            least = above < least ? above : least;
        }
        return least <= 2 * kMargin << (32 - kZeros);
    }
}

}  // namespace lrq
