// Values to codes of one byte, 8 columns of a thread at a time. `Codec` holds scale(amax, of_tensor), a Quotient and
// pack<bounded>(a, b, c, d), which gives a word of codes, that of `a` lowest; bounded: the scale is that of the amax,
// so that no value exceeds the largest code by more than rounding.
#pragma once

#include "../quotient.h"
#include "../scaling.h"
#include "amax.h"
#include "vector.h"

namespace lrq::cuda {

constexpr int kScaledThreads = 128;
// So many thread blocks on a multiprocessor, registers permitting.
constexpr int kScaledBlocks = 8;
// As many vectors as 64 bytes.
template <class T>
constexpr int kMatrixVectors = 64 / (kVector * sizeof(T));

struct Codes {
    uint32_t words[2];
};

template <class Codec, bool kBounded, class T>
__device__ __forceinline__ Codes encode(const Vector<T>& vector, const typename Codec::Quotient& quotient,
                                        float scale) {
    float values[kVector];
    if (quotient.safe()) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = quotient.of(vector[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = divide(vector[i], scale);
    }
    return {Codec::template pack<kBounded>(values[0], values[1], values[2], values[3]),
            Codec::template pack<kBounded>(values[4], values[5], values[6], values[7])};
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

// The vectors of a thread: neighbours take neighbours, `kHeld` times.
template <class T>
struct Share {
    static constexpr int kHeld = kMatrixVectors<T>;
    Vector<T> vectors[kHeld];

    __device__ __forceinline__ uint32_t most() const {
        uint32_t most = 0;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) most = most_of(vectors[j], most);
        return __float_as_uint(widen_most<T>(most));
    }
};

// Matrices of one scale each, their vectors numbered from row to row.
struct Whole {
    Scaled of;
    Divisor across;
    uint32_t vectors;

    // Beyond the last vector a thread holds that one again: loads without branches follow each other.
    template <Way kWay, class T>
    __device__ __forceinline__ void load(int64_t matrix, uint32_t share, Share<T>& held) const {
        const T* const source = static_cast<const T*>(of.x.data) + matrix * of.x.batch_stride;
#pragma unroll
        for (int j = 0; j < Share<T>::kHeld; ++j) {
            const uint32_t index = share * (kScaledThreads * Share<T>::kHeld) + j * kScaledThreads + threadIdx.x;
            const Spot spot = spot_of<kWay>(min(index, vectors - 1), across, of.x.row_stride, of.x.columns);
            held.vectors[j] = load_vector<kWay != Way::kAny>(source + spot.offset, spot.left);
        }
    }

    template <class Codec, bool kBounded, Way kWay, class T>
    __device__ __forceinline__ void store(int64_t matrix, uint32_t share, const Share<T>& held, float scale) const {
        const typename Codec::Quotient quotient(scale, __uint_as_float(held.most()));
        uint8_t* const out = static_cast<uint8_t*>(of.out) + matrix * of.x.rows * of.x.columns;
#pragma unroll
        for (int j = 0; j < Share<T>::kHeld; ++j) {
            const uint32_t index = share * (kScaledThreads * Share<T>::kHeld) + j * kScaledThreads + threadIdx.x;
            const Spot spot = spot_of<kWay>(index, across, of.x.columns, of.x.columns);
            if (index < vectors)
                store_codes<kWay != Way::kAny>(out + spot.offset,
                                               encode<Codec, kBounded>(held.vectors[j], quotient, scale), spot.left);
        }
    }
};

// The scale is given, or comes from the amax. The pass that found it left the end of the matrix in L2: this one starts
// there.
template <class Codec, class T, Way kWay>
__global__ void __launch_bounds__(kScaledThreads, kScaledBlocks) matrix_kernel(Whole layout, Found found) {
    await_predecessor();
    const int64_t matrix = batch_index();
    if (matrix >= layout.of.x.batch) return;
    const float* const given = layout.of.given;
    const uint32_t share = given ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    Share<T> held;
    layout.load<kWay>(matrix, share, held);
    const float scale = given ? given[matrix * layout.of.given_stride] : Codec::scale(found.of(matrix), true);
    if (blockIdx.x == 0 && threadIdx.x == 0) layout.of.scales[matrix] = scale;
    if (given)
        layout.store<Codec, false, kWay>(matrix, share, held, scale);
    else
        layout.store<Codec, true, kWay>(matrix, share, held, scale);
}

// A thread block, or a warp, for each tile, a row or a square block, which it holds; of a tile too large for that it
// reads all but the last vectors again.
template <class Codec, class T, int kHeld, int kThreads, Way kWay, int kTogether>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(Scaled layout, Divisor tiles_across, Divisor across, uint32_t tiles, uint32_t vectors) {
    await_predecessor();
    const int64_t matrix = batch_index();
    const uint32_t tile = blockIdx.x * kTogether + threadIdx.y;
    if (matrix >= layout.x.batch || tile >= tiles) return;
    const uint32_t down = tiles_across.quotient(tile);
    const int64_t first_row = down * layout.tile_rows;
    const int64_t first_column = tiles_across.remainder(tile, down) * layout.tile_columns;
    const T* const source = static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride +
                            first_row * layout.x.row_stride + first_column;
    uint8_t* const out =
        static_cast<uint8_t*>(layout.out) + (matrix * layout.x.rows + first_row) * layout.x.columns + first_column;
    const uint32_t step = blockDim.x * kHeld;
    const auto load = [&](uint32_t first, Vector<T>(&held)[kHeld]) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const uint32_t index = min(first + j * blockDim.x + threadIdx.x, vectors - 1);
            const Spot spot = spot_of<kWay>(index, across, layout.x.row_stride, layout.tile_columns);
            held[j] = load_vector<kWay != Way::kAny>(source + spot.offset, spot.left);
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
    const float amax = __uint_as_float(tile_largest<kTogether>(__float_as_uint(widen_most<T>(most))));
    const float scale = Codec::scale(amax, false);
    if (threadIdx.x == 0) layout.scales[matrix * tiles + tile] = scale;
    const typename Codec::Quotient quotient(scale, amax);
    for (;; first -= step) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const uint32_t index = first + j * blockDim.x + threadIdx.x;
            const Spot spot = spot_of<kWay>(index, across, layout.x.columns, layout.tile_columns);
            if (index < vectors)
                store_codes<kWay != Way::kAny>(out + spot.offset, encode<Codec, true>(held[j], quotient, scale),
                                               spot.left);
        }
        if (first == 0) break;
        load(first - step, held);
    }
}

