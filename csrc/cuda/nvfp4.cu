#include "../nvfp4.h"

#include <algorithm>

#include "../kernels.h"
#include "../layout.h"
#include "amax.h"
#include "block16.h"
#include "expand.h"
#include "launch.h"
#include "load.h"

namespace lrq::cuda {
namespace {

using nvfp4::kBlock;
using nvfp4::kTile;
using nvfp4::Layout;

constexpr char kOperation[] = "quantize_nvfp4";
constexpr int kThreads = 128;
// Tiles of scales that the 32 blocks of a warp cover.
constexpr int kSpanTiles = kWarpSize / nvfp4::kTileColumns;
// 128 bytes in flight for every thread.
template <class T>
constexpr int kRowsOf = 8 / sizeof(T);

// Small blocks, saturated scales, odd tensor scales.
template <class T>
__device__ __noinline__ uint3 quantize_rarely(const Block16<T> block, float outer) {
    const uint32_t scale = nvfp4::ruled_scale(block.amax(), outer);
    const uint2 codes = encode_rarely(block, outer * decode_e4m3(scale));
    return make_uint3(codes.x, codes.y, scale);
}

// The scale of the rule, and the codes.
template <class T>
__device__ __forceinline__ uint2 quantize_by_rule(const Block16<T>& block, const Quotient& by_outer, float outer,
                                                  uint32_t& scale) {
    const float most = block.amax();
    const float ratio = by_outer.of(Quotient(kE2M1Max, 1.0f / kE2M1Max, true).of(most));
    if (by_outer.safe() && most > 0x1p-60f && ratio >= 0x1p-6f && ratio <= kE4M3Max) {
        scale = encode_e4m3(ratio);
        // The scale is rounded by at most a sixteenth: no weight reaches 7.
        return encode_e2m1x16<false>(block, outer * decode_e4m3(scale));
    }
    const uint3 found = quantize_rarely(block, outer);
    scale = found.z;
    return make_uint2(found.x, found.y);
}

template <class T>
__device__ __forceinline__ uint2 quantize_by_search(const Block16<T>& block, float outer, float coherence,
                                                    uint32_t& scale) {
    float weights[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; i += 2) {
        const float2 two = block.pair(i);
        weights[i] = two.x, weights[i + 1] = two.y;
    }
    const float most = block.amax();
    scale = nvfp4::best_scale(weights, most, outer, coherence);
    const float total = outer * decode_e4m3(scale);
    return most < total * 0x1p20f ? encode_e2m1x16<true>(block, total) : encode_rarely(block, total);
}

// A warp takes 32 neighbouring blocks of a row, a thread kRows rows with all of their loads in flight, and the four
// warps the rows r, r + 32, r + 64 and r + 96: together 16 neighbouring bytes of the swizzled scales. `kWhole`: every
// block starts at a multiple of 16 bytes and lies inside the matrix.
template <class T, bool kSearch, bool kWhole>
__global__ void __launch_bounds__(kThreads, kSearch ? 4 : 6)
    quantize_kernel(Layout layout, uint32_t spans, const float* amax, float coherence) {
    constexpr int kRows = kSearch ? 1 : kRowsOf<T>;
    constexpr int kShares = 32 / kRows;
    __shared__ uint4 staged[kSpanTiles][kRows];
    // Backwards: the end of the matrix is what the pass over amax left in the L2 cache.
    const uint32_t part = gridDim.x - 1 - blockIdx.x;
    const uint32_t share = part / spans % kShares, tile_row = part / spans / kShares;
    const uint32_t span = part % spans, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const uint32_t b = span * kWarpSize + lane;
    const int64_t matrix = blockIdx.y, first_row = int64_t{tile_row} * nvfp4::kTileRows + warp * 32 + share * kRows;
    // Rows of this thread that hold weights, and rows that hold codes.
    const int full = b < layout.blocks ? static_cast<int>(min(layout.x.rows - first_row, int64_t{kRows})) : 0;
    const int coded = b < layout.blocks ? static_cast<int>(min(layout.code_rows - first_row, int64_t{kRows})) : 0;

    const T* const x =
        static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride + first_row * layout.x.row_stride;
    Block16<T> blocks[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
        if (i < full) {
            if constexpr (kWhole)
                blocks[i].load(x + i * layout.x.row_stride + b * kBlock);
            else
                blocks[i].load_part(x + i * layout.x.row_stride, int64_t{b} * kBlock, layout.x.columns);
        }

    const float outer =
        layout.given_scale ? layout.given_scale[matrix * layout.given_stride] : nvfp4::scale_of_amax(amax[matrix]);
    if (blockIdx.x == 0 && threadIdx.x == 0) layout.tensor_scale[matrix] = outer;
    const Quotient by_outer(outer, 0.0f);
    uint2* const codes =
        reinterpret_cast<uint2*>(layout.codes) + (matrix * layout.code_rows + first_row) * layout.blocks + b;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        uint32_t scale = 0;
        if (i < full)
            codes[i * layout.blocks] = kSearch ? quantize_by_search(blocks[i], outer, coherence, scale)
                                               : quantize_by_rule(blocks[i], by_outer, outer, scale);
        else if (i < coded)
            codes[i * layout.blocks] = make_uint2(0, 0);
        reinterpret_cast<uint8_t*>(&staged[lane / 4][i])[warp * 4 + lane % 4] = static_cast<uint8_t>(scale);
    }
    __syncthreads();
    const int64_t tile = int64_t{span} * kSpanTiles + threadIdx.x / kRows;
    if (threadIdx.x < kSpanTiles * kRows && tile < layout.column_tiles) {
        const int64_t place = (matrix * layout.row_tiles + tile_row) * layout.column_tiles + tile;
        uint4* const target = reinterpret_cast<uint4*>(layout.scales + place * kTile) + share * kRows;
        target[threadIdx.x % kRows] = staged[threadIdx.x / kRows][threadIdx.x % kRows];
    }
}

template <class T, bool kSearch>
void run(const Layout& layout, float* amax, float coherence, uintptr_t stream) {
    const bool aligned = is_aligned<T>(layout.x);
    require(layout.x.batch <= kMaxGridY, "quantize_nvfp4: too many matrices for one launch");
    const auto matrices = static_cast<unsigned>(layout.x.batch);
    if (!layout.given_scale) launch_amax<T>(layout.x, amax, stream, kOperation);
    const int64_t spans = (layout.column_tiles + kSpanTiles - 1) / kSpanTiles;
    const int64_t blocks = layout.row_tiles * (kSearch ? 32 : 32 / kRowsOf<T>)*spans;
    require(blocks <= kMaxGridX && layout.blocks < kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
    const bool whole = aligned && layout.blocks * kBlock == layout.x.columns;
    const auto kernel = whole ? quantize_kernel<T, kSearch, true> : quantize_kernel<T, kSearch, false>;
    launch(kOperation, kernel, dim3(static_cast<unsigned>(blocks), matrices), dim3(kThreads), stream, layout,
           static_cast<uint32_t>(spans), amax, coherence);
}

template <class T>
void run(const Layout& layout, float* amax, std::optional<double> coherence, uintptr_t stream) {
    if (coherence)
        run<T, true>(layout, amax, static_cast<float>(*coherence), stream);
    else
        run<T, false>(layout, amax, 0.0f, stream);
}

struct Nvfp4 {
    static constexpr int kBlock = nvfp4::kBlock;
    static constexpr int kBits = 4;
    static __device__ __forceinline__ float scale(uint32_t code, float tensor_scale) {
        return tensor_scale * decode_signed_e4m3(code);
    }

    // The even column is in the high nibble.
    static __device__ __forceinline__ void decode(const uint32_t* words, int pair, float& even, float& odd) {
        const uint32_t byte = words[pair / 4] >> pair % 4 * 8;
        even = decode_e2m1(byte >> 4);
        odd = decode_e2m1(byte);
    }
};

}  // namespace

std::string refusal(int device_index) {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && device_index < count) {
        const DeviceGuard guard(device_index, "refusal");
        cudaFuncAttributes attributes;
        status = cudaFuncGetAttributes(&attributes, quantize_kernel<float, false, true>);
    }
    // The next call must not find this error.
    cudaGetLastError();
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, const std::optional<Tensor>& amax,
                    std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    const Tensor& tensor_scale, uintptr_t stream) {
    require(given_scale || amax, "quantize_nvfp4: either a given scale or room for the amax");
    const Layout layout = nvfp4::layout_of(x, given_scale, codes, block_scales, tensor_scale);
    float* const room = amax ? static_cast<float*>(amax->data) : nullptr;
    const DeviceGuard guard(x.device_index, kOperation);
    if (x.type == Type::kBFloat16)
        run<BFloat16>(layout, room, coherence, stream);
    else if (x.type == Type::kFloat16)
        run<Float16>(layout, room, coherence, stream);
    else
        run<float>(layout, room, coherence, stream);
}

void dequantize_nvfp4(const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, const Tensor& out,
                      uintptr_t stream) {
    constexpr char kExpand[] = "dequantize_nvfp4";
    const DeviceGuard guard(codes.device_index, kExpand);
    expand<Nvfp4>(expansion_of(codes, block_scales, &tensor_scale, out, 2, kBlock, kExpand), stream, kExpand);
}

}  // namespace lrq::cuda
