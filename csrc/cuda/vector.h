// Eight neighbouring columns of a thread, as they lie in memory; and grids over the vectors of a batch of matrices.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../matrix.h"
#include "../minifloat.h"
#include "../narrow.h"
#include "launch.h"

namespace lrq::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kVector = 8;

template <class T>
struct Vector {
    static constexpr int kWords = kVector * sizeof(T) / sizeof(uint32_t);
    uint32_t words[kWords] = {};

    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (sizeof(T) == sizeof(float))
            return __uint_as_float(words[i]);
        else
            return widen(T{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
    }
};

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(uint8_t x) { return x; }
template <class T>
__device__ __forceinline__ uint32_t bits_of(T x) {
    return x.bits;
}

// What lies beyond `left` columns is zero. Aligned: 16 bytes (8 of codes), and all of them there. Kernels are compiled
// for either, so that loads follow each other without branches between them.
template <bool kAligned, class T>
__device__ __forceinline__ Vector<T> load_vector(const T* source, int64_t left) {
    constexpr int kWords = Vector<T>::kWords;
    constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);
    Vector<T> vector;
    if constexpr (kAligned) {
        if constexpr (kWords == 2) {
            const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(source));
            vector.words[0] = loaded.x;
            vector.words[1] = loaded.y;
        } else {
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(source) + i);
                vector.words[4 * i] = loaded.x;
                vector.words[4 * i + 1] = loaded.y;
                vector.words[4 * i + 2] = loaded.z;
                vector.words[4 * i + 3] = loaded.w;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            if (i < left) vector.words[i / kPerWord] |= bits_of(source[i]) << 32 / kPerWord * (i % kPerWord);
    }
    return vector;
}

// Largest magnitudes so far, as bits, whose order is theirs, a NaN above all; of 16-bit types in either half. They stay
// packed: widened values would be kept in registers until they are encoded.
template <class T>
__device__ __forceinline__ uint32_t most_of(const Vector<T>& vector, uint32_t most) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kWords; ++i)
        most = sizeof(T) == sizeof(float) ? max(most, vector.words[i] & 0x7fffffffu)
                                          : __vmaxu2(most, vector.words[i] & 0x7fff7fffu);
    return most;
}

template <class T>
__device__ __forceinline__ float widen_most(uint32_t most) {
    if constexpr (sizeof(T) == sizeof(float))
        return __uint_as_float(most);
    else
        return widen(T{static_cast<uint16_t>(max(most & 0xffffu, most >> 16))});
}

// Of all threads of the block, for all of them; the order of the bits of non-negative floats is their order.
__device__ __forceinline__ uint32_t block_largest(uint32_t bits) {
    __shared__ uint32_t shared[kWarpSize];
    const unsigned lane = threadIdx.x % kWarpSize;
    bits = __reduce_max_sync(kWholeWarp, bits);
    if (lane == 0) shared[threadIdx.x / kWarpSize] = bits;
    __syncthreads();
    return __reduce_max_sync(kWholeWarp, lane < blockDim.x / kWarpSize ? shared[lane] : 0u);
}

// Tiles that fit a warp share a thread block, each with a warp along y: thread blocks of a single warp cost more to
// start than they take to run.
constexpr int kWarpsTogether = 4;

// The largest in a thread block, or in a warp where it has a tile of its own.
template <int kTogether>
__device__ __forceinline__ uint32_t tile_largest(uint32_t bits) {
    return kTogether == 1 ? block_largest(bits) : __reduce_max_sync(kWholeWarp, bits);
}

// Two values in a word, ties to even.
__device__ __forceinline__ uint32_t narrow_pair(float high, float low, BFloat16) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ uint32_t narrow_pair(float high, float low, Float16) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Of values as they are stored, `kWords` words.
template <class T>
struct Narrowed {
    static constexpr int kWords = kVector * sizeof(T) / sizeof(uint32_t);
    uint32_t words[kWords];

    __device__ __forceinline__ explicit Narrowed(const float (&values)[kVector]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(T) == sizeof(float))
                words[i] = __float_as_uint(values[i]);
            else
                words[i] = narrow_pair(values[2 * i + 1], values[2 * i], T{});
        }
    }
};

// Vectors that are whole and aligned.
template <class T>
__device__ __forceinline__ void store_values(T* out, const float (&values)[kVector]) {
    const Narrowed<T> narrowed(values);
#pragma unroll
    for (int i = 0; i < Narrowed<T>::kWords; i += 4)
        reinterpret_cast<uint4*>(out)[i / 4] =
            make_uint4(narrowed.words[i], narrowed.words[i + 1], narrowed.words[i + 2], narrowed.words[i + 3]);
}

