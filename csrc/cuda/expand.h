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
    using Place = cuda::Place<kExpandThreads, kLanes, kAside>;
};

// `Format` holds kBlock, kBits (of a code), scale(byte, tensor_scale) and decode(words, values). kAligned: every vector
// is whole, and lies at a multiple of its size.
template <class Format, class T, bool kAligned>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(Expansion layout, Divisor spans) {
    await_predecessor();
    using Shape = Expanding<Format, T>;
    constexpr int kVector = Shape::kVector;
    constexpr int kWords = (Shape::kBytes + 3) / 4;
    const typename Shape::Place place(layout.column_tiles, spans);
    const uint32_t within = place.lane * kVector;
    const int64_t first = int64_t{place.tile_column} * Shape::kTileWidth + within;
    const int64_t matrix = matrix_of_block();
    if (matrix >= layout.batch || first >= layout.columns) return;
    const int rows_left = place.rows_left(layout.rows), columns_left = place.columns_left(layout.columns, first);
    const uint8_t* codes =
        layout.codes + (matrix * layout.code_rows + place.first_row()) * layout.row_bytes + first * Format::kBits / 8;
    uint32_t words[kTileSteps][kWords] = {};
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j, codes += kTileStep * layout.row_bytes)
        if (j * kTileStep < rows_left) load_bytes<Shape::kBytes>(codes, kAligned, words[j]);
    uint32_t scales[kTileSteps];
    load_bytes<kTileVector>(layout.scales + place.scales(matrix, layout.row_tiles * layout.column_tiles), kAligned,
                            scales);
    T* out = static_cast<T*>(layout.out) + (matrix * layout.rows + place.first_row()) * layout.columns + first;
    const float tensor_scale = layout.tensor_scale ? layout.tensor_scale[matrix] : 1.0f;
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j, out += kTileStep * layout.columns) {
        if (j * kTileStep >= rows_left) break;
        const float scale = Format::scale(scales[j] >> within / Format::kBlock * 8 & 0xffu, tensor_scale);
        float values[kVector];
        Format::decode(words[j], values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] *= scale;
        if constexpr (kAligned) {
            store_vector(out, values);
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i)
                if (i < columns_left) narrow(values[i], out[i]);
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
