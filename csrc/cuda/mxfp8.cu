#include "../mxfp8.h"

#include "../kernels.h"
#include "expand.h"
#include "launch.h"
#include "load.h"
#include "tile.h"

namespace lrq::cuda {
namespace {

using mxfp8::kBlock;
using mxfp8::Layout;

constexpr char kOperation[] = "quantize_mxfp8";

template <int kSize>
__device__ __forceinline__ uint32_t encode_word(const float (&values)[kSize], int first, float inverse) {
    const uint32_t low = encode_e4m3x2(values[first + 1] * inverse, values[first] * inverse);
    const uint32_t high = encode_e4m3x2(values[first + 3] * inverse, values[first + 2] * inverse);
    return low | high << 16;
}

// Four threads share a block, so that loads and stores of neighbours touch; each of the four writes the scale of one of
// the four rows, so that 16 neighbours write 16 bytes.
constexpr int kShare = 8;
constexpr int kSharers = kBlock / kShare;
constexpr int kThreads = 256;
using Shared = Place<kThreads, kTileColumns * kSharers>;
static_assert(kSharers == kTileSteps);

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Layout layout, Divisor spans, bool aligned) {
    await_predecessor();
    const Shared place(layout.column_tiles, spans);
    const int64_t columns = layout.blocks * kBlock;
    const int64_t first = int64_t{place.tile_column} * (kTileColumns * kBlock) + place.lane * kShare;
    const uint32_t sharer = place.lane % kSharers;
    const int64_t row_stride = layout.x.row_stride;
    const int rows_left = place.rows_left(layout.x.rows), columns_left = place.columns_left(layout.x.columns, first);
    const int code_rows_left = first < columns ? place.rows_left(layout.code_rows) : 0;
    const int64_t matrix = matrix_of_block();
    if (matrix >= layout.x.batch) return;

    const T* const corner =
        static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride + place.first_row() * row_stride + first;
    float values[kTileSteps][kShare];
    load_tile_rows(corner, row_stride, rows_left, columns_left, aligned, values);
    uint8_t* const codes = layout.codes + (matrix * layout.code_rows + place.first_row()) * columns + first;
    uint32_t exponents[kTileSteps], own = 0;
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j) {
        float most = largest(values[j]);
        most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
        exponents[j] = mxfp8::ruled_exponent(most);
        own = sharer == j ? exponents[j] : own;
    }
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j) {
        // A block without an exponent has codes 0, whatever the signs of the weights.
        const uint32_t kept = exponents[j] ? 0xffffffffu : 0u;
        const float inverse = from_bits((mxfp8::kLastExponent - exponents[j]) << 23);
        const uint2 word =
            make_uint2(encode_word(values[j], 0, inverse) & kept, encode_word(values[j], 4, inverse) & kept);
        if (j * kTileStep < code_rows_left) *reinterpret_cast<uint2*>(codes + j * kTileStep * columns) = word;
    }
    const int64_t scales = place.scales(matrix, layout.row_tiles * layout.column_tiles);
    layout.scales[scales + sharer * kTileColumns + place.lane / kSharers] = static_cast<uint8_t>(own);
}

// The search keeps a block in one thread: its sums then need no other thread. Neighbours write neighbouring scales.
constexpr int kSearchThreads = 128;
constexpr int kSearchShares = kTile / kSearchThreads;
// Thread blocks on a multiprocessor, as registers suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSearchResident = 4;
#else
constexpr int kSearchResident = 6;
#endif

