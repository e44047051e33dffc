// Values to codes of one byte, 8 columns of a thread at a time. `Codec` holds scale(amax, of_tensor) and pack(a, b, c,
// d), which gives a word of codes, that of `a` lowest.
#pragma once

#include "../quotient.h"
#include "../scaling.h"
#include "amax.h"

namespace lrq::cuda {

constexpr int kScaledThreads = 256;
// So many thread blocks on a multiprocessor, registers permitting.
constexpr int kScaledBlocks = 4;
// As many vectors as 64 bytes.
template <class T>
constexpr int kMatrixVectors = 64 / (kVector * sizeof(T));

struct Codes {
    uint32_t words[2];
};

template <class Codec, class T>
__device__ __forceinline__ Codes encode(const Vector<T>& vector, const Quotient& quotient, float scale) {
    float values[kVector];
    if (quotient.safe()) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = quotient.of(vector[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = divide(vector[i], scale);
    }
    return {Codec::pack(values[0], values[1], values[2], values[3]),
            Codec::pack(values[4], values[5], values[6], values[7])};
}

template <bool kAligned>
__device__ __forceinline__ void store_codes(uint8_t* out, const Codes& codes, int64_t left) {
    if constexpr (kAligned) {
        *reinterpret_cast<uint2*>(out) = make_uint2(codes.words[0], codes.words[1]);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            if (i < left) out[i] = static_cast<uint8_t>(codes.words[i / 4] >> 8 * (i % 4));
    }
}

// One scale for the matrix, given or from the amax. The pass that found the amax left the end of the matrix in L2:
// this one starts there.
template <class Codec, class T, bool kAligned>
__global__ void __launch_bounds__(kScaledThreads, kScaledBlocks)
    matrix_kernel(Scaled layout, Divisor across, uint32_t vectors, const float* amax) {
    constexpr int kHeld = kMatrixVectors<T>;
    const int64_t matrix = batch_index();
    if (matrix >= layout.x.batch) return;
    const uint32_t share = layout.given ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const uint32_t first = share * (kScaledThreads * kHeld) + threadIdx.x;
    const T* const source = static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride;
    Vector<T> held[kHeld];
    uint32_t rows[kHeld], columns[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
        const uint32_t index = first + j * kScaledThreads;
        rows[j] = across.quotient(index);
        columns[j] = across.remainder(index, rows[j]) * kVector;
        if (index < vectors)
            held[j] = load_vector<kAligned>(source + rows[j] * layout.x.row_stride + columns[j],
                                            layout.x.columns - columns[j]);
    }
    const float scale = layout.given ? layout.given[matrix * layout.given_stride] : Codec::scale(amax[matrix], true);
    if (blockIdx.x == 0 && threadIdx.x == 0) layout.scales[matrix] = scale;
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) most = most_of(held[j], most);
    const Quotient quotient(scale, widen_most<T>(most));
    uint8_t* const out = static_cast<uint8_t*>(layout.out) + matrix * layout.x.rows * layout.x.columns;
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
        if (first + j * kScaledThreads < vectors)
            store_codes<kAligned>(out + rows[j] * layout.x.columns + columns[j],
                                  encode<Codec>(held[j], quotient, scale), layout.x.columns - columns[j]);
}

// A thread block for each tile, a row or a square block, which it holds; of a tile too large for that it reads all but
// the last vectors again.
template <class Codec, class T, int kHeld, int kThreads, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(Scaled layout, Divisor tiles_across, Divisor across, uint32_t vectors) {
    const int64_t matrix = batch_index();
    if (matrix >= layout.x.batch) return;
    const uint32_t down = tiles_across.quotient(blockIdx.x);
    const int64_t first_row = down * layout.tile_rows;
    const int64_t first_column = tiles_across.remainder(blockIdx.x, down) * layout.tile_columns;
    const T* const source = static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride +
                            first_row * layout.x.row_stride + first_column;
    uint8_t* const out =
        static_cast<uint8_t*>(layout.out) + (matrix * layout.x.rows + first_row) * layout.x.columns + first_column;
    const uint32_t step = blockDim.x * kHeld;
    const auto load = [&](uint32_t first, Vector<T>(&held)[kHeld]) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const uint32_t index = first + j * blockDim.x + threadIdx.x;
            const uint32_t row = across.quotient(index), column = across.remainder(index, row) * kVector;
            held[j] = index < vectors ? load_vector<kAligned>(source + row * layout.x.row_stride + column,
                                                              layout.tile_columns - column)
                                      : Vector<T>{};
        }
    };

    Vector<T> held[kHeld];
    uint32_t most = 0;
    uint32_t first = 0;
    for (;; first += step) {
        load(first, held);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) most = most_of(held[j], most);
        if (first + step >= vectors) break;
    }
    const float amax = __uint_as_float(block_largest(__float_as_uint(widen_most<T>(most))));
    const float scale = Codec::scale(amax, false);
    if (threadIdx.x == 0) layout.scales[matrix * gridDim.x + blockIdx.x] = scale;
    const Quotient quotient(scale, amax);
    for (;; first -= step) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const uint32_t index = first + j * blockDim.x + threadIdx.x;
            const uint32_t row = across.quotient(index), column = across.remainder(index, row) * kVector;
            if (index < vectors)
                store_codes<kAligned>(out + row * layout.x.columns + column, encode<Codec>(held[j], quotient, scale),
                                      layout.tile_columns - column);
        }
        if (first == 0) break;
        load(first - step, held);
    }
}

