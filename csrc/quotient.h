// Quotients of many dividends by one divisor without a division each; host and device.
#pragma once

#include <math.h>

#include "minifloat.h"

namespace lrq {

LRQ_INLINE float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}

// The correctly rounded w / divisor, from its correctly rounded reciprocal. Tried against division for every mantissa
// of the divisor and all w within 4 ulp of the ties of E2M1, E4M3 and the integers up to 127, and for every w with the
// divisors 6, 127, 448 and 2688 (tests/lrq_kernels/test_quotient.py runs a share of it).
class Quotient {
  public:
    LRQ_INLINE explicit Quotient(float divisor) : divisor_(divisor), reciprocal_(divide(1.0f, divisor)) {}
    LRQ_INLINE Quotient(float divisor, float reciprocal) : divisor_(divisor), reciprocal_(reciprocal) {}

    // Whether the remainder is exact for quotients of 2^-6 and more; smaller ones may be off in the last place.
    LRQ_INLINE bool safe() const { return divisor_ > 0x1p-80f && divisor_ < 0x1p80f; }

    LRQ_INLINE float operator()(float w) const {
        const float near = w * reciprocal_;
        return multiply_add(multiply_add(-near, divisor_, w), reciprocal_, near);
    }

  private:
    float divisor_, reciprocal_;
};

}  // namespace lrq
