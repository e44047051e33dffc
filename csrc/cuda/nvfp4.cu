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
                                                                      : 10)
    quantize_kernel(Layout layout, uint32_t spans, Found found, float coherence) {
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

// Thread blocks on a multiprocessor: as many as registers suffice for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSieveBlocks = 4;
#else
constexpr int kSieveBlocks = 5;
#endif

// The weights of a thread's next part, on their way while those of this one are worked on.
class Ahead {
  public:
    __device__ __forceinline__ explicit Ahead(uint4 (&room)[2][2][kSpanThreads]) : room_(room) {}

    __device__ __forceinline__ void fetch(const Layout& layout, int64_t matrix, const Span<1>& span) {
        turn_ ^= 1;
        if (span.full > 0) {
            const auto* const from = reinterpret_cast<const uint4*>(span.weights<BFloat16>(layout, matrix));
            __pipeline_memcpy_async(&room_[turn_][0][threadIdx.x], from, sizeof(uint4));
            __pipeline_memcpy_async(&room_[turn_][1][threadIdx.x], from + 1, sizeof(uint4));
        }
        __pipeline_commit();
    }

    // What was fetched last; no other thread reads it.
    __device__ __forceinline__ void take(Block16<BFloat16>& block) const {
        __pipeline_wait_prior(0);
        const uint4 low = room_[turn_][0][threadIdx.x], high = room_[turn_][1][threadIdx.x];
        block.words[0] = low.x, block.words[1] = low.y, block.words[2] = low.z, block.words[3] = low.w;
        block.words[4] = high.x, block.words[5] = high.y, block.words[6] = high.z, block.words[7] = high.w;
    }

  private:
    uint4 (&room_)[2][2][kSpanThreads];
    uint32_t turn_ = 0;
};

// Bytes i of four lanes that differ in the two lowest bits of their number, in lane i of them: a transpose.
__device__ __forceinline__ uint32_t exchange_bytes(uint32_t bytes) {
    const uint32_t lane = threadIdx.x;
    const uint32_t by_one = __shfl_xor_sync(kWholeWarp, bytes, 1);
    bytes = lane & 1 ? __byte_perm(by_one, bytes, 0x7351) : __byte_perm(bytes, by_one, 0x6240);
    const uint32_t by_two = __shfl_xor_sync(kWholeWarp, bytes, 2);
    return lane & 2 ? __byte_perm(by_two, bytes, 0x7632) : __byte_perm(bytes, by_two, 0x5410);
}

constexpr uint32_t kSieveWarps = kSpanThreads / kWarpSize;

// Of bfloat16. Thread blocks stay, for the sake of their table; after it no warp waits for another: blocks in doubt
// come unevenly.
template <bool kWhole>
__global__ void __launch_bounds__(kSpanThreads, kSieveBlocks)
    sieve_kernel(Layout layout, uint32_t spans, uint32_t parts, Found found, float coherence) {
    await_predecessor();
    __shared__ Octaves table[SieveTable::kRows];
    __shared__ uint4 weights[kSieveWarps][2];
    __shared__ uint4 room[2][2][kSpanThreads];
    const int64_t matrix = blockIdx.y;
    const uint32_t stride = gridDim.x * kSieveWarps;
    uint32_t part = blockIdx.x * kSieveWarps + threadIdx.x / kWarpSize, quarter = 0;
    const auto span_of = [&](uint32_t number, uint32_t taken) {
        return Span<1>(layout, spans, parts - 1 - number, taken);
    };
    Ahead ahead(room);
    if constexpr (kWhole)
        if (part < parts) ahead.fetch(layout, matrix, span_of(part, 0));
    const float outer =
        layout.given_scale ? layout.given_scale[matrix * layout.given_stride] : nvfp4::scale_of_amax(found.of(matrix));
    if (blockIdx.x == 0 && threadIdx.x == 0) layout.tensor_scale[matrix] = outer;
    const bool sieved = SieveTable::serves(outer, coherence);
    if (sieved) SieveTable::fill(table, outer, static_cast<int>(threadIdx.x), kSpanThreads);
    const Quotient by_outer(outer, 0.0f);
    __syncthreads();
    uint32_t scales = 0;
    while (part < parts) {
        const Span<1> span = span_of(part, quarter);
        Block16<BFloat16> blocks[1];
        if constexpr (kWhole) {
            ahead.take(blocks[0]);
            const uint32_t next = quarter == 3 ? part + stride : part;
            if (next < parts) ahead.fetch(layout, matrix, span_of(next, (quarter + 1) % 4));
        } else {
            span.template load<false>(layout, matrix, blocks);
        }
        const Block16<BFloat16>& block = blocks[0];
        uint3 result = make_uint3(0, 0, 0);
        Doubt doubt;
        const float most = span.full > 0 ? bound_of(block) : 0.0f;
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
        settle(block, doubt, outer, coherence, weights[threadIdx.x / kWarpSize], result);
        if (lost) result = search_rarely(block, outer, coherence);
        if (!lost && result.z) result.x |= signs_of(block, 0), result.y |= signs_of(block, 4);
        if (span.coded > 0) *span.codes_of(layout, matrix) = make_uint2(result.x, result.y);
        scales = scales >> 8 | result.z << 24;
        if (++quarter == 4) {
            const int64_t tile = int64_t{span.span} * kSpanTiles + span.lane / 4;
            const uint32_t word = exchange_bytes(scales);
            if (tile < layout.column_tiles)
                reinterpret_cast<uint32_t*>(span.scales_of(layout, matrix, tile))[span.lane % 4] = word;
            part += stride, quarter = 0;
        }
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
    void launch(Kernel kernel, int64_t blocks, Arguments... more) const {
        require(blocks <= kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(layout.x.batch));
        cuda::launch(kOperation, kernel, grid, dim3(kSpanThreads), stream, layout, static_cast<uint32_t>(spans),
                     more..., found, coherence);
    }
};

template <class T, bool kSearch, int kRows>
void quantize(const Call& call) {
    call.launch(call.whole ? quantize_kernel<T, kSearch, true, kRows> : quantize_kernel<T, kSearch, false, kRows>,
                call.parts(kRows));
}

template <bool kWhole>
void sieve(const Call& call) {
    const int64_t parts = call.parts(1), resident = resident_blocks<sieve_kernel<kWhole>>(kOperation, kSpanThreads);
    require(parts <= kMaxGridX, "quantize_nvfp4: the matrix is too large for one launch");
    // No more than run at a time: each would fill a table for what is left over.
    const int64_t held = std::max<int64_t>(resident / std::max<int64_t>(call.layout.x.batch, 1), 1);
    call.launch(sieve_kernel<kWhole>, std::min((parts + kSieveWarps - 1) / kSieveWarps, held),
                static_cast<uint32_t>(parts));
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
