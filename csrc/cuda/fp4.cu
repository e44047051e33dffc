#include <algorithm>

#include "../kernels.h"
#include "../matrix.h"
#include "launch.h"

namespace lrq::cuda {
namespace {

constexpr int kThreads = 256;
// Bytes of packed codes a thread, twice as many of unpacked ones.
constexpr int kPacked = 8;
constexpr int64_t kMaxGrid = 65535;

// Packed bytes of a row, and where rows start; the output is contiguous.
struct Rows {
    const uint8_t* in;
    uint8_t* out;
    int64_t batch, rows, width, batch_stride, row_stride;
    bool aligned;
};

// Codes 0 to 15, one a byte, to two bytes in the low half.
__device__ __forceinline__ uint32_t pack_word(uint32_t codes, bool high_first) {
    const uint32_t kept = codes & 0x0f0f0f0fu;
    return __byte_perm(high_first ? kept << 4 | kept >> 8 : kept | kept >> 4, 0, 0x4420);
}

__device__ __forceinline__ uint2 unpack_word(uint32_t packed, bool high_first) {
    const uint32_t high = packed >> 4 & 0x0f0f0f0fu, low = packed & 0x0f0f0f0fu;
    const uint32_t even = high_first ? high : low, odd = high_first ? low : high;
    return make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
}

__device__ __forceinline__ void pack_bytes(const uint8_t* in, uint8_t* out, int count, bool high_first) {
#pragma unroll 1
    for (int i = 0; i < count; ++i)
        out[i] = static_cast<uint8_t>(pack_word(in[2 * i] | uint32_t{in[2 * i + 1]} << 8, high_first));
}

__device__ __forceinline__ void unpack_bytes(const uint8_t* in, uint8_t* out, int count, bool high_first) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const uint32_t codes = unpack_word(in[i], high_first).x;
        out[2 * i] = static_cast<uint8_t>(codes);
        out[2 * i + 1] = static_cast<uint8_t>(codes >> 8);
    }
}

__device__ __forceinline__ void pack_vector(const uint8_t* in, uint8_t* out, bool high_first) {
    const uint4 codes = __ldg(reinterpret_cast<const uint4*>(in));
    *reinterpret_cast<uint2*>(out) = make_uint2(pack_word(codes.x, high_first) | pack_word(codes.y, high_first) << 16,
                                                pack_word(codes.z, high_first) | pack_word(codes.w, high_first) << 16);
}

__device__ __forceinline__ void unpack_vector(const uint8_t* in, uint8_t* out, bool high_first) {
    const uint2 packed = __ldg(reinterpret_cast<const uint2*>(in));
    const uint2 first = unpack_word(packed.x, high_first), second = unpack_word(packed.y, high_first);
    *reinterpret_cast<uint4*>(out) = make_uint4(first.x, first.y, second.x, second.y);
}

template <bool kPack>
__global__ void __launch_bounds__(kThreads) convert_kernel(Rows rows, bool high_first) {
    await_predecessor();
    constexpr int kIn = kPack ? 2 : 1, kOut = kPack ? 1 : 2;
    const int64_t first = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kPacked;
    if (first >= rows.width) return;
    for (int64_t matrix = blockIdx.z; matrix < rows.batch; matrix += gridDim.z)
        for (int64_t row = blockIdx.y; row < rows.rows; row += gridDim.y) {
            const uint8_t* const in = rows.in + matrix * rows.batch_stride + row * rows.row_stride + first * kIn;
            uint8_t* const out = rows.out + ((matrix * rows.rows + row) * rows.width + first) * kOut;
            const int count = static_cast<int>(min(rows.width - first, int64_t{kPacked}));
            if (rows.aligned && count == kPacked)
                kPack ? pack_vector(in, out, high_first) : unpack_vector(in, out, high_first);
            else
                kPack ? pack_bytes(in, out, count, high_first) : unpack_bytes(in, out, count, high_first);
        }
}

template <bool kPack>
void convert(const Tensor& from, bool high_first, const Tensor& to, uintptr_t stream, const char* operation) {
    const Matrix x = bytes_of(from, operation);
    Rows rows{static_cast<const uint8_t*>(x.data),
              static_cast<uint8_t*>(to.data),
              x.batch,
              x.rows,
              0,
              x.batch_stride,
              x.row_stride,
              false};
    rows.width = kPack ? x.columns / 2 : x.columns;
    // Contiguous rows are one long row: no thread idles at an edge.
    if (x.row_stride == x.columns && (x.batch == 1 || x.batch_stride == x.rows * x.columns)) {
        rows.width *= x.batch * x.rows;
        rows.batch = rows.rows = 1;
        rows.batch_stride = rows.row_stride = 0;
    }
    const auto starts = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(to.data) |
                        static_cast<uintptr_t>(rows.row_stride) | static_cast<uintptr_t>(rows.batch_stride);
    rows.aligned = starts % sizeof(uint4) == 0 && (rows.batch * rows.rows == 1 || rows.width % kPacked == 0);
    const int64_t blocks = (rows.width + kThreads * kPacked - 1) / (kThreads * kPacked);
    require(blocks <= 0x7fffffff, std::string(operation) + ": too large for one launch");
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(rows.rows, kMaxGrid)),
                    static_cast<unsigned>(std::min(rows.batch, kMaxGrid)));
    const DeviceGuard guard(from.device_index, operation);
    launch(operation, convert_kernel<kPack>, grid, dim3(kThreads), stream, rows, high_first);
}

}  // namespace

void pack_fp4(const Tensor& codes, bool high_first, const Tensor& out, uintptr_t stream) {
    convert<true>(codes, high_first, out, stream, "pack_fp4");
}

void unpack_fp4(const Tensor& packed, bool high_first, const Tensor& out, uintptr_t stream) {
    convert<false>(packed, high_first, out, stream, "unpack_fp4");
}

}  // namespace lrq::cuda