// Without a branch, past which ptxas 13 would move the loads of what is stored.
template <class T>
__device__ __forceinline__ void store_values_if(bool present, T* out, const float (&values)[kVector]) {
    const Narrowed<T> narrowed(values);
#pragma unroll
    for (int i = 0; i < Narrowed<T>::kWords; i += 4)
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                         static_cast<uint32_t>(present)),
                     "l"(__cvta_generic_to_global(reinterpret_cast<uint4*>(out) + i / 4)), "r"(narrowed.words[i]),
                     "r"(narrowed.words[i + 1]), "r"(narrowed.words[i + 2]), "r"(narrowed.words[i + 3])
                     : "memory");
}

// Division of numbers below 2^31 by one divisor (Granlund and Montgomery, 1994).
class Divisor {
  public:
    explicit Divisor(int64_t divisor, const char* operation) : divisor_(static_cast<uint32_t>(divisor)) {
        require(divisor > 0 && divisor <= std::numeric_limits<int32_t>::max(),
                std::string(operation) + ": the matrix is too large for one launch");
        while (uint64_t{1} << shift_ < divisor_) ++shift_;
        factor_ = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor_) / divisor_ + 1);
    }

    __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, factor_) + n) >> shift_; }
    __device__ __forceinline__ uint32_t remainder(uint32_t n, uint32_t quotient) const {
        return n - quotient * divisor_;
    }

  private:
    uint32_t divisor_, factor_ = 0, shift_ = 0;
};

__device__ __forceinline__ int64_t batch_index() { return blockIdx.z * int64_t{gridDim.y} + blockIdx.y; }

// `blocks` thread blocks for each matrix; the last may be one too many, see `batch_index`.
inline dim3 batch_grid(int64_t blocks, int64_t batch, const char* operation) {
    constexpr int64_t kMostAlongY = 65535;
    require(blocks <= std::numeric_limits<int32_t>::max(),
            std::string(operation) + ": the matrix is too large for one launch");
    const int64_t along_y = std::min(batch, kMostAlongY);
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(along_y),
                static_cast<unsigned>((batch + along_y - 1) / along_y));
}

inline bool is_multiple(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether every vector of every row is whole and lies as `load_vector` wants it.
template <class T>
bool is_aligned_throughout(const Matrix& x) {
    constexpr int64_t kLoad = std::min<int64_t>(sizeof(uint4), kVector * sizeof(T)) / sizeof(T);
    return is_multiple(x.data, kLoad * sizeof(T)) && x.row_stride % kLoad == 0 && x.batch_stride % kLoad == 0 &&
           x.columns % kVector == 0;
}

// How the vectors of a matrix, numbered from row to row, are found: anywhere; where every one is whole and lies as
// `load_vector` wants it, and 32 bits hold the stride of rows, of the outputs as well, which is the number of columns;
// or also one after the other, without gaps between rows.
enum class Way { kAny, kAligned, kFlat };

// From the start of the matrix, and how many columns are left from there on.
struct Spot {
    int64_t offset, left;
};

template <Way kWay>
__device__ __forceinline__ int64_t rows_apart(uint32_t rows, int64_t stride) {
    return kWay == Way::kAny ? rows * stride : static_cast<int64_t>(uint64_t{rows} * static_cast<uint32_t>(stride));
}

template <Way kWay>
__device__ __forceinline__ Spot spot_of(uint32_t index, const Divisor& across, int64_t row_stride, int64_t columns) {
    if constexpr (kWay == Way::kFlat) return {int64_t{index} * kVector, kVector};
    const uint32_t row = across.quotient(index), column = across.remainder(index, row) * kVector;
    return {rows_apart<kWay>(row, row_stride) + column, columns - column};
}

template <class T>
Way way_of(const Matrix& x) {
    if (!is_aligned_throughout<T>(x) || std::max(x.row_stride, x.columns) > std::numeric_limits<uint32_t>::max())
        return Way::kAny;
    return x.row_stride == x.columns ? Way::kFlat : Way::kAligned;
}

template <class Work>
void with_way(Way way, const Work& work) {
    if (way == Way::kFlat)
        work(std::integral_constant<Way, Way::kFlat>{});
    else if (way == Way::kAligned)
        work(std::integral_constant<Way, Way::kAligned>{});
    else
        work(std::integral_constant<Way, Way::kAny>{});
}

}  // namespace lrq::cuda
