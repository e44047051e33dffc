// One row at a time, widened to float32.
#pragma once

#include "../matrix.h"
#include "../minifloat.h"

namespace lrq::cpu {

void read_row(const Matrix& x, int64_t matrix, int64_t row, float* out);

// The row of that index in a contiguous output.
void write_row(const float* row, int64_t columns, Type type, void* out, int64_t index);

float row_amax(const float* row, int64_t columns);

// The order of the bits of non-negative floats is their order, and integers vectorise.
LRQ_INLINE float largest(const float* values, int64_t count) {
    int32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t candidate = static_cast<int32_t>(to_bits(magnitude(values[i])));
        bits = candidate > bits ? candidate : bits;
    }
    return from_bits(static_cast<uint32_t>(bits));
}

}  // namespace lrq::cpu