inline int64_t vectors_in(int64_t columns) { return (columns + kVector - 1) / kVector; }

template <class Codec, class T, int kHeld, int kThreads>
void launch_tiles(const Scaled& layout, bool aligned, uintptr_t stream, const char* operation) {
    const int64_t across = vectors_in(layout.tile_columns), vectors = across * layout.tile_rows;
    require(vectors <= std::numeric_limits<int32_t>::max() / 2,
            std::string(operation) + ": the matrix is too large for one launch");
    const int64_t wanted = (vectors + kHeld * kWarpSize - 1) / (kHeld * kWarpSize) * kWarpSize;
    const auto threads = static_cast<unsigned>(std::min<int64_t>(wanted, kThreads));
    const auto kernel =
        aligned ? tile_kernel<Codec, T, kHeld, kThreads, true> : tile_kernel<Codec, T, kHeld, kThreads, false>;
    launch(operation, kernel, batch_grid(layout.tiles_down() * layout.tiles_across(), layout.x.batch, operation),
           dim3(threads), stream, layout, Divisor(layout.tiles_across(), operation), Divisor(across, operation),
           static_cast<uint32_t>(vectors));
}

template <class Codec, class T>
void quantize_as(const Scaled& layout, float* amax, uintptr_t stream, const char* operation) {
    const Matrix& x = layout.x;
    const bool aligned =
        is_aligned_throughout<T>(x) && layout.tile_columns % kVector == 0 && is_multiple(layout.out, sizeof(uint2));
    if (!layout.of_tensor) {
        // A block of 128 x 128 fits into the registers of as few threads as hold 128 bytes each.
        constexpr int kOfBlock = 128 / (kVector * sizeof(T));
        if (layout.tile_rows == 1)
            launch_tiles<Codec, T, 4, 1024>(layout, aligned, stream, operation);
        else
            launch_tiles<Codec, T, kOfBlock, 2048 / kOfBlock>(layout, aligned, stream, operation);
        return;
    }
    require(layout.given || amax, std::string(operation) + ": either a given scale or room for the amax");
    if (!layout.given) launch_amax<T>(x, amax, stream, operation);
    const int64_t vectors = vectors_in(x.columns) * x.rows;
    constexpr int64_t kShare = kScaledThreads * kMatrixVectors<T>;
    require(vectors <= std::numeric_limits<int32_t>::max() - kShare,
            std::string(operation) + ": the matrix is too large for one launch");
    launch(operation, aligned ? matrix_kernel<Codec, T, true> : matrix_kernel<Codec, T, false>,
           batch_grid((vectors + kShare - 1) / kShare, x.batch, operation), dim3(kScaledThreads), stream, layout,
           Divisor(vectors_in(x.columns), operation), static_cast<uint32_t>(vectors), amax);
}

// `amax` is a float32 [B] of zeros to work in, absent unless a matrix has one scale that is not given.
template <class Codec>
void quantize_scaled(const Scaled& layout, const std::optional<Tensor>& amax, uintptr_t stream, const char* operation) {
    float* const room = amax ? static_cast<float*>(amax->data) : nullptr;
    if (layout.x.type == Type::kBFloat16)
        quantize_as<Codec, BFloat16>(layout, room, stream, operation);
    else if (layout.x.type == Type::kFloat16)
        quantize_as<Codec, Float16>(layout, room, stream, operation);
    else
        quantize_as<Codec, float>(layout, room, stream, operation);
}

}  // namespace lrq::cuda
