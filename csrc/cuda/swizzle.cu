#include "../swizzle.h"

#include <algorithm>

#include "../kernels.h"
#include "../matrix.h"
#include "launch.h"
#include "tile.h"
#include "vector.h"

namespace lrq::cuda {
namespace {

constexpr int kThreads = 256;
// Neighbours take tiles side by side: 8 columns of tiles read whole sectors of a row.
constexpr int kTilesAside = 8;
static_assert(kTileStep * kTilesAside == kThreads);

// `linear` has the strides of `matrix`; tiles are contiguous.
struct Layout {
    Matrix linear;
    uint8_t* tiles;
    int64_t row_tiles, column_tiles;
};

template <bool kAligned>
__device__ __forceinline__ uint32_t load_word(const uint8_t* source, int64_t present) {
    if constexpr (kAligned) return __ldg(reinterpret_cast<const uint32_t*>(source));
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kTileColumns; ++i)
        if (i < present) word |= uint32_t{__ldg(source + i)} << 8 * i;
    return word;
}

template <bool kAligned>
__device__ __forceinline__ void store_word(uint8_t* out, uint32_t word, int64_t present) {
    if constexpr (kAligned) {
        *reinterpret_cast<uint32_t*>(out) = word;
    } else {
#pragma unroll
        for (int i = 0; i < kTileColumns; ++i)
            if (i < present) out[i] = static_cast<uint8_t>(word >> 8 * i);
    }
}

// A thread takes the 4 rows by 4 columns that are 16 bytes of a tile. kAligned: the 4 columns are there, in a word.
template <bool kForth, bool kAligned>
__global__ void __launch_bounds__(kThreads) swizzle_kernel(Layout layout) {
    await_predecessor();
    const int64_t column_tile = int64_t{blockIdx.x} * kTilesAside + threadIdx.x % kTilesAside;
    if (column_tile >= layout.column_tiles) return;
    const int64_t step_row = threadIdx.x / kTilesAside;
    const int64_t column = column_tile * kTileColumns;
    const Matrix& x = layout.linear;
    uint8_t* const linear = static_cast<uint8_t*>(const_cast<void*>(x.data));
    for (int64_t matrix = blockIdx.z; matrix < x.batch; matrix += gridDim.z)
        for (int64_t row_tile = blockIdx.y; row_tile < layout.row_tiles; row_tile += gridDim.y) {
            const int64_t tile = (matrix * layout.row_tiles + row_tile) * layout.column_tiles + column_tile;
            uint8_t* const vector = layout.tiles + tile * kTile + step_row * kTileVector;
            uint32_t words[kTileSteps] = {};
            if constexpr (!kForth) load_bytes<kTileVector>(vector, kAligned, words);
#pragma unroll
            for (int j = 0; j < kTileSteps; ++j) {
                const int64_t row = row_tile * kTileRows + j * kTileStep + step_row;
                if (row >= x.rows) continue;
                uint8_t* const place = linear + matrix * x.batch_stride + row * x.row_stride + column;
                if constexpr (kForth)
                    words[j] = load_word<kAligned>(place, x.columns - column);
                else
                    store_word<kAligned>(place, words[j], x.columns - column);
            }
            if constexpr (kForth)
                *reinterpret_cast<uint4*>(vector) = make_uint4(words[0], words[1], words[2], words[3]);
        }
}

template <bool kForth>
void run(const Tensor& linear, const Tensor& tiles, uintptr_t stream, const char* operation) {
    Layout layout{};
    layout.linear = bytes_of(linear, operation);
    layout.tiles = static_cast<uint8_t*>(tiles.data);
    layout.row_tiles = tiles.size(2) / kTileRows;
    layout.column_tiles = tiles.size(1) / kTileColumns;
    const Matrix& x = layout.linear;
    require(layout.row_tiles * kTileRows >= x.rows && layout.column_tiles * kTileColumns >= x.columns,
            std::string(operation) + ": the tiles are too few");
    const bool tiles_aligned = is_multiple(tiles.data, sizeof(uint4));
    require(tiles_aligned || !kForth, std::string(operation) + ": the output must start at 16 bytes");
    const bool aligned = tiles_aligned && is_multiple(x.data, sizeof(uint32_t)) &&
                         x.row_stride % sizeof(uint32_t) == 0 && x.batch_stride % sizeof(uint32_t) == 0 &&
                         x.columns % kTileColumns == 0;
    const dim3 grid(static_cast<unsigned>((layout.column_tiles + kTilesAside - 1) / kTilesAside),
                    static_cast<unsigned>(std::min(layout.row_tiles, kMaxGridY)),
                    static_cast<unsigned>(std::min(x.batch, kMaxGridY)));
    const DeviceGuard guard(linear.device_index, operation);
    launch(operation, aligned ? swizzle_kernel<kForth, true> : swizzle_kernel<kForth, false>, grid, dim3(kThreads),
           stream, layout);
}

}  // namespace

void swizzle_scales(const Tensor& scales, const Tensor& out, uintptr_t stream) {
    run<true>(scales, out, stream, "swizzle_scales");
}

void unswizzle_scales(const Tensor& swizzled, const Tensor& out, uintptr_t stream) {
    run<false>(out, swizzled, stream, "unswizzle_scales");
}

}  // namespace lrq::cuda
