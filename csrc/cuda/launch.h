// Launches on the stream and device of the caller.
#pragma once

#include <cuda_runtime.h>

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

template <class... Parameters, class... Arguments>
void launch_sharing(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                    uintptr_t stream, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), operation);
    check(cudaGetLastError(), operation);
}

template <class... Parameters, class... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t stream,
            Arguments... arguments) {
    launch_sharing(operation, kernel, grid, block, 0, stream, arguments...);
}

}  // namespace lrq::cuda
