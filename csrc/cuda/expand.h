// Codes and block scales to values, 16 bytes of them a store.
#pragma once

#include "../dequantize.h"
#include "../e4m3.h"
#include "../narrow.h"
#include "launch.h"
#include "tile.h"
#include "vector.h"

namespace lrq::cuda {

constexpr int kExpandThreads = 256;

template <class T>
__device__ __forceinline__ void store_vector(T* out, const float (&values)[8]) {
    // An assignment becomes four stores of 4 bytes (nvcc 13).
    __stwb(reinterpret_cast<uint4*>(out),
           make_uint4(narrow_pair(values[1], values[0], T{}), narrow_pair(values[3], values[2], T{}),
                      narrow_pair(values[5], values[4], T{}), narrow_pair(values[7], values[6], T{})));
}

__device__ __forceinline__ void store_vector(float* out, const float (&values)[4]) {
    __stwb(reinterpret_cast<float4*>(out), make_float4(values[0], values[1], values[2], values[3]));
}

template <class Format, class T>
struct Expanding {
    static constexpr int kVector = sizeof(uint4) / sizeof(T);
    static constexpr int kBytes = kVector * Format::kBits / 8;
    static constexpr int kTileWidth = kTileColumns * Format::kBlock;
    // A warp writes neighbouring memory only.
    static constexpr int kLanes = kTileWidth / kVector;
    static constexpr int kAside = kLanes < 32 ? 32 / kLanes : 1;
    // Tiles of a thread: what it takes to find its rows is shared by them.
    static constexpr int kTimes = Format::kBits == 4 ? 2 : 1;
    using Place = cuda::Place<kExpandThreads, kLanes, kAside, kTimes>;
};

// `Format` holds kBlock, kBits (of a code), scale(byte, tensor_scale) and decode(words, values). kAligned: every vector
// is whole, and lies at a multiple of its size.
template <class Format, class T, bool kAligned>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(Expansion layout, Divisor spans) {
    await_predecessor();
    using Shape = Expanding<Format, T>;
    constexpr int kVector = Shape::kVector, kTimes = Shape::kTimes;
    constexpr int kWords = (Shape::kBytes + 3) / 4;
    // Columns from one tile of the thread to its next.
    constexpr int kApart = Shape::kAside * Shape::kTileWidth;
    const typename Shape::Place place(layout.column_tiles, spans);
    const uint32_t within = place.lane * kVector;
    const int64_t first = int64_t{place.tile_column} * Shape::kTileWidth + within;
    const int64_t matrix = matrix_of_block();
    if (matrix >= layout.batch) return;
    const int rows_left = place.rows_left(layout.rows);
    // As far as this thread looks.
    const int columns_left = static_cast<int>(min(layout.columns - first, int64_t{kTimes * kApart}));
    const int64_t code_offset = (matrix * layout.code_rows + place.first_row()) * layout.row_bytes;
    const uint8_t* const codes = layout.codes + code_offset + first * Format::kBits / 8;
    const uint8_t* const tile_scales = layout.scales + place.scales(matrix, layout.row_tiles * layout.column_tiles);
    uint32_t words[kTimes][kTileSteps][kWords] = {}, scales[kTimes][kTileSteps];
#pragma unroll
    for (int t = 0; t < kTimes; ++t) {
        if (t * kApart >= columns_left) break;
        const uint8_t* row = codes + t * kApart * Format::kBits / 8;
#pragma unroll
        for (int j = 0; j < kTileSteps; ++j, row += kTileStep * layout.row_bytes)
            if (j * kTileStep < rows_left) load_bytes<Shape::kBytes>(row, kAligned, words[t][j]);
        load_bytes<kTileVector>(tile_scales + t * Shape::kAside * kTile, kAligned, scales[t]);
    }
    T* row = static_cast<T*>(layout.out) + (matrix * layout.rows + place.first_row()) * layout.columns + first;
    const float tensor_scale = layout.tensor_scale ? layout.tensor_scale[matrix] : 1.0f;
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j, row += kTileStep * layout.columns) {
        if (j * kTileStep >= rows_left) break;
#pragma unroll
        for (int t = 0; t < kTimes; ++t) {
            if (t * kApart >= columns_left) break;
            const float scale = Format::scale(scales[t][j] >> within / Format::kBlock * 8 & 0xffu, tensor_scale);
            float values[kVector];
            Format::decode(words[t][j], values);
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[i] *= scale;
            if constexpr (kAligned) {
                store_vector(row + t * kApart, values);
            } else {
#pragma unroll
                for (int i = 0; i < kVector; ++i)
                    if (t * kApart + i < columns_left) narrow(values[i], row[t * kApart + i]);
            }
        }
    }
}

template <class Format, class T>
void expand_as(const Expansion& layout, uintptr_t stream, const char* operation) {
    using Shape = Expanding<Format, T>;
    const bool aligned = is_multiple(layout.codes, sizeof(uint4)) && is_multiple(layout.scales, sizeof(uint4)) &&
                         is_multiple(layout.out, sizeof(uint4)) && layout.columns % Shape::kVector == 0;
    const dim3 grid = Shape::Place::grid(layout.row_tiles, layout.column_tiles, layout.batch, operation);
    launch(operation, aligned ? expand_kernel<Format, T, true> : expand_kernel<Format, T, false>, grid,
           dim3(kExpandThreads), stream, layout, Shape::Place::spans(layout.column_tiles, operation));
}

template <class Format>
void expand(const Expansion& layout, uintptr_t stream, const char* operation) {
    if (layout.type == Type::kBFloat16)
        expand_as<Format, BFloat16>(layout, stream, operation);
    else if (layout.type == Type::kFloat16)
        expand_as<Format, Float16>(layout, stream, operation);
    else
        expand_as<Format, float>(layout, stream, operation);
}

}  // namespace lrq::cuda
