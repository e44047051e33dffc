// Where the threads of a kernel that quantizes to NVFP4 work.
#pragma once

#include "../nvfp4.h"
#include "block16.h"
#include "vector.h"

namespace lrq::cuda {

constexpr int kSpanThreads = 128;
// Tiles of scales that the 32 blocks of a warp cover.
constexpr int kSpanTiles = kWarpSize / nvfp4::kTileColumns;

// Where a thread works in its matrix. A warp takes 32 neighbouring blocks of a row, a thread kRows rows with all of
// their loads in flight, and the four quarters of a part the rows r, r + 32, r + 64 and r + 96: together 16
// neighbouring bytes of the swizzled scales. Four warps take a quarter each, or one warp one after the other. Parts are
// numbered from tile row to tile row.
template <int kRows>
struct Span {
    static constexpr uint32_t kShares = 32 / kRows;
    uint32_t span, share, tile_row, lane, quarter, block;
    int64_t first_row;
    // Rows of this thread that hold weights, and rows that hold codes.
    int full, coded;

    __device__ __forceinline__ Span(const nvfp4::Layout& layout, const Divisor& spans, uint32_t part, uint32_t taken)
        : quarter(taken) {
        const uint32_t above = spans.quotient(part);
        span = spans.remainder(part, above), share = above % kShares, tile_row = above / kShares;
        lane = threadIdx.x % kWarpSize;
        block = span * kWarpSize + lane;
        first_row = int64_t{tile_row} * nvfp4::kTileRows + quarter * 32 + share * kRows;
        full = block < layout.blocks ? static_cast<int>(min(layout.x.rows - first_row, int64_t{kRows})) : 0;
        coded = block < layout.blocks ? static_cast<int>(min(layout.code_rows - first_row, int64_t{kRows})) : 0;
    }

    // Of the first row, in this thread's block.
    template <class T>
    __device__ __forceinline__ const T* weights(const nvfp4::Layout& layout, int64_t matrix) const {
        return static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride + first_row * layout.x.row_stride +
               int64_t{block} * nvfp4::kBlock;
    }

    // `kWhole`: every block starts at a multiple of 16 bytes and lies inside the matrix.
    template <bool kWhole, class T>
    __device__ __forceinline__ void load(const nvfp4::Layout& layout, int64_t matrix,
                                         Block16<T> (&blocks)[kRows]) const {
        const T* row =
            static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride + first_row * layout.x.row_stride;
        if constexpr (kWhole) row += int64_t{block} * nvfp4::kBlock;
#pragma unroll
        for (int i = 0; i < kRows; ++i, row += layout.x.row_stride)
            if (i < full) {
                if constexpr (kWhole)
                    blocks[i].load(row);
                else
                    blocks[i].load_part(row, int64_t{block} * nvfp4::kBlock, layout.x.columns);
            }
    }

    // `quantize(block, scale)` sets the scale and returns the codes.
    template <class T, class Quantize>
    __device__ __forceinline__ void store(const nvfp4::Layout& layout, int64_t matrix,
                                          const Block16<T> (&blocks)[kRows], uint4 (&staged)[kSpanTiles][kRows],
                                          const Quantize& quantize) const {
        uint2* codes = codes_of(layout, matrix);
        uint8_t* const own = reinterpret_cast<uint8_t*>(&staged[lane / 4][0]) + quarter * 4 + lane % 4;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            uint32_t scale = 0;
            if (i < full)
                *codes = quantize(blocks[i], scale);
            else if (i < coded)
                *codes = make_uint2(0, 0);
            own[i * sizeof(uint4)] = static_cast<uint8_t>(scale);
            codes += layout.blocks;
        }
        __syncthreads();
        const int64_t tile = int64_t{span} * kSpanTiles + threadIdx.x / kRows;
        if (threadIdx.x < kSpanTiles * kRows && tile < layout.column_tiles)
            scales_of(layout, matrix, tile)[threadIdx.x % kRows] = staged[threadIdx.x / kRows][threadIdx.x % kRows];
    }

    // Of the first row, in this thread's block.
    __device__ __forceinline__ uint2* codes_of(const nvfp4::Layout& layout, int64_t matrix) const {
        return reinterpret_cast<uint2*>(layout.codes) + (matrix * layout.code_rows + first_row) * layout.blocks + block;
    }

    // What the part has of a tile of scales: 16 bytes for each of its rows.
    __device__ __forceinline__ uint4* scales_of(const nvfp4::Layout& layout, int64_t matrix, int64_t tile) const {
        const int64_t place = (matrix * layout.row_tiles + tile_row) * layout.column_tiles + tile;
        return reinterpret_cast<uint4*>(layout.scales + place * nvfp4::kTile) + share * kRows;
    }
};

}  // namespace lrq::cuda
