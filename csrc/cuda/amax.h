// Largest magnitude of every matrix; a NaN wins.
#pragma once

#include "vector.h"

namespace lrq::cuda {

constexpr int kAmaxThreads = 256;
constexpr int kAmaxWarps = kAmaxThreads / kWarpSize;
// Enough thread blocks to fill any GPU; each then takes several rows, and the atomics stay few.
constexpr int64_t kAmaxBlocks = 4096;

// A warp takes a row. `amax` starts as zeros: the order of the bits is that of the magnitudes.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kAmaxThreads) amax_kernel(Matrix x, unsigned* amax) {
    constexpr int kLoads = 4;
    const int64_t matrix = batch_index();
    if (matrix >= x.batch) return;
    const T* const source = static_cast<const T*>(x.data) + matrix * x.batch_stride;
    uint32_t most = 0;
    for (int64_t row = blockIdx.x * int64_t{kAmaxWarps} + threadIdx.x / kWarpSize; row < x.rows;
         row += gridDim.x * int64_t{kAmaxWarps}) {
        for (int64_t first = threadIdx.x % kWarpSize * kVector; first < x.columns;
             first += kLoads * kWarpSize * kVector) {
            Vector<T> vectors[kLoads];
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const int64_t column = first + j * kWarpSize * kVector, left = x.columns - column;
                if (left > 0) vectors[j] = load_vector<kAligned>(source + row * x.row_stride + column, left);
            }
#pragma unroll
            for (int j = 0; j < kLoads; ++j) most = most_of(vectors[j], most);
        }
    }
    const uint32_t bits = block_largest(__float_as_uint(widen_most<T>(most)));
    if (threadIdx.x == 0) atomicMax(amax + matrix, bits);
}

template <class T>
void launch_amax(const Matrix& x, float* amax, uintptr_t stream, const char* operation) {
    const int64_t blocks = std::min((x.rows + kAmaxWarps - 1) / kAmaxWarps, kAmaxBlocks);
    check(cudaMemsetAsync(amax, 0, x.batch * sizeof(float), reinterpret_cast<cudaStream_t>(stream)), operation);
    const auto kernel = is_aligned_throughout<T>(x) ? amax_kernel<T, true> : amax_kernel<T, false>;
    launch(operation, kernel, batch_grid(blocks, x.batch, operation), dim3(kAmaxThreads), stream, x,
           reinterpret_cast<unsigned*>(amax));
}

}  // namespace lrq::cuda
