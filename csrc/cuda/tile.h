// How threads share a tile of scales: neighbours along a row, and each takes the 4 rows whose scales are neighbours.
#pragma once

#include <algorithm>

#include "../swizzle.h"
#include "launch.h"
#include "load.h"
#include "vector.h"

namespace lrq::cuda {

constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 65535;

// A loop over matrices would have what only its rare branches need computed before it.
__device__ __forceinline__ int64_t matrix_of_block() { return blockIdx.z * int64_t{gridDim.y} + blockIdx.y; }

// `kLanes` threads cover a row of a tile, a thread block the rows of kAside tiles side by side, and `kShares` thread
// blocks such tiles. Where the tiles of a row are no multiple of kAside, there is none at the last places.
template <int kThreads, int kLanes, int kAside = 1>
struct Place {
    static constexpr int kRowsAtOnce = kThreads / (kLanes * kAside);
    static constexpr int kShares = kTileStep / kRowsAtOnce;
    static_assert(kThreads % (kLanes * kAside) == 0 && kTileStep % kRowsAtOnce == 0);

    __device__ __forceinline__ Place(int64_t column_tiles, const Divisor& spans) {
        const uint32_t columns = static_cast<uint32_t>(column_tiles), part = blockIdx.x / kShares;
        tile_row = spans.quotient(part);
        tile_column = spans.remainder(part, tile_row) * kAside + threadIdx.x / kLanes % kAside;
        tile = int64_t{tile_row} * columns + tile_column;
        lane = threadIdx.x % kLanes;
        step_row = blockIdx.x % kShares * kRowsAtOnce + threadIdx.x / (kLanes * kAside);
    }

    __device__ __forceinline__ int64_t first_row() const { return int64_t{tile_row} * kTileRows + step_row; }

    // How many rows or columns the matrix goes on from the first of this thread; one tile's worth at most.
    __device__ __forceinline__ int rows_left(int64_t rows) const {
        return static_cast<int>(min(rows - first_row(), int64_t{kTileRows}));
    }
    static __device__ __forceinline__ int columns_left(int64_t columns, int64_t first) {
        return static_cast<int>(min(columns - first, int64_t{kTileRows}));
    }

    // Of the 16 scales of this thread's rows.
    __device__ __forceinline__ int64_t scales(int64_t matrix, int64_t tiles) const {
        return (matrix * tiles + tile) * kTile + step_row * kTileVector;
    }

    // Of a row of tiles.
    static Divisor spans(int64_t column_tiles, const char* operation) {
        return Divisor(std::max<int64_t>((column_tiles + kAside - 1) / kAside, 1), operation);
    }

    static dim3 grid(int64_t row_tiles, int64_t column_tiles, int64_t batch, const char* operation) {
        const int64_t tiles = row_tiles * ((column_tiles + kAside - 1) / kAside);
        require(tiles * kShares <= kMaxGridX, std::string(operation) + ": the matrix is too large for one launch");
        const int64_t along_y = std::min(batch, kMaxGridY);
        return dim3(static_cast<unsigned>(tiles * kShares), static_cast<unsigned>(along_y),
                    static_cast<unsigned>((batch + along_y - 1) / along_y));
    }

    int64_t tile;
    uint32_t tile_row, tile_column, lane, step_row;
};

template <int kBytes>
__device__ __forceinline__ void load_bytes(const uint8_t* source, bool aligned, uint32_t (&words)[(kBytes + 3) / 4]) {
    if (!aligned) {
#pragma unroll
        for (int i = 0; i < (kBytes + 3) / 4; ++i) words[i] = 0;
#pragma unroll
        for (int i = 0; i < kBytes; ++i) words[i / 4] |= uint32_t{__ldg(source + i)} << 8 * (i % 4);
    } else if constexpr (kBytes == 16) {
        const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(source));
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else if constexpr (kBytes == 8) {
        const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(source));
        words[0] = loaded.x, words[1] = loaded.y;
    } else if constexpr (kBytes == 4) {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(source));
    } else {
        words[0] = __ldg(reinterpret_cast<const uint16_t*>(source));
    }
}

// kSize neighbouring columns of each of the 4 rows from `corner` on; what lies beyond the matrix is zero. All loads are
// in flight at once wherever the 4 rows are whole.
template <int kSize, class T>
__device__ __forceinline__ void load_tile_rows(const T* corner, int64_t row_stride, int rows_left, int columns_left,
                                               bool aligned, float (&values)[kTileSteps][kSize]) {
    constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);
    constexpr int kPerLoad = 4 * kPerWord;
    constexpr int kLoads = kSize / kPerLoad;
    if (aligned && kSize <= columns_left && (kTileSteps - 1) * kTileStep < rows_left) {
        uint4 raw[kTileSteps][kLoads];
#pragma unroll
        for (int j = 0; j < kTileSteps; ++j)
#pragma unroll
            for (int i = 0; i < kLoads; ++i)
                raw[j][i] = __ldg(reinterpret_cast<const uint4*>(corner + j * kTileStep * row_stride) + i);
#pragma unroll
        for (int j = 0; j < kTileSteps; ++j)
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                float* const out = values[j] + i * kPerLoad;
                unpack(raw[j][i].x, out, T{});
                unpack(raw[j][i].y, out + kPerWord, T{});
                unpack(raw[j][i].z, out + kPerWord * 2, T{});
                unpack(raw[j][i].w, out + kPerWord * 3, T{});
            }
        return;
    }
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j)
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const bool present = j * kTileStep < rows_left && i < columns_left;
            values[j][i] = present ? widen(corner[j * kTileStep * row_stride + i]) : 0.0f;
        }
}

}  // namespace lrq::cuda
