// How threads share a tile of scales: neighbours along a row, and each takes the 4 rows whose scales are neighbours.
#pragma once

#include <algorithm>

#include "../swizzle.h"
#include "launch.h"
#include "load.h"

namespace lrq::cuda {

constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 65535;

// `kLanes` threads cover a row of a tile, `kShares` thread blocks a tile.
template <int kThreads, int kLanes>
struct Place {
    static constexpr int kRowsAtOnce = kThreads / kLanes;
    static constexpr int kShares = kTileStep / kRowsAtOnce;
    static_assert(kThreads % kLanes == 0 && kTileStep % kRowsAtOnce == 0);

    __device__ __forceinline__ explicit Place(int64_t column_tiles) : tile(blockIdx.x / kShares) {
        const uint32_t columns = static_cast<uint32_t>(column_tiles);
        const uint32_t tile_row = tile / columns;
        tile_column = tile - tile_row * columns;
        lane = threadIdx.x % kLanes;
        step_row = blockIdx.x % kShares * kRowsAtOnce + threadIdx.x / kLanes;
        first_row = int64_t{tile_row} * kTileRows + step_row;
    }

    // Of the 16 scales of this thread's rows.
    __device__ __forceinline__ int64_t scales(int64_t matrix, int64_t tiles) const {
        return (matrix * tiles + tile) * kTile + step_row * kTileVector;
    }

    static dim3 grid(int64_t tiles, int64_t batch, const char* operation) {
        require(tiles * kShares <= kMaxGridX, std::string(operation) + ": the matrix is too large for one launch");
        return dim3(static_cast<unsigned>(tiles * kShares), static_cast<unsigned>(std::min(batch, kMaxGridY)));
    }

    uint32_t tile, tile_column, lane, step_row;
    int64_t first_row;
};

// kSize neighbouring columns of each of the 4 rows; what lies beyond the matrix is zero. All loads are in flight at
// once wherever the 4 rows are whole.
template <int kSize, class T>
__device__ __forceinline__ void load_tile_rows(const T* x, int64_t row_stride, int64_t first_row, int64_t rows,
                                               int64_t first, int64_t columns, bool aligned,
                                               float (&values)[kTileSteps][kSize]) {
    constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);
    constexpr int kPerLoad = 4 * kPerWord;
    constexpr int kLoads = kSize / kPerLoad;
    const T* const corner = x + first_row * row_stride + first;
    if (aligned && first + kSize <= columns && first_row + (kTileSteps - 1) * kTileStep < rows) {
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
    for (int j = 0; j < kTileSteps; ++j) {
        const bool present = first_row + j * kTileStep < rows;
        load_block(x + (first_row + j * kTileStep) * row_stride, first, present ? columns : 0, aligned, values[j]);
    }
}

}  // namespace lrq::cuda
