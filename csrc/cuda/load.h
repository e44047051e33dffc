// Loads of 16 bytes, widened to float32.
#pragma once

#include "../matrix.h"
#include "../minifloat.h"

namespace lrq::cuda {

__device__ __forceinline__ void unpack(uint32_t word, float* out, float) { out[0] = __uint_as_float(word); }

template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float* out, T) {
    out[0] = widen(T{static_cast<uint16_t>(word)});
    out[1] = widen(T{static_cast<uint16_t>(word >> 16)});
}

// kSize neighbouring columns; what lies beyond the matrix is zero.
template <int kSize, class T>
__device__ __forceinline__ void load_block(const T* row, int64_t first, int64_t columns, bool aligned,
                                           float (&block)[kSize]) {
    if (aligned && first + kSize <= columns) {
        constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);
        constexpr int kPerLoad = 4 * kPerWord;
        const uint4* source = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
        for (int i = 0; i < kSize / kPerLoad; ++i) {
            const uint4 loaded = __ldg(source + i);
            unpack(loaded.x, block + i * kPerLoad, T{});
            unpack(loaded.y, block + i * kPerLoad + kPerWord, T{});
            unpack(loaded.z, block + i * kPerLoad + kPerWord * 2, T{});
            unpack(loaded.w, block + i * kPerLoad + kPerWord * 3, T{});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) block[i] = first + i < columns ? widen(row[first + i]) : 0.0f;
}

template <int kSize>
__device__ __forceinline__ float largest(const float (&block)[kSize]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) most = fmaxf(most, fabsf(block[i]));
    return most;
}

// Whether every 16 columns of every row start at a multiple of 16 bytes.
template <class T>
bool is_aligned(const Matrix& x) {
    constexpr int64_t kVector = sizeof(uint4) / sizeof(T);
    return reinterpret_cast<uintptr_t>(x.data) % sizeof(uint4) == 0 && x.row_stride % kVector == 0 &&
           x.batch_stride % kVector == 0;
}

}  // namespace lrq::cuda
