// Kernels whose scale needs the amax of the whole matrix first, in one launch: thread blocks that all run at once find
// it, wait for each other, and quantize. Part of the matrix stays on chip in between, the end of the rest in L2.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <mutex>

#include "vector.h"

namespace lrq::cuda {

// Matrices fall into units of equal work, one thread block's at a time, numbered through the batch.
struct Units {
    int64_t count;
    uint32_t of_matrix;

    // Thread block `block` of `blocks` takes the units from here up to the first of the next.
    __device__ __forceinline__ int64_t first(uint32_t block, uint32_t blocks) const { return count * block / blocks; }

    // The thread block that takes a unit.
    __device__ __forceinline__ uint32_t taker(int64_t unit, uint32_t blocks) const {
        return static_cast<uint32_t>(((unit + 1) * blocks + count - 1) / count - 1);
    }
};

// Of all threads of the block, for all of them, as often as wanted.
__device__ __forceinline__ uint32_t block_largest_again(uint32_t bits) {
    const uint32_t most = block_largest(bits);
    __syncthreads();
    return most;
}

// The largest magnitude of a matrix from what each of its thread blocks found. Thread blocks and matrices both grow
// along the units, so their sum names a pair of them: the slots of a matrix are neighbours.
__device__ __forceinline__ float gathered(const float* found, const Units& units, uint32_t matrix) {
    const int64_t first = int64_t{matrix} * units.of_matrix;
    const uint32_t from = units.taker(first, gridDim.x), to = units.taker(first + units.of_matrix - 1, gridDim.x);
    uint32_t most = 0;
    for (uint32_t block = from + threadIdx.x; block <= to; block += blockDim.x)
        most = max(most, __float_as_uint(__ldcg(found + block + matrix)));
    return __uint_as_float(block_largest_again(most));
}

// `Unit` holds kThreads, kBlocks (on a multiprocessor), a Layout, Held (what a thread holds of a unit: kWords words,
// word(i)), load(layout, matrix, unit, held), most(held) as bits and quantize(layout, matrix, unit, held, amax). The
// first `kept` units of a thread block stay in shared memory.
template <class Unit>
__global__ void __launch_bounds__(Unit::kThreads, Unit::kBlocks)
    resident_kernel(typename Unit::Layout layout, Units units, int kept, float* found) {
    extern __shared__ uint4 room[];
    constexpr int kVectors = Unit::Held::kWords / 4;
    const int64_t begin = units.first(blockIdx.x, gridDim.x);
    const int count = static_cast<int>(units.first(blockIdx.x + 1, gridDim.x) - begin);
    uint32_t matrix = static_cast<uint32_t>(begin / units.of_matrix);
    uint32_t unit = static_cast<uint32_t>(begin - int64_t{matrix} * units.of_matrix);
    const auto slot = [&](int u, int i) -> uint4& { return room[(u * kVectors + i) * Unit::kThreads + threadIdx.x]; };
    typename Unit::Held held;

    uint32_t most = 0;
    for (int u = 0; u < count; ++u) {
        Unit::load(layout, matrix, unit, held);
        if (u < kept) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i)
                slot(u, i) =
                    make_uint4(held.word(4 * i), held.word(4 * i + 1), held.word(4 * i + 2), held.word(4 * i + 3));
        }
        most = max(most, Unit::most(held));
        if (++unit == units.of_matrix || u + 1 == count) {
            const uint32_t all = block_largest_again(most);
            if (threadIdx.x == 0) found[blockIdx.x + matrix] = __uint_as_float(all);
            most = 0;
            if (u + 1 < count) unit = 0, ++matrix;
        }
    }
    cooperative_groups::this_grid().sync();

    float amax = gathered(found, units, matrix);
    for (int u = count - 1; u >= 0; --u) {
        --unit;
        if (u < kept) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const uint4 vector = slot(u, i);
                held.word(4 * i) = vector.x, held.word(4 * i + 1) = vector.y;
                held.word(4 * i + 2) = vector.z, held.word(4 * i + 3) = vector.w;
            }
        } else {
            Unit::load(layout, matrix, unit, held);
        }
        Unit::quantize(layout, matrix, unit, held, amax);
        if (unit == 0 && u > 0) {
            unit = units.of_matrix, --matrix;
            amax = gathered(found, units, matrix);
        }
    }
}

// How many thread blocks of a kernel run at once, and what they keep: asked once for every device.
struct Residency {
    static constexpr int kMostDevices = 64;
    std::once_flag asked[kMostDevices];
    int blocks[kMostDevices] = {}, kept[kMostDevices] = {};
};

template <class Unit>
std::pair<int, int> residency_on(int device, const char* operation) {
    static Residency known;
    if (device >= Residency::kMostDevices) return {0, 0};
    std::call_once(known.asked[device], [&] {
        constexpr int kUnitBytes = Unit::Held::kWords * Unit::kThreads * sizeof(uint32_t);
        // Of what a block has besides: its static part, and what the system takes of every block.
        constexpr int kBesides = 2048;
        int processors, shared, per_processor, cooperative;
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), operation);
        check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), operation);
        check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), operation);
        if (!cooperative) return;
        const auto kernel = resident_kernel<Unit>;
        const int kept = std::max(0, (shared / Unit::kBlocks - kBesides) / kUnitBytes);
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kept * kUnitBytes), operation);
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, Unit::kThreads, kept * kUnitBytes),
              operation);
        known.blocks[device] = processors * per_processor;
        known.kept[device] = kept;
    });
    return {known.blocks[device], known.kept[device]};
}

// Whether it was launched: `slots` is room for one number of every thread block and matrix, `found` its memory.
template <class Unit>
bool launch_resident(const typename Unit::Layout& layout, int64_t matrices, int64_t units_of_matrix, float* found,
                     int64_t slots, int device, uintptr_t stream, const char* operation) {
    const auto [blocks, kept] = residency_on<Unit>(device, operation);
    const int64_t count = matrices * units_of_matrix;
    const auto grid = static_cast<unsigned>(std::min<int64_t>(count, blocks));
    // Thread blocks count their units in 32 bits, and the products in Units take 64.
    if (grid == 0 || grid + matrices > slots || units_of_matrix >= int64_t{1} << 31 || count >= int64_t{1} << 34)
        return false;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(Unit::kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(kept) * Unit::Held::kWords * Unit::kThreads * sizeof(uint32_t);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const Units units{count, static_cast<uint32_t>(units_of_matrix)};
    check(cudaLaunchKernelEx(&config, resident_kernel<Unit>, layout, units, kept, found), operation);
    return true;
}

}  // namespace lrq::cuda
