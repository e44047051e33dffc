// Launches on the stream and device of the caller.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lrq::cuda {

inline void check(cudaError_t status, const char* operation) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(status));
}

// Selects a device, and the one before it at the end.
class DeviceGuard {
  public:
    DeviceGuard(int index, const char* operation) {
        check(cudaGetDevice(&before_), operation);
        selected_ = index != before_;
        if (selected_) check(cudaSetDevice(index), operation);
    }
    ~DeviceGuard() {
        if (selected_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool selected_ = false;
};

// Every kernel starts with it: the one before it on the stream need not have ended when it begins (CUDA Programming
// Guide, programmatic dependent launch). What comes after sees all that the one before has written.
__device__ __forceinline__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Each thread block pays for beginning early; many short ones lose more by it than the launch gains.
constexpr uint64_t kMostEarlyBlocks = 1 << 15;

// What is known of a device is remembered for so many of them.
constexpr int kMostDevices = 64;

// Whether kernels of the current device may begin before the one before them has ended. A device runs the code of its
// own major version only, so theirs await it.
inline bool may_begin_early(const char* operation) {
    static std::atomic<int> major_of[kMostDevices];
    int device = 0;
    check(cudaGetDevice(&device), operation);
    if (device >= kMostDevices) return false;
    int major = major_of[device].load(std::memory_order_relaxed);
    if (major == 0) {
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), operation);
        major_of[device].store(major, std::memory_order_relaxed);
    }
    return major >= 9;
}

// Thread blocks as large as a kernel's bound on the current device, and how many of them run at a time there.
struct Resident {
    uint32_t blocks, threads;
};

template <auto kKernel>
Resident resident(const char* operation) {
    static std::atomic<Resident> found[kMostDevices];
    int device = 0;
    check(cudaGetDevice(&device), operation);
    Resident all = device < kMostDevices ? found[device].load(std::memory_order_relaxed) : Resident{};
    if (all.blocks == 0) {
        int multiprocessors = 0, blocks = 0;
        cudaFuncAttributes attributes{};
        check(cudaFuncGetAttributes(&attributes, kKernel), operation);
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), operation);
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, attributes.maxThreadsPerBlock, 0),
              operation);
        all = {static_cast<uint32_t>(multiprocessors * blocks), static_cast<uint32_t>(attributes.maxThreadsPerBlock)};
        if (device < kMostDevices) found[device].store(all, std::memory_order_relaxed);
    }
    return all;
}

template <class... Parameters, class... Arguments>
void launch_sharing(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                    uintptr_t stream, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    const bool few = uint64_t{grid.x} * grid.y * grid.z <= kMostEarlyBlocks;
    config.numAttrs = few && may_begin_early(operation) ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), operation);
    check(cudaGetLastError(), operation);
}

template <class... Parameters, class... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t stream,
            Arguments... arguments) {
    launch_sharing(operation, kernel, grid, block, 0, stream, arguments...);
}

}  // namespace lrq::cuda
