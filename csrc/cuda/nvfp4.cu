#include "../nvfp4.h"

#include <algorithm>

#include "../kernels.h"
#include "../layout.h"
#include "amax.h"
#include "launch.h"
#include "load.h"

namespace lrq::cuda {
namespace {

using nvfp4::kBlock;
using nvfp4::kTile;
using nvfp4::Layout;

constexpr char kOperation[] = "quantize_nvfp4";
constexpr int kThreads = 128;
// A tile of scales is shared by so many thread blocks.
constexpr int kShares = kTile / kThreads;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxGridX = 0x7fffffff;

__device__ __forceinline__ uint2 encode_block(const float (&block)[kBlock], float total) {
    uint32_t words[2] = {0, 0};
    if (total != 0.0f) {
#pragma unroll
        for (int i = 0; i < kBlock / 2; ++i) {
            const uint32_t byte = encode_e2m1x2(divide(block[2 * i], total), divide(block[2 * i + 1], total));
            words[i / 4] |= byte << 8 * (i % 4);
        }
    }
    return make_uint2(words[0], words[1]);
}

// A thread holds one block of 16 and owns one byte of the swizzled scales, padding included: neighbours write
// neighbouring bytes, four blocks of a row fill whole sectors of codes, and nothing is shared or cleared before.
template <class T, bool kSearch>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(Layout layout, bool aligned, const float* amax, float coherence) {
    const uint32_t tile = blockIdx.x / kShares;
    const uint32_t tile_columns = static_cast<uint32_t>(layout.column_tiles);
    const uint32_t tile_row = tile / tile_columns;
    const uint32_t place = blockIdx.x % kShares * kThreads + threadIdx.x;
    const int64_t row = int64_t{tile_row} * nvfp4::kTileRows + place / 4 % 4 * 32 + place / 16;
    const int64_t b = int64_t{tile - tile_row * tile_columns} * nvfp4::kTileColumns + place % 4;
    const int64_t scales = layout.row_tiles * layout.column_tiles * kTile;

    for (int64_t matrix = blockIdx.y; matrix < layout.x.batch; matrix += gridDim.y) {
        const float tensor_scale =
            layout.given_scale ? layout.given_scale[matrix * layout.given_stride] : nvfp4::scale_of_amax(amax[matrix]);
        if (blockIdx.x == 0 && threadIdx.x == 0) layout.tensor_scale[matrix] = tensor_scale;
        uint32_t scale = 0;
        if (row < layout.code_rows && b < layout.blocks) {
            uint2 codes = make_uint2(0, 0);
            if (row < layout.x.rows) {
                const int64_t offset = matrix * layout.x.batch_stride + row * layout.x.row_stride;
                float block[kBlock];
                load_block(static_cast<const T*>(layout.x.data) + offset, b * kBlock, layout.x.columns, aligned, block);
                const float most = largest(block);
                scale = kSearch ? nvfp4::best_scale(block, most, tensor_scale, coherence)
                                : nvfp4::ruled_scale(most, tensor_scale);
                codes = encode_block(block, tensor_scale * decode_e4m3(scale));
            }
            reinterpret_cast<uint2*>(layout.codes)[(matrix * layout.code_rows + row) * layout.blocks + b] = codes;
        }
        layout.scales[matrix * scales + int64_t{tile} * kTile + place] = static_cast<uint8_t>(scale);
    }
}

template <class T>
void run(const Layout& layout, float* amax, std::optional<double> coherence, uintptr_t stream) {
    const bool aligned = is_aligned<T>(layout.x);
    const unsigned matrices = static_cast<unsigned>(std::min(layout.x.batch, kMaxGridY));
    if (!layout.given_scale) launch_amax<T>(layout.x, amax, stream, kOperation);
    const int64_t blocks = layout.row_tiles * layout.column_tiles * kShares;
    require(blocks <= kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
    const auto kernel = coherence ? quantize_kernel<T, true> : quantize_kernel<T, false>;
    launch(kOperation, kernel, dim3(static_cast<unsigned>(blocks), matrices), dim3(kThreads), stream, layout, aligned,
           amax, static_cast<float>(coherence.value_or(0.0)));
}

}  // namespace

std::string refusal(int device_index) {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && device_index < count) {
        const DeviceGuard guard(device_index, "refusal");
        cudaFuncAttributes attributes;
        status = cudaFuncGetAttributes(&attributes, quantize_kernel<float, false>);
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

}  // namespace lrq::cuda
