#include "../nvfp4.h"

#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "../kernels.h"
#include "../layout.h"
#include "amax.h"
#include "block16.h"
#include "expand.h"
#include "launch.h"
#include "load.h"
#include "settle.h"
#include "sieve.h"
#include "span.h"

namespace lrq::cuda {
namespace {

using nvfp4::kBlock;
using nvfp4::Layout;

constexpr char kOperation[] = "quantize_nvfp4";
// 128 bytes in flight for every thread, or 64 where so few blocks would leave multiprocessors idle.
template <class T>
constexpr int kRowsOf = 8 / sizeof(T);
constexpr int64_t kFewBlocks = 2048;
// Thread blocks on a multiprocessor then.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewResident = 8;
#else
constexpr int kFewResident = 10;
#endif

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

__device__ __noinline__ uint3 search_rarely(const Block16<BFloat16> block, float outer, float coherence) {
    uint32_t scale;
    const uint2 codes = quantize_by_search(block, outer, coherence, scale);
    return make_uint3(codes.x, codes.y, scale);
}

// `kRows`: of a thread.
template <class T, bool kSearch, bool kWhole, int kRows>
__global__ void __launch_bounds__(kSpanThreads, kSearch               ? 4
                                                : kRows == kRowsOf<T> ? 7
                                                                      : kFewResident)
    quantize_kernel(Layout layout, Divisor spans, Found found, float coherence) {
    await_predecessor();
    __shared__ uint4 staged[kSpanTiles][kRows];
    const int64_t matrix = blockIdx.y;
    // Backwards: the end of the matrix is what the pass over amax left in the L2 cache.
    const Span<kRows> span(layout, spans, gridDim.x - 1 - blockIdx.x, threadIdx.x / kWarpSize);
    Block16<T> blocks[kRows];
    span.template load<kWhole>(layout, matrix, blocks);
    const float outer =
        layout.given_scale ? layout.given_scale[matrix * layout.given_stride] : nvfp4::scale_of_amax(found.of(matrix));
    if (blockIdx.x == 0 && threadIdx.x == 0) layout.tensor_scale[matrix] = outer;
    const Quotient by_outer(outer, 0.0f);
    span.store(layout, matrix, blocks, staged, [&](const Block16<T>& block, uint32_t& scale) {
        return kSearch ? quantize_by_search(block, outer, coherence, scale)
                       : quantize_by_rule(block, by_outer, outer, scale);
    });
}

// The amax; of a block with a NaN, that.
__device__ __forceinline__ float bound_of(const Block16<BFloat16>& block) {
    uint32_t most = 0;
#pragma unroll
    for (uint32_t word : block.words) most = __vmaxu2(most, word & 0x7fff7fffu);
    return widen_most<BFloat16>(most);
}

// A thread block fills a multiprocessor, as far as registers suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSieveThreads = 512;
#else
constexpr int kSieveThreads = 640;
#endif

// The weights of a thread's next block, on their way while those of this one are worked on.
class Ahead {
  public:
    __device__ __forceinline__ explicit Ahead(uint4 (&room)[2][kSieveThreads]) : room_(room) {}

    // What was fetched before must have been used.
    __device__ __forceinline__ void fetch(const Layout& layout, int64_t matrix, const Span<1>& span) {
        if (span.full > 0) {
            const auto* const from = reinterpret_cast<const uint4*>(span.weights<BFloat16>(layout, matrix));
            __pipeline_memcpy_async(&room_[0][threadIdx.x], from, sizeof(uint4));
            __pipeline_memcpy_async(&room_[1][threadIdx.x], from + 1, sizeof(uint4));
        }
        __pipeline_commit();
    }

    // What was fetched last; no other thread reads it.
    __device__ __forceinline__ void take(Block16<BFloat16>& block) const {
        __pipeline_wait_prior(0);
        const uint4 low = room_[0][threadIdx.x], high = room_[1][threadIdx.x];
        block.words[0] = low.x, block.words[1] = low.y, block.words[2] = low.z, block.words[3] = low.w;
        block.words[4] = high.x, block.words[5] = high.y, block.words[6] = high.z, block.words[7] = high.w;
    }