template <class T>
__global__ void __launch_bounds__(kSearchThreads, kSearchResident)
    search_kernel(Layout layout, Divisor columns, bool aligned, float coherence) {
    await_predecessor();
    const uint32_t tile = blockIdx.x / kSearchShares;
    const uint32_t tile_row = columns.quotient(tile);
    const uint32_t place = blockIdx.x % kSearchShares * kSearchThreads + threadIdx.x;
    const int64_t row =
        int64_t{tile_row} * kTileRows + place / kTileColumns % kTileSteps * kTileStep + place / kTileVector;
    const int64_t b = int64_t{columns.remainder(tile, tile_row)} * kTileColumns + place % kTileColumns;
    const int64_t tiles = layout.row_tiles * layout.column_tiles;
    const int64_t matrix = matrix_of_block();
    if (matrix >= layout.x.batch) return;

    uint32_t exponent = 0;
    if (row < layout.code_rows && b < layout.blocks) {
        uint4 codes[2] = {};
        if (row < layout.x.rows) {
            const int64_t offset = matrix * layout.x.batch_stride + row * layout.x.row_stride;
            float block[kBlock];
            load_block(static_cast<const T*>(layout.x.data) + offset, b * kBlock, layout.x.columns, aligned, block);
            exponent = mxfp8::best_exponent(block, largest(block), coherence);
            if (exponent) {
                const float inverse = mxfp8::reciprocal(exponent);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    codes[i] =
                        make_uint4(encode_word(block, 16 * i, inverse), encode_word(block, 16 * i + 4, inverse),
                                   encode_word(block, 16 * i + 8, inverse), encode_word(block, 16 * i + 12, inverse));
            }
        }
        uint4* const out =
            reinterpret_cast<uint4*>(layout.codes) + ((matrix * layout.code_rows + row) * layout.blocks + b) * 2;
        out[0] = codes[0];
        out[1] = codes[1];
    }
    layout.scales[(matrix * tiles + tile) * kTile + place] = static_cast<uint8_t>(exponent);
}

template <class T>
void run(const Layout& layout, std::optional<double> coherence, uintptr_t stream) {
    const bool aligned = is_aligned<T>(layout.x);
    if (!coherence) {
        launch(kOperation, quantize_kernel<T>,
               Shared::grid(layout.row_tiles, layout.column_tiles, layout.x.batch, kOperation), dim3(kThreads), stream,
               layout, Shared::spans(layout.column_tiles, kOperation), aligned);
        return;
    }
    using Alone = Place<kSearchThreads, kTileColumns * kTileSteps>;
    static_assert(Alone::kShares == kSearchShares);
    launch(kOperation, search_kernel<T>, Alone::grid(layout.row_tiles, layout.column_tiles, layout.x.batch, kOperation),
           dim3(kSearchThreads), stream, layout, Alone::spans(layout.column_tiles, kOperation), aligned,
           static_cast<float>(*coherence));
}

struct Mxfp8 {
    static constexpr int kBlock = mxfp8::kBlock;
    static constexpr int kBits = 8;
    static __device__ __forceinline__ float scale(uint32_t exponent, float) { return decode_e8m0(exponent); }

    template <int kCount>
    static __device__ __forceinline__ void decode(const uint32_t* words, float (&values)[kCount]) {
#pragma unroll
        for (int i = 0; i < kCount; i += 2) decode_e4m3x2(words[i / 4] >> i % 4 * 8, values[i + 1], values[i]);
    }
};

}  // namespace

void quantize_mxfp8(const Tensor& x, std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    uintptr_t stream) {
    const Layout layout = mxfp8::layout_of(x, codes, block_scales);
    const DeviceGuard guard(x.device_index, kOperation);
    if (x.type == Type::kBFloat16)
        run<BFloat16>(layout, coherence, stream);
    else if (x.type == Type::kFloat16)
        run<Float16>(layout, coherence, stream);
    else
        run<float>(layout, coherence, stream);
}

void dequantize_mxfp8(const Tensor& codes, const Tensor& block_scales, const Tensor& out, uintptr_t stream) {
    constexpr char kExpand[] = "dequantize_mxfp8";
    const DeviceGuard guard(codes.device_index, kExpand);
    expand<Mxfp8>(expansion_of(codes, block_scales, nullptr, out, 1, kBlock, kExpand), stream, kExpand);
}

}  // namespace lrq::cuda
