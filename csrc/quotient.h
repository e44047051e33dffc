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

// `of` lies on the same side of every tie of E2M1, of E4M3 and of the integers to 127, or on it, as the correctly
// rounded quotient, and keeps the sign of zero: tests/lrq_kernels/quotient.cpp compares the two. Where not `safe`, the
// caller divides: the remainder could underflow, or the quotient overflow. One test for all the weights of a divisor.
class Quotient {
  public:
    // `largest` bounds the magnitude of every dividend.
    LRQ_INLINE Quotient(float divisor, float largest)
        : divisor_(divisor),
          reciprocal_(divide(1.0f, divisor)),
          safe_(divisor >= 0x1p-80f && divisor <= 0x1p80f && largest * reciprocal_ <= 0x1p100f) {}

    LRQ_INLINE bool safe() const { return safe_; }

    // Signs are such that -0 stays -0.
    LRQ_INLINE float of(float dividend) const {
        const float near = dividend * reciprocal_;
        return fused(-fused(near, divisor_, -dividend), reciprocal_, near);
    }

  private:
    float divisor_, reciprocal_;
    bool safe_;
};

}  // namespace lrq
