// Codes and block scales to values, row by row.
#pragma once

#include <vector>

#include "../dequantize.h"
#include "../narrow.h"
#include "parallel.h"

namespace lrq::cpu {

// `Format` holds kBlock, kBytes (of a block's codes), scale(byte, tensor_scale) and decode(codes, values).
template <class Format, class T>
LRQ_INLINE void expand_blocks(const uint8_t* codes, const uint8_t* scales, float tensor_scale, int64_t columns,
                              T* out) {
    constexpr int kBlock = Format::kBlock;
    float values[kBlock];
    for (int64_t first = 0, b = 0; first < columns; first += kBlock, ++b) {
        const float scale = Format::scale(scales[b], tensor_scale);
        Format::decode(codes + b * Format::kBytes, values);
        if (first + kBlock <= columns) {
            LRQ_UNROLL
            for (int i = 0; i < kBlock; ++i) narrow(values[i] * scale, out[first + i]);
        } else {
            for (int i = 0; first + i < columns; ++i) narrow(values[i] * scale, out[first + i]);
        }
    }
}

// Calls `expand(matrix, codes, scales, columns, values)` for every row of the output.
template <class Expand>
void expand_rows(const Expansion& layout, int threads, const Expand& expand) {
    const int64_t scale_columns = layout.column_tiles * kTileColumns;
    const int64_t scale_bytes = layout.row_tiles * kTileRows * scale_columns;
    const int workers = worker_count(layout.batch * layout.rows, threads);
    std::vector<std::vector<uint8_t>> scales(workers, std::vector<uint8_t>(scale_columns));
    parallel_rows(layout.batch * layout.rows, workers, [&](int worker, int64_t index) {
        const int64_t matrix = index / layout.rows, row = index % layout.rows;
        const uint8_t* const codes = layout.codes + (matrix * layout.code_rows + row) * layout.row_bytes;
        uint8_t* const linear = scales[worker].data();
        for (int64_t b = 0; b < scale_columns; ++b)
            linear[b] = layout.scales[matrix * scale_bytes + swizzled(layout.column_tiles, row, b)];
        const int64_t offset = index * layout.columns;
        if (layout.type == Type::kBFloat16)
            expand(matrix, codes, linear, layout.columns, static_cast<BFloat16*>(layout.out) + offset);
        else if (layout.type == Type::kFloat16)
            expand(matrix, codes, linear, layout.columns, static_cast<Float16*>(layout.out) + offset);
        else
            expand(matrix, codes, linear, layout.columns, static_cast<float*>(layout.out) + offset);
    });
}

}  // namespace lrq::cpu
