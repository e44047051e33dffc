// Largest magnitude of every matrix; a NaN wins.
#pragma once

#include "vector.h"

namespace lrq::cuda {

constexpr int kAmaxThreads = 1024;
// As many vectors as 64 bytes.
template <class T>
constexpr int kAmaxVectors = 64 / (kVector * sizeof(T));
// Enough to fill a GPU, at two on a multiprocessor, and few for the kernel that puts them together.
constexpr int64_t kMostParts = 256;

// What thread blocks found in their parts of every matrix.
struct Found {
    const float* most;
    uint32_t parts;

    // The amax of a matrix, for all threads of the block, which ask together.
    __device__ __forceinline__ float of(int64_t matrix) const {
        uint32_t bits = 0;
        for (uint32_t part = threadIdx.x; part < parts; part += blockDim.x)
            bits = max(bits, __float_as_uint(__ldg(most + matrix * parts + part)));
        return __uint_as_float(block_largest(bits));
    }
};

inline int64_t most_parts(int64_t batch) { return std::max<int64_t>(kMostParts / std::max<int64_t>(batch, 1), 1); }

// Vectors are numbered from row to row. `kParts`: each thread block tells what it found in a place of its own; else the
// largest is kept in `most`, which starts as zeros: the order of the bits is that of the magnitudes.
template <class T, Way kWay, bool kParts>
__global__ void __launch_bounds__(kAmaxThreads, 2)
    amax_kernel(Matrix x, Divisor across, uint32_t vectors, float* most) {
    await_predecessor();
    const int64_t matrix = batch_index();
    if (matrix >= x.batch) return;
    const T* const source = static_cast<const T*>(x.data) + matrix * x.batch_stride;
    constexpr uint32_t kShare = kAmaxThreads * kAmaxVectors<T>;
    uint32_t largest = 0;
    for (uint32_t first = blockIdx.x * kShare; first < vectors; first += gridDim.x * kShare) {
        Vector<T> held[kAmaxVectors<T>];
#pragma unroll
        for (int j = 0; j < kAmaxVectors<T>; ++j) {
            const uint32_t index = first + j * kAmaxThreads + threadIdx.x;
            const Spot spot = spot_of<kWay>(index, across, x.row_stride, x.columns);
            if (index < vectors) held[j] = load_vector<kWay != Way::kAny>(source + spot.offset, spot.left);
        }
#pragma unroll
        for (int j = 0; j < kAmaxVectors<T>; ++j) largest = most_of(held[j], largest);
    }
    const uint32_t bits = block_largest(__float_as_uint(widen_most<T>(largest)));
    if (threadIdx.x != 0) return;
    if constexpr (kParts)
        most[matrix * gridDim.x + blockIdx.x] = __uint_as_float(bits);
    else
        atomicMax(reinterpret_cast<unsigned*>(most) + matrix, bits);
}

// How many thread blocks share a matrix.
template <class T, bool kParts>
uint32_t launch_amax(const Matrix& x, float* most, uintptr_t stream, const char* operation) {
    constexpr int64_t kShare = kAmaxThreads * kAmaxVectors<T>;
    const int64_t across = (x.columns + kVector - 1) / kVector, vectors = across * x.rows;
    require(vectors <= std::numeric_limits<int32_t>::max() - kMostParts * kShare,
            std::string(operation) + ": the matrix is too large for one launch");
    const int64_t parts = std::min((vectors + kShare - 1) / kShare, most_parts(x.batch));
    with_way(way_of<T>(x), [&](auto way) {
        launch(operation, amax_kernel<T, decltype(way)::value, kParts>, batch_grid(parts, x.batch, operation),
               dim3(kAmaxThreads), stream, x, Divisor(across, operation), static_cast<uint32_t>(vectors), most);
    });
    return static_cast<uint32_t>(parts);
}

// The amax of every matrix, in parts that `room` has place for.
template <class T>
Found find_amax(const Matrix& x, const Tensor& room, uintptr_t stream, const char* operation) {
    require(room.type == Type::kFloat32 && room.size(1) >= most_parts(x.batch) * x.batch,
            std::string(operation) + ": too little room for the amax");
    float* const most = static_cast<float*>(room.data);
    return {most, launch_amax<T, true>(x, most, stream, operation)};
}

}  // namespace lrq::cuda
