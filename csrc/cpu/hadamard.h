#pragma once

#include <cstdint>

namespace lrq::cpu {

// Rotates every group of columns in place.
void rotate_row(float* row, int64_t columns, int group);

}  // namespace lrq::cpu
