// INT8: scales and symmetric codes; host and device.
#pragma once

#include "minifloat.h"

namespace lrq {

struct Int8 {
    static LRQ_INLINE float scale(float amax, bool) {
        const float quotient = divide(amax, 127.0f);
        return quotient < 1e-30f ? 1e-30f : quotient;
    }

    // In the low byte, of values that round to 127 at most. The sum has 1 as its last place: adding rounds, and the low
    // bits are the integer.
    static LRQ_INLINE uint32_t encode_bounded(float value) { return to_bits(value + 0x1.8p23f); }

    static LRQ_INLINE uint32_t encode(float value) {
        const float above = value > -127.0f ? value : -127.0f;
        return encode_bounded(above < 127.0f ? above : 127.0f);
    }
    static LRQ_INLINE float decode(uint8_t code) { return static_cast<float>(static_cast<int8_t>(code)); }
};

}  // namespace lrq
