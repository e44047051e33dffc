// Codes of one byte, tile by tile. `Codec` holds scale(amax, of_tensor), encode(values, count, scale, codes) and
// decode(codes, count, scale, values).
#pragma once

#include <algorithm>
#include <vector>

#include "../scaling.h"
#include "amax.h"
#include "hadamard.h"
#include "parallel.h"
#include "rows.h"

namespace lrq::cpu {

inline void read_rotated(const Scaled& layout, int64_t matrix, int64_t row, float* values) {
    read_row(layout.x, matrix, row, values);
    if (layout.group) rotate_row(values, layout.x.columns, layout.group);
}

template <class Codec>
void quantize_matrices(const Scaled& layout, int threads) {
    const Matrix& x = layout.x;
    if (layout.given)
        for (int64_t m = 0; m < x.batch; ++m) layout.scales[m] = layout.given[m * layout.given_stride];
    else
        amax_of_matrices(
            x, threads, [&](int64_t m, int64_t row, float* values) { read_rotated(layout, m, row, values); },
            [&](int64_t m, float amax) { layout.scales[m] = Codec::scale(amax, true); });
    const int workers = worker_count(x.batch * x.rows, threads);
    std::vector<std::vector<float>> rows(workers, std::vector<float>(x.columns));
    parallel_rows(x.batch * x.rows, workers, [&](int worker, int64_t index) {
        float* const values = rows[worker].data();
        read_rotated(layout, index / x.rows, index % x.rows, values);
        uint8_t* const codes = static_cast<uint8_t*>(layout.out) + index * x.columns;
        Codec::encode(values, x.columns, layout.scales[index / x.rows], codes);
    });
}

// Rows and blocks: the rows of a strip of tiles are read for their scales, and, if more than one, again for the codes.
template <class Codec>
void quantize_strips(const Scaled& layout, int threads) {
    const Matrix& x = layout.x;
    const int64_t width = layout.tile_columns, across = layout.tiles_across();
    const int64_t strips = x.batch * layout.tiles_down(), grain = std::max<int64_t>(kGrain / layout.tile_rows, 1);
    const int workers = worker_count(strips, threads, grain);
    std::vector<std::vector<float>> rows(workers, std::vector<float>(x.columns));
    const auto quantize = [&](int worker, int64_t strip) {
        float* const values = rows[worker].data();
        float* const scales = layout.scales + strip * across;
        std::fill_n(scales, across, 0.0f);
        const auto read = [&](int64_t row) {
            read_rotated(layout, strip / layout.tiles_down(), strip % layout.tiles_down() * layout.tile_rows + row,
                         values);
        };
        for (int64_t row = 0; row < layout.tile_rows; ++row) {
            read(row);
            for (int64_t t = 0; t < across; ++t) scales[t] = larger(scales[t], row_amax(values + t * width, width));
        }
        for (int64_t t = 0; t < across; ++t) scales[t] = Codec::scale(scales[t], false);
        for (int64_t row = 0; row < layout.tile_rows; ++row) {
            if (layout.tile_rows > 1) read(row);
            uint8_t* const codes = static_cast<uint8_t*>(layout.out) + (strip * layout.tile_rows + row) * x.columns;
            for (int64_t t = 0; t < across; ++t) Codec::encode(values + t * width, width, scales[t], codes + t * width);
        }
    };
    parallel_rows(strips, workers, quantize, grain);
}

template <class Codec>
void quantize_scaled(const Scaled& layout, int threads) {
    layout.of_tensor ? quantize_matrices<Codec>(layout, threads) : quantize_strips<Codec>(layout, threads);
}

template <class Codec>
void dequantize_scaled(const Scaled& layout, Type type, int threads) {
    const Matrix& x = layout.x;
    const int64_t width = layout.tile_columns, across = layout.tiles_across();
    const int workers = worker_count(x.batch * x.rows, threads);
    std::vector<std::vector<float>> rows(workers, std::vector<float>(x.columns));
    parallel_rows(x.batch * x.rows, workers, [&](int worker, int64_t index) {
        const int64_t matrix = index / x.rows, row = index % x.rows;
        const uint8_t* const codes = static_cast<const uint8_t*>(x.data) + matrix * x.batch_stride + row * x.row_stride;
        const float* const scales = layout.scales + (matrix * layout.tiles_down() + row / layout.tile_rows) * across;
        float* const values = rows[worker].data();
        for (int64_t t = 0; t < across; ++t) Codec::decode(codes + t * width, width, scales[t], values + t * width);
        if (layout.group) rotate_row(values, x.columns, layout.group);
        write_row(values, x.columns, type, layout.out, index);
    });
}

}  // namespace lrq::cpu
