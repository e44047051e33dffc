#include "../int8.h"

#include "../kernels.h"
#include "hadamard.h"
#include "scaled.h"
#include "unscaled.h"

namespace lrq::cuda {
namespace {

struct Codec : Int8 {
    using Quotient = TwoPartQuotient;

    template <bool kBounded>
    static __device__ __forceinline__ uint32_t pack(float a, float b, float c, float d) {
        const auto code = [](float value) { return kBounded ? encode_bounded(value) : encode(value); };
        const uint32_t low = __byte_perm(code(a), code(b), 0x0040);
        return __byte_perm(low, __byte_perm(code(c), code(d), 0x0040), 0x5410);
    }

    // The byte plus 128 as the last places of 2^23.
    static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
        const uint32_t biased = word ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440 + i)) - (0x1p23f + 128.0f);
    }
};

// Each thread holds so many times 16 columns of a row.
constexpr int kHeldTimes = 2;

// A thread block, or a warp, rotates and holds a row; of a row too long for that it rotates all but the last columns
// again.
template <int kGroup, class T, bool kAligned, int kTogether>
__global__ void __launch_bounds__(kRotationThreads) rotated_rows_kernel(Scaled layout) {
    await_predecessor();
    extern __shared__ float4 room[];
    constexpr int kOfWarp = kTogether == 1 ? 0 : kWarpSize / kSharers * kSharedHalf;
    const Rotation<kGroup> rotation(reinterpret_cast<float*>(room) + threadIdx.y * kOfWarp);
    const int64_t matrix = batch_index(), row = int64_t{blockIdx.x} * kTogether + threadIdx.y;
    if (matrix >= layout.x.batch || row >= layout.x.rows) return;
    const T* const source =
        static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride + row * layout.x.row_stride;
    uint8_t* const out = static_cast<uint8_t*>(layout.out) + (matrix * layout.x.rows + row) * layout.x.columns;
    const int columns = static_cast<int>(layout.x.columns), share = blockDim.x * kRotated, step = share * kHeldTimes;
    float values[kHeldTimes][kRotated];
    const auto load = [&](int first) {
#pragma unroll
        for (int j = 0; j < kHeldTimes; ++j)
            load_rotated<kAligned>(source, first + j * share + threadIdx.x * kRotated, columns, values[j]);
        // Written out: nvcc 13 leaves a loop around barriers as it is, and the values would leave the registers.
        static_assert(kHeldTimes == 2);
        rotation.rotate(values[0]);
        rotation.rotate(values[1]);
    };

    float most = 0.0f;
    int first = 0;
    for (;; first += step) {
        load(first);
#pragma unroll
        for (int i = 0; i < kHeldTimes * kRotated; ++i) most = fmaxf(most, fabsf(values[i / kRotated][i % kRotated]));
        if (first + step >= columns) break;
    }
    const float amax = __uint_as_float(tile_largest<kTogether>(__float_as_uint(most)));
    const float scale = Codec::scale(amax, false);
    if (threadIdx.x == 0) layout.scales[matrix * layout.x.rows + row] = scale;
    const Codec::Quotient quotient(scale, amax);
    for (;; first -= step) {
#pragma unroll
        for (int j = 0; j < kHeldTimes; ++j) {
            uint32_t bytes[kRotated];
            if (quotient.safe()) {
#pragma unroll
                for (int i = 0; i < kRotated; ++i) bytes[i] = Codec::encode_bounded(quotient.of(values[j][i]));
            } else {
#pragma unroll
                for (int i = 0; i < kRotated; ++i) bytes[i] = Codec::encode_bounded(divide(values[j][i], scale));
            }
            const uint4 codes = rotation.in_order(bytes);
            const int column = first + j * share + threadIdx.x * kRotated;
            if (kAligned) {
                if (column < columns) *reinterpret_cast<uint4*>(out + column) = codes;
            } else {
                const uint32_t words[] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                for (int i = 0; i < kRotated; ++i)
                    if (column + i < columns) out[column + i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
            }
        }
        if (first == 0) break;
        load(first - step);
    }
}

template <class T>
void quantize_rotated(const Scaled& layout, uintptr_t stream, const char* operation) {
    const bool aligned = is_aligned_throughout<T>(layout.x) && layout.x.columns % kRotated == 0 &&
                         is_multiple(layout.out, sizeof(uint4));
    require(layout.x.columns < 1 << 30, "quantize_int8: the rows are too long for one thread block");
    with_group(layout.group, operation, [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        const unsigned threads = rotation_threads<kGroup, kHeldTimes>(layout.x.columns);
        const auto launch_rows = [&](auto together) {
            constexpr int kTogether = decltype(together)::value;
            const auto kernel = aligned ? rotated_rows_kernel<kGroup, T, true, kTogether>
                                        : rotated_rows_kernel<kGroup, T, false, kTogether>;
            launch_sharing(operation, kernel,
                           batch_grid((layout.x.rows + kTogether - 1) / kTogether, layout.x.batch, operation),
                           dim3(threads, kTogether), rotation_bytes(threads * kTogether), stream, layout);
        };
        // Groups of 1024 are shared by two warps.
        if (kGroup < 1024 && threads == kWarpSize)
            launch_rows(std::integral_constant < int, kGroup<1024 ? kWarpsTogether : 1>{});
        else
            launch_rows(std::integral_constant<int, 1>{});
    });
}

}  // namespace

void quantize_int8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                   const std::optional<Tensor>& room, int group, const Tensor& codes, const Tensor& scale,
                   uintptr_t stream) {
    constexpr char kOperation[] = "quantize_int8";
    const Scaled layout = scaled_of(x, scaling, block, given_scale, group, codes, scale, kOperation);
    const DeviceGuard guard(x.device_index, kOperation);
    if (!group) return quantize_scaled<Codec>(layout, room, stream, kOperation);
    require(scaling == "row", "quantize_int8: only rows with a scale each are rotated here");
    if (x.type == Type::kBFloat16)
        quantize_rotated<BFloat16>(layout, stream, kOperation);
    else if (x.type == Type::kFloat16)
        quantize_rotated<Float16>(layout, stream, kOperation);
    else
        quantize_rotated<float>(layout, stream, kOperation);
}

void dequantize_int8(const Tensor& codes, const Tensor& scale, const Tensor& out, uintptr_t stream) {
    constexpr char kOperation[] = "dequantize_int8";
    const DeviceGuard guard(codes.device_index, kOperation);
    dequantize_scaled<Codec>(scaled_codes_of(codes, scale, 0, out, kOperation), out.type, stream, kOperation);
}

}  // namespace lrq::cuda
