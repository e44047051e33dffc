// The grouped Hadamard rotation of columns that neighbouring threads hold, 16 each; the order of additions is that of
// lrq_kernels/reference/hadamard.py.
#pragma once

#include <type_traits>

#include "vector.h"

namespace lrq::cuda {

constexpr int kRotated = 16;
constexpr int kRotationThreads = 512;
// So many threads share 256 columns: half a warp.
constexpr int kSharers = 16;
// Rows of 16 values and those of the other half of the warp start in different banks.
constexpr int kSharedRow = 20;
constexpr int kSharedHalf = kSharers * kSharedRow + 16;

__device__ __forceinline__ void butterfly(float& a, float& b, float& c, float& d) {
    const float s = a + b, t = a - b, u = c + d, v = c - d;
    a = s + v;
    b = s - v;
    c = t + u;
    d = u - t;
}

template <int kSpan>
__device__ __forceinline__ void butterflies(float (&x)[kRotated]) {
#pragma unroll
    for (int i = 0; i < kRotated; ++i)
        if (i / kSpan % 4 == 0) butterfly(x[i], x[i + kSpan], x[i + 2 * kSpan], x[i + 3 * kSpan]);
}

template <int kGroup>
class Rotation {
  public:
    __device__ __forceinline__ explicit Rotation(float* shared)
        : half_(shared + threadIdx.x / kSharers * kSharedHalf), lane_(threadIdx.x % kSharers) {}

    // Each thread gives 16 neighbouring columns; afterwards value i is that of column `position(i)`.
    __device__ __forceinline__ void rotate(float (&x)[kRotated]) const {
        butterflies<1>(x);
        if constexpr (kGroup >= 16) butterflies<4>(x);
        if constexpr (kGroup == 64) {
            write_row(x);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const row = half_ + (lane_ / 4 * 4 + i) * kSharedRow + lane_ % 4 * 4;
                const float4 read = *reinterpret_cast<const float4*>(row);
                x[4 * i] = read.x;
                x[4 * i + 1] = read.y;
                x[4 * i + 2] = read.z;
                x[4 * i + 3] = read.w;
            }
            synchronize();
            butterflies<4>(x);
        }
        if constexpr (kGroup >= 256) {
            write_row(x);
#pragma unroll
            for (int i = 0; i < kRotated; ++i) x[i] = half_[i * kSharedRow + lane_];
            synchronize();
            butterflies<1>(x);
            butterflies<4>(x);
        }
        if constexpr (kGroup == 1024) {
#pragma unroll
            for (int i = 0; i < kRotated; ++i) half_[i * kSharedRow + lane_] = x[i];
            synchronize();
#pragma unroll
            for (int i = 0; i < kRotated; ++i)
                x[i] = half_[(i / 4 - quarter()) * kSharedHalf + (4 * quarter() + i % 4) * kSharedRow + lane_];
            synchronize();
            butterflies<4>(x);
        }
#pragma unroll
        for (int i = 0; i < kRotated; ++i) x[i] *= kInverseRoot;
    }

    // Column of value i, counted from the first of the 256 (negative for other quarters of 1024).
    __device__ __forceinline__ int position(int i) const {
        if constexpr (kGroup <= 16) return lane_ * kRotated + i;
        if constexpr (kGroup == 64) return (lane_ / 4 * 4 + i / 4) * kRotated + lane_ % 4 * 4 + i % 4;
        if constexpr (kGroup == 256) return i * kRotated + lane_;
        return (i / 4 - quarter()) * 256 + (4 * quarter() + i % 4) * kRotated + lane_;
    }

    // The low bytes of what belongs to `position(i)`, as those of the 16 columns that this thread gave.
    __device__ __forceinline__ uint4 in_order(const uint32_t (&bytes)[kRotated]) const {
        if constexpr (kGroup <= 16) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = __byte_perm(__byte_perm(bytes[4 * i], bytes[4 * i + 1], 0x0040),
                                       __byte_perm(bytes[4 * i + 2], bytes[4 * i + 3], 0x0040), 0x5410);
            return make_uint4(words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
            for (int i = 0; i < kRotated; ++i) {
                const int there = kGroup == 1024 ? i / 4 - quarter() : 0;
                reinterpret_cast<uint8_t*>(half_ + there * kSharedHalf)[position(i) - there * 256] =
                    static_cast<uint8_t>(bytes[i]);
            }
            synchronize();
            const uint4 ordered = reinterpret_cast<const uint4*>(half_)[lane_];
            // The next rotation writes here.
            synchronize();
            return ordered;
        }
    }

  private:
    static constexpr float kInverseRoot = kGroup == 4     ? 0.5f
                                          : kGroup == 16  ? 0.25f
                                          : kGroup == 64  ? 0.125f
                                          : kGroup == 256 ? 0.0625f
                                                          : 0.03125f;

    __device__ __forceinline__ static int quarter() { return threadIdx.x / kSharers % 4; }

    __device__ __forceinline__ static void synchronize() {
        if constexpr (kGroup == 1024)
            __syncthreads();
        else
            __syncwarp();
    }

    __device__ __forceinline__ void write_row(const float (&x)[kRotated]) const {
#pragma unroll
        for (int i = 0; i < kRotated; i += 4)
            *reinterpret_cast<float4*>(half_ + lane_ * kSharedRow + i) =
                make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        synchronize();
    }

    float* half_;
    int lane_;
};

// What lies beyond the columns is zero.
template <bool kAligned, class T>
__device__ __forceinline__ void load_rotated(const T* row, int64_t first, int64_t columns, float (&x)[kRotated]) {
    Vector<T> vectors[kRotated / kVector];
#pragma unroll
    for (int j = 0; j < kRotated / kVector; ++j)
        if (first + j * kVector < columns)
            vectors[j] = load_vector<kAligned>(row + first + j * kVector, columns - first - j * kVector);
#pragma unroll
    for (int i = 0; i < kRotated; ++i) x[i] = vectors[i / kVector][i % kVector];
}

// Whole groups and warps, where each thread holds so many times 16 columns in each of as few rounds as can be.
template <int kGroup, int kHeld>
unsigned rotation_threads(int64_t columns) {
    constexpr int64_t kStep = std::max(kGroup / kRotated, kWarpSize);
    const int64_t needed = (columns + kHeld * kRotated - 1) / (kHeld * kRotated);
    const int64_t rounds = (needed + kRotationThreads - 1) / kRotationThreads;
    return static_cast<unsigned>(((needed + rounds - 1) / rounds + kStep - 1) / kStep * kStep);
}

inline size_t rotation_bytes(unsigned threads) { return threads / kSharers * kSharedHalf * sizeof(float); }

template <class Work>
void with_group(int group, const std::string& operation, const Work& work) {
    switch (group) {
        case 4:
            return work(std::integral_constant<int, 4>{});
        case 16:
            return work(std::integral_constant<int, 16>{});
        case 64:
            return work(std::integral_constant<int, 64>{});
        case 256:
            return work(std::integral_constant<int, 256>{});
        case 1024:
            return work(std::integral_constant<int, 1024>{});
        default:
            require(false, operation + ": the group must be 4, 16, 64, 256 or 1024");
    }
}

}  // namespace lrq::cuda
