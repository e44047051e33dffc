// Codes of one byte and the float32 scale they share: with the matrix, a row or a square block.
#pragma once

#include <optional>
#include <string>

#include "matrix.h"
#include "minifloat.h"

namespace lrq {

// Codes (or values), scales and given scales are contiguous or strided as named; scales lie tile after tile, row-major.
struct Scaled {
    Matrix x;
    void* out;
    float* scales;
    int64_t tile_rows, tile_columns;
    bool of_tensor;
    const float* given;  // null: computed from the amax
    int64_t given_stride;
    int group;  // of the Hadamard rotation; 0: none

    LRQ_INLINE int64_t tiles_down() const { return x.rows / tile_rows; }
    LRQ_INLINE int64_t tiles_across() const { return x.columns / tile_columns; }
};

inline void set_tiles(Scaled& layout, const std::string& scaling, int64_t block) {
    layout.of_tensor = scaling == "tensor";
    const bool of_row = scaling == "row";
    layout.tile_rows = layout.of_tensor ? layout.x.rows : of_row ? 1 : block;
    layout.tile_columns = layout.of_tensor || of_row ? layout.x.columns : block;
}

inline Scaled scaled_of(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given,
                        int group, const Tensor& codes, const Tensor& scale, const std::string& operation) {
    require(scale.type == Type::kFloat32 && (!given || given->type == Type::kFloat32),
            operation + ": scales must be float32");
    require(codes.type == Type::kFloat8E4M3 || codes.type == Type::kInt8, operation + ": codes must be of one byte");
    Scaled layout{};
    layout.x = matrix_of(x, operation);
    layout.out = codes.data;
    layout.scales = static_cast<float*>(scale.data);
    set_tiles(layout, scaling, block);
    layout.given = given ? static_cast<const float*>(given->data) : nullptr;
    layout.given_stride = given ? given->stride(1) : 0;
    layout.group = group;
    return layout;
}

// The other way: `codes` are x, and their tiles are told by the shape of the contiguous scales.
inline Scaled scaled_codes_of(const Tensor& codes, const Tensor& scale, int group, const Tensor& out,
                              const std::string& operation) {
    require(codes.type == Type::kFloat8E4M3 || codes.type == Type::kInt8, operation + ": codes must be of one byte");
    require(codes.stride(1) == 1 || codes.size(1) == 1, operation + ": the columns of the codes must be contiguous");
    require(scale.type == Type::kFloat32, operation + ": the scale must be float32");
    Scaled layout{};
    layout.x = {codes.data, codes.type, codes.size(3), codes.size(2), codes.size(1), codes.stride(3), codes.stride(2)};
    layout.out = out.data;
    layout.scales = static_cast<float*>(scale.data);
    layout.group = group;
    const int more = codes.dimensions - scale.dimensions;
    const bool of_row = more == 1 || (more == 0 && scale.size(1) == 1 && scale.size(2) == codes.size(2));
    set_tiles(layout, more == 2 ? "tensor" : of_row ? "row" : "block", codes.size(2) / scale.size(2));
    return layout;
}

}  // namespace lrq