inline int64_t vectors_in(int64_t columns) { return (columns + kVector - 1) / kVector; }

template <class Codec, class T, int kHeld, int kThreads, int kTogether>
void launch_tiles(const Scaled& layout, bool aligned, uintptr_t stream, const char* operation) {
    const int64_t across = vectors_in(layout.tile_columns), vectors = across * layout.tile_rows;
    const int64_t tiles = layout.tiles_down() * layout.tiles_across();
    require(
        vectors <= std::numeric_limits<int32_t>::max() / 2 && tiles <= std::numeric_limits<int32_t>::max() - kTogether,
        std::string(operation) + ": the matrix is too large for one launch");
    Way way = aligned ? way_of<T>(layout.x) : Way::kAny;
    // Of a row each tile is flat, of a block only one as wide as the matrix.
    if (way != Way::kAny)
        way = layout.tile_rows == 1 || (way == Way::kFlat && layout.tiles_across() == 1) ? Way::kFlat : Way::kAligned;
    with_way(way, [&](auto chosen) {
        constexpr Way kWay = decltype(chosen)::value;
        // More vectors that lie anywhere spill.
        constexpr int kHere = kWay == Way::kAny ? std::min(kHeld, 4) : kHeld, kMost = kThreads * (kHeld / kHere);
        const int64_t wanted = (vectors + kHere * kWarpSize - 1) / (kHere * kWarpSize) * kWarpSize;
        const auto threads = static_cast<unsigned>(std::min<int64_t>(wanted, kMost / kTogether));
        launch(operation, tile_kernel<Codec, T, kHere, kMost, kWay, kTogether>,
               batch_grid((tiles + kTogether - 1) / kTogether, layout.x.batch, operation), dim3(threads, kTogether),
               stream, layout, Divisor(layout.tiles_across(), operation), Divisor(across, operation),
               static_cast<uint32_t>(tiles), static_cast<uint32_t>(vectors));
    });
}

template <class Codec, class T>
void quantize_whole(const Scaled& layout, bool aligned, const std::optional<Tensor>& room, uintptr_t stream,
                    const char* operation) {
    const Matrix& x = layout.x;
    require(layout.given || room, std::string(operation) + ": either a given scale or room for the amax");
    const int64_t vectors = vectors_in(x.columns) * x.rows;
    constexpr int64_t kShare = kScaledThreads * kMatrixVectors<T>;
    require(vectors <= std::numeric_limits<int32_t>::max() - kShare,
            std::string(operation) + ": the matrix is too large for one launch");
    const Whole whole{layout, Divisor(vectors_in(x.columns), operation), static_cast<uint32_t>(vectors)};
    const int64_t shares = (vectors + kShare - 1) / kShare;
    const Found found = layout.given ? Found{} : find_amax<T>(x, *room, stream, operation);
    with_way(aligned ? way_of<T>(x) : Way::kAny, [&](auto way) {
        launch(operation, matrix_kernel<Codec, T, decltype(way)::value>, batch_grid(shares, x.batch, operation),
               dim3(kScaledThreads), stream, whole, found);
    });
}

template <class Codec, class T>
void quantize_as(const Scaled& layout, const std::optional<Tensor>& room, uintptr_t stream, const char* operation) {
    const bool aligned = is_aligned_throughout<T>(layout.x) && layout.tile_columns % kVector == 0 &&
                         is_multiple(layout.out, sizeof(uint2));
    // A block of 128 x 128 fits into the registers of as few threads as hold 128 bytes each.
    constexpr int kOfBlock = 128 / (kVector * sizeof(T)), kOfRow = 4;
    if (layout.of_tensor)
        quantize_whole<Codec, T>(layout, aligned, room, stream, operation);
    else if (layout.tile_rows == 1 && vectors_in(layout.tile_columns) <= kOfRow * kWarpSize)
        launch_tiles<Codec, T, kOfRow, kWarpsTogether * kWarpSize, kWarpsTogether>(layout, aligned, stream, operation);
    else if (layout.tile_rows == 1)
        launch_tiles<Codec, T, kOfRow, 1024, 1>(layout, aligned, stream, operation);
    else
        launch_tiles<Codec, T, kOfBlock, 2048 / kOfBlock, 1>(layout, aligned, stream, operation);
}

// `room` holds a float32 for every matrix and, for one launch to do, every thread block; absent unless a matrix has one
// scale that is not given.
template <class Codec>
void quantize_scaled(const Scaled& layout, const std::optional<Tensor>& room, uintptr_t stream, const char* operation) {
    if (layout.x.type == Type::kBFloat16)
        quantize_as<Codec, BFloat16>(layout, room, stream, operation);
    else if (layout.x.type == Type::kFloat16)
        quantize_as<Codec, Float16>(layout, room, stream, operation);
    else
        quantize_as<Codec, float>(layout, room, stream, operation);
}

}  // namespace lrq::cuda