  private:
    uint4 (&room_)[2][kSieveThreads];
};

// Of bfloat16; `units` are quarters of parts. Thread blocks stay, for the sake of their table. A warp takes the next
// unit of its thread block whenever it is free: warps run at uneven speeds, old ones first.
template <bool kWhole>
__global__ void __launch_bounds__(kSieveThreads, 1)
    sieve_kernel(Layout layout, Divisor spans, uint32_t units, Found found, float coherence) {
    await_predecessor();
    __shared__ Octaves table[SieveTable::kRows];
    __shared__ uint4 weights[kSieveThreads / kWarpSize][2];
    __shared__ uint4 room[2][kSieveThreads];
    __shared__ uint32_t taken;
    const int64_t matrix = blockIdx.y;
    const uint32_t warp = threadIdx.x / kWarpSize;
    const auto span_of = [&](uint32_t unit) { return Span<1>(layout, spans, (units - 1 - unit) / 4, unit % 4); };
    Ahead ahead(room);
    uint32_t unit = warp * gridDim.x + blockIdx.x;
    if constexpr (kWhole)
        if (unit < units) ahead.fetch(layout, matrix, span_of(unit));
    const float outer =
        layout.given_scale ? layout.given_scale[matrix * layout.given_stride] : nvfp4::scale_of_amax(found.of(matrix));
    if (blockIdx.x == 0 && threadIdx.x == 0) layout.tensor_scale[matrix] = outer;
    const bool sieved = SieveTable::serves(outer, coherence);
    if (sieved) SieveTable::fill(table, outer, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    if (threadIdx.x == 0) taken = blockDim.x / kWarpSize;
    const Quotient by_outer(outer, 0.0f);
    __syncthreads();
    while (unit < units) {
        const Span<1> span = span_of(unit);
        if (span.lane == 0) unit = atomicAdd(&taken, 1u) * gridDim.x + blockIdx.x;
        unit = __shfl_sync(kWholeWarp, unit, 0);
        Block16<BFloat16> blocks[1];
        if constexpr (kWhole)
            ahead.take(blocks[0]);
        else
            span.template load<false>(layout, matrix, blocks);
        const Block16<BFloat16>& block = blocks[0];
        const float most = span.full > 0 ? bound_of(block) : 0.0f;
        if constexpr (kWhole)
            if (unit < units) ahead.fetch(layout, matrix, span_of(unit));
        uint3 result = make_uint3(0, 0, 0);
        Doubt doubt;
        const float ratio = by_outer.of(Quotient(kE2M1Max, 1.0f / kE2M1Max, true).of(most));
        bool lost = !(most == 0.0f);
        if (sieved && Sieve::serves(most, ratio)) {
            const Sieve sieve(block.words, most, ratio, outer, coherence, table);
            const uint32_t doubtful = sieve.doubtful();
            const int code = sieve.first() - Sieve::kBelow + __ffs(static_cast<int>(Sieve::inside(doubtful))) - 1;
            result = make_uint3(sieve.codes(0, code), sieve.codes(1, code), static_cast<uint32_t>(code));
            lost = !sieve.decides();
            if (!lost && (doubtful & (doubtful - 1)) != 0)
                doubt = {doubtful, sieve.first(), sieve.unit(), sieve.limit()};
        }
        settle(block, doubt, outer, coherence, weights[warp], result);
        if (lost) result = search_rarely(block, outer, coherence);
        if (!lost && result.z) result.x |= signs_of(block, 0), result.y |= signs_of(block, 4);
        if (span.coded > 0) *span.codes_of(layout, matrix) = make_uint2(result.x, result.y);
        const int64_t tile = int64_t{span.span} * kSpanTiles + span.lane / 4;
        if (tile < layout.column_tiles)
            reinterpret_cast<uint8_t*>(span.scales_of(layout, matrix, tile))[span.quarter * 4 + span.lane % 4] =
                static_cast<uint8_t>(result.z);
    }
}

// Where the weights are, and what they are quantized by.
struct Call {
    Layout layout;
    int64_t spans;
    bool whole;
    Found found;
    float coherence;
    uintptr_t stream;

    // Parts of a matrix, of which a thread has so many rows.
    int64_t parts(int rows) const { return layout.row_tiles * (32 / rows) * spans; }

    template <class Kernel, class... Arguments>
    void launch(Kernel kernel, int64_t blocks, unsigned threads, Arguments... more) const {
        require(blocks <= kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(layout.x.batch));
        cuda::launch(kOperation, kernel, grid, dim3(threads), stream, layout, Divisor(spans, kOperation), more...,
                     found, coherence);
    }
};

template <class T, bool kSearch, int kRows>
void quantize(const Call& call) {
    call.launch(call.whole ? quantize_kernel<T, kSearch, true, kRows> : quantize_kernel<T, kSearch, false, kRows>,
                call.parts(kRows), kSpanThreads);
}

template <bool kWhole>
void sieve(const Call& call) {
    const Resident all = resident<sieve_kernel<kWhole>>(kOperation);
    const int64_t units = 4 * call.parts(1), warps = all.threads / kWarpSize;
    require(units <= kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
    // No more than run at a time: each would fill a table for what is left over.
    int64_t held = std::max<int64_t>(all.blocks / std::max<int64_t>(call.layout.x.batch, 1), 1);
    // Of many matrices some more each, that the last ones to run fill the GPU as well.
    for (const int64_t least = held; held < least + 8; ++held) {
        const int64_t blocks = held * call.layout.x.batch, waves = (blocks + all.blocks - 1) / all.blocks;
        if (10 * blocks >= 9 * waves * all.blocks) break;
    }
    call.launch(sieve_kernel<kWhole>, std::min((units + warps - 1) / warps, held), all.threads,
                static_cast<uint32_t>(units));
}

template <class T>
void run(const Layout& layout, const std::optional<Tensor>& room, std::optional<double> coherence, uintptr_t stream) {
    require(layout.x.batch <= kMaxGridY, "quantize_nvfp4: too many matrices for one launch");
    require(layout.blocks < kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
    const bool whole = is_aligned<T>(layout.x) && layout.blocks * kBlock == layout.x.columns;
    const Found found = layout.given_scale ? Found{} : find_amax<T>(layout.x, *room, stream, kOperation);
    const Call call{layout, (layout.column_tiles + kSpanTiles - 1) / kSpanTiles, whole,
                    found,  static_cast<float>(coherence.value_or(0.0)),         stream};
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (coherence) return whole ? sieve<true>(call) : sieve<false>(call);
    } else if (coherence) {
        return quantize<T, true, 1>(call);
    }
    constexpr int kMany = kRowsOf<T>;
    call.parts(kMany) * layout.x.batch > kFewBlocks ? quantize<T, false, kMany>(call)
                                                    : quantize<T, false, kMany / 2>(call);
}

struct Nvfp4 {
    static constexpr int kBlock = nvfp4::kBlock;
    static constexpr int kBits = 4;
    static __device__ __forceinline__ float scale(uint32_t code, float tensor_scale) {
        return tensor_scale * decode_signed_e4m3(code);
    }

    // Values of 8 or 4 codes, two at a time: the bits of a code are those of a half, but for the exponent's bias.
    template <int kCount>
    static __device__ __forceinline__ void decode(const uint32_t* words, float (&values)[kCount]) {
        constexpr int kApart = kCount / 2;
        const uint32_t codes = kCount == 8 ? words[0] : __byte_perm(words[0], 0, 0x4140);
#pragma unroll
        for (int i = 0; i < kApart; ++i) {
            const uint32_t magnitudes = (4 * i < 9 ? codes << (9 - 4 * i) : codes >> (4 * i - 9)) & 0x0e000e00u;
            const uint32_t bits = magnitudes | (codes << (12 - 4 * i) & 0x80008000u);
            const float2 two =
                __half22float2(__hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(0x1p14f)));
            // The even column is in the high nibble.
            values[i ^ 1] = two.x, values[(i + kApart) ^ 1] = two.y;
        }
    }
};

}  // namespace

std::string refusal(int device_index) {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && device_index < count) {
        const DeviceGuard guard(device_index, "refusal");
        cudaFuncAttributes attributes;
        status = cudaFuncGetAttributes(&attributes, quantize_kernel<float, false, true, 2>);
    }
    // The next call must not find this error.
    cudaGetLastError();
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, const std::optional<Tensor>& room,
                    std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    const Tensor& tensor_scale, uintptr_t stream) {
    const Layout layout = nvfp4::layout_of(x, given_scale, codes, block_scales, tensor_scale);
    require(given_scale || room, "quantize_nvfp4: either a given scale or room for the amax");
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
