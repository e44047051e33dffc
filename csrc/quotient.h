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

// 1/divisor in two parts, for quotients that are rounded to E2M1 or to integers up to 127: a multiplication less than
// above. tests/lrq_kernels/quotient.cpp compares it with division, too: of all mantissas of the divisor only the last
// one fails.
class TwoPartReciprocal {
  public:
    LRQ_INLINE explicit TwoPartReciprocal(float divisor) {
#ifdef __CUDA_ARCH__
        // What __frcp_rn does for the divisors that are served, without asking for their range.
        float near;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(divisor));
        high_ = fused(near, fused(-divisor, near, 1.0f), near);
#else
        high_ = 1.0f / divisor;
#endif
        low_ = fused(-divisor, high_, 1.0f) * high_;
    }

    static LRQ_INLINE bool serves(float divisor) {
        return divisor > 0x1p-80f && divisor < 0x1p80f && (to_bits(divisor) & 0x7fffffu) != 0x7fffffu;
    }

    // The correctly rounded 1/divisor.
    LRQ_INLINE float high() const { return high_; }

    // On the same side of every tie, or on it, as the correctly rounded quotient, but for the sign of zero.
    LRQ_INLINE float times(float dividend) const { return fused(dividend, high_, dividend * low_); }

  private:
    float high_, low_;
};

// The same with the interface of Quotient.
class TwoPartQuotient {
  public:
    LRQ_INLINE TwoPartQuotient(float divisor, float largest)
        : reciprocal_(divisor), safe_(TwoPartReciprocal::serves(divisor) && largest * reciprocal_.high() <= 0x1p100f) {}

    LRQ_INLINE bool safe() const { return safe_; }
    LRQ_INLINE float of(float dividend) const { return reciprocal_.times(dividend); }

  private:
    TwoPartReciprocal reciprocal_;
    bool safe_;
};

}  // namespace lrq
