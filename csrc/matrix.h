// A matrix or a batch of them, read row by row; the columns of a row are contiguous.
#pragma once

#include <string>

#include "tensor.h"

namespace lrq {

// Strides count elements.
struct Matrix {
    const void* data;
    Type type;
    int64_t batch, rows, columns, batch_stride, row_stride;
};

inline Matrix matrix_of(const Tensor& x, const std::string& operation) {
    require(x.type == Type::kFloat32 || x.type == Type::kBFloat16 || x.type == Type::kFloat16,
            operation + ": the input must be float32, bfloat16 or float16");
    require(x.stride(1) == 1 || x.size(1) == 1, operation + ": the columns of the input must be contiguous");
    return {x.data, x.type, x.size(3), x.size(2), x.size(1), x.stride(3), x.stride(2)};
}

// The same for bytes, of whatever meaning.
inline Matrix bytes_of(const Tensor& x, const std::string& operation) {
    require(x.type == Type::kUInt8 || x.type == Type::kFloat8E4M3, operation + ": the input must be bytes");
    require(x.stride(1) == 1 || x.size(1) == 1, operation + ": the columns of the input must be contiguous");
    return {x.data, x.type, x.size(3), x.size(2), x.size(1), x.stride(3), x.stride(2)};
}

}  // namespace lrq
