// Every kernel of this library; the contracts are those of lrq_kernels/ops.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "tensor.h"

namespace lrq::cpu {

void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, std::optional<double> coherence,
                    const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, int threads);

}  // namespace lrq::cpu

namespace lrq::cuda {

// Why kernels of this build can't run on the device; empty if they can.
std::string refusal(int device_index);

// `amax` is a float32 [B] of zeros to work in, absent if the scale is given.
void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, const std::optional<Tensor>& amax,
                    std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    const Tensor& tensor_scale, uintptr_t stream);

}  // namespace lrq::cuda
