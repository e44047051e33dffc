// Where the codes, block scales and values of a matrix lie that is expanded again.
#pragma once

#include "swizzle.h"
#include "tensor.h"

namespace lrq {

// Everything is contiguous; `row_bytes` are the codes of a row, padding included.
struct Expansion {
    const uint8_t* codes;
    int64_t code_rows, row_bytes;
    const uint8_t* scales;
    int64_t row_tiles, column_tiles;
    const float* tensor_scale;  // null: none
    void* out;
    Type type;
    int64_t batch, rows, columns;
};

inline Expansion expansion_of(const Tensor& codes, const Tensor& block_scales, const Tensor* tensor_scale,
                              const Tensor& out, int codes_per_byte, int block, const std::string& operation) {
    require(out.type == Type::kFloat32 || out.type == Type::kBFloat16 || out.type == Type::kFloat16,
            operation + ": the output must be float32, bfloat16 or float16");
    require(!tensor_scale || tensor_scale->type == Type::kFloat32, operation + ": tensor_scale must be float32");
    Expansion layout{};
    layout.codes = static_cast<const uint8_t*>(codes.data);
    layout.code_rows = codes.size(2);
    layout.row_bytes = codes.size(1);
    layout.scales = static_cast<const uint8_t*>(block_scales.data);
    layout.row_tiles = block_scales.size(2) / kTileRows;
    layout.column_tiles = block_scales.size(1) / kTileColumns;
    layout.tensor_scale = tensor_scale ? static_cast<const float*>(tensor_scale->data) : nullptr;
    layout.out = out.data;
    layout.type = out.type;
    layout.batch = out.size(3);
    layout.rows = out.size(2);
    layout.columns = out.size(1);
    require(layout.row_bytes * codes_per_byte >= layout.columns && layout.code_rows >= layout.rows &&
                layout.row_tiles * kTileRows >= layout.rows &&
                layout.column_tiles * kTileColumns * block >= layout.columns,
            operation + ": the inputs are too small for the output");
    return layout;
}

}  // namespace lrq
