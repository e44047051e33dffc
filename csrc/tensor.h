// What a kernel knows of a tensor: memory, type, shape, strides and device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lrq {

enum class Type { kFloat32, kBFloat16, kFloat16, kUInt8, kFloat8E4M3, kInt8, kOther };

constexpr int kMaxDimensions = 3;

struct Tensor {
    void* data = nullptr;
    Type type = Type::kOther;
    int dimensions = 0;
    int64_t shape[kMaxDimensions] = {};
    int64_t strides[kMaxDimensions] = {};  // in elements
    bool on_cuda = false;
    int device_index = -1;

    // Counted from the end: size(1) is the number of columns. What is missing counts as 1.
    int64_t size(int from_end) const { return from_end <= dimensions ? shape[dimensions - from_end] : 1; }
    int64_t stride(int from_end) const { return from_end <= dimensions ? strides[dimensions - from_end] : 0; }
};

inline void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

}  // namespace lrq
