// Codes of one byte to values, 8 columns of a thread at a time. `Codec` holds unpack(word, values): the 4 values of a
// word of codes.
#pragma once

#include "../scaling.h"
#include "vector.h"

namespace lrq::cuda {

constexpr int kUnscaledThreads = 256;
constexpr int kUnscaledVectors = 2;

struct Tiling {
    Divisor across, tile_rows, tile_columns;
    // Whether a vector has one scale.
    bool uniform;
    int64_t tiles_across, tiles;
};

// Flat: the matrix has one scale, too.
template <class Codec, class T, Way kWay>
__global__ void __launch_bounds__(kUnscaledThreads) values_kernel(Scaled layout, Tiling tiling, uint32_t vectors) {
    await_predecessor();
    const int64_t matrix = batch_index();
    if (matrix >= layout.x.batch) return;
    const uint32_t first = blockIdx.x * (kUnscaledThreads * kUnscaledVectors) + threadIdx.x;
    const uint8_t* const source = static_cast<const uint8_t*>(layout.x.data) + matrix * layout.x.batch_stride;
    const float* const scales = layout.scales + matrix * tiling.tiles;
    constexpr bool kAligned = kWay != Way::kAny;
    Vector<uint8_t> held[kUnscaledVectors];
    uint32_t columns[kUnscaledVectors];
    const float* row_scales[kUnscaledVectors];
    float first_scales[kUnscaledVectors];
#pragma unroll
    for (int j = 0; j < kUnscaledVectors; ++j) {
        // Beyond the last vector that one again, instead of branches.
        const uint32_t index = min(first + j * kUnscaledThreads, vectors - 1);
        const Spot spot = spot_of<kWay>(index, tiling.across, layout.x.row_stride, layout.x.columns);
        held[j] = load_vector<kAligned>(source + spot.offset, spot.left);
        columns[j] = 0, row_scales[j] = scales;
        if constexpr (kWay != Way::kFlat) {
            const uint32_t row = tiling.across.quotient(index);
            columns[j] = tiling.across.remainder(index, row) * kVector;
            row_scales[j] += rows_apart<kWay>(tiling.tile_rows.quotient(row), tiling.tiles_across);
        }
        first_scales[j] = __ldg(row_scales[j] + (kWay == Way::kFlat ? 0 : tiling.tile_columns.quotient(columns[j])));
    }
    T* const out = static_cast<T*>(layout.out) + matrix * layout.x.rows * layout.x.columns;
#pragma unroll
    for (int j = 0; j < kUnscaledVectors; ++j) {
        const uint32_t index = first + j * kUnscaledThreads;
        const Spot spot = spot_of<kWay>(index, tiling.across, layout.x.columns, layout.x.columns);
        float values[kVector];
        Codec::unpack(held[j].words[0], values);
        Codec::unpack(held[j].words[1], values + 4);
        T* const target = out + spot.offset;
        if constexpr (kAligned) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[i] *= first_scales[j];
            store_values_if(index < vectors, target, values);
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (index >= vectors || i >= spot.left) break;
                const float scale =
                    tiling.uniform ? first_scales[j] : row_scales[j][tiling.tile_columns.quotient(columns[j] + i)];
                narrow(values[i] * scale, target[i]);
            }
        }
    }
}

inline Tiling tiling_of(const Scaled& layout, const char* operation) {
    return {Divisor((layout.x.columns + kVector - 1) / kVector, operation),
            Divisor(layout.tile_rows, operation),
            Divisor(layout.tile_columns, operation),
            layout.tile_columns == layout.x.columns || layout.tile_columns % kVector == 0,
            layout.tiles_across(),
            layout.tiles_down() * layout.tiles_across()};
}

template <class Codec, class T>
void dequantize_as(const Scaled& layout, uintptr_t stream, const char* operation) {
    const Matrix& x = layout.x;
    const Tiling tiling = tiling_of(layout, operation);
    Way way = tiling.uniform && is_multiple(layout.out, sizeof(uint4)) ? way_of<uint8_t>(x) : Way::kAny;
    if (way == Way::kFlat && tiling.tiles > 1) way = Way::kAligned;
    const int64_t vectors = (x.columns + kVector - 1) / kVector * x.rows;
    constexpr int64_t kShare = kUnscaledThreads * kUnscaledVectors;
    require(vectors <= std::numeric_limits<int32_t>::max() - kShare,
            std::string(operation) + ": the matrix is too large for one launch");
    with_way(way, [&](auto chosen) {
        launch(operation, values_kernel<Codec, T, decltype(chosen)::value>,
               batch_grid((vectors + kShare - 1) / kShare, x.batch, operation), dim3(kUnscaledThreads), stream, layout,
               tiling, static_cast<uint32_t>(vectors));
    });
}

template <class Codec>
void dequantize_scaled(const Scaled& layout, Type type, uintptr_t stream, const char* operation) {
    if (type == Type::kBFloat16)
        dequantize_as<Codec, BFloat16>(layout, stream, operation);
    else if (type == Type::kFloat16)
        dequantize_as<Codec, Float16>(layout, stream, operation);
    else
        dequantize_as<Codec, float>(layout, stream, operation);
}

}  // namespace lrq::cuda
