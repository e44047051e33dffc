// FP8: scales and codes of E4M3; host and device.
#pragma once

#include "e4m3.h"

namespace lrq {

struct Fp8 {
    static LRQ_INLINE float scale(float amax, bool of_tensor) {
        if (!of_tensor) return divide(amax < 1e-12f ? 1e-12f : amax, kE4M3Max);
        const float quotient = divide(amax, kE4M3Max);
        return quotient == 0.0f ? 1.0f : quotient;
    }

    static LRQ_INLINE uint32_t encode(float value) { return encode_signed_e4m3(value); }
    static LRQ_INLINE float decode(uint8_t code) { return decode_signed_e4m3(code); }
};

}  // namespace lrq
