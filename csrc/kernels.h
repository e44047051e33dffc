// Every kernel of this library; the contracts are those of lrq_kernels/ops.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "tensor.h"

namespace lrq::cpu {

void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, std::optional<double> coherence,
                    const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, int threads);

void dequantize_nvfp4(const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, const Tensor& out,
                      int threads);

void quantize_mxfp8(const Tensor& x, std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    int threads);

void dequantize_mxfp8(const Tensor& codes, const Tensor& block_scales, const Tensor& out, int threads);

void pack_fp4(const Tensor& codes, bool high_first, const Tensor& out, int threads);

void unpack_fp4(const Tensor& packed, bool high_first, const Tensor& out, int threads);

void swizzle_scales(const Tensor& scales, const Tensor& out, int threads);

// `swizzled` is contiguous.
void unswizzle_scales(const Tensor& swizzled, const Tensor& out, int threads);

void amax(const Tensor& x, const Tensor& out, int threads);

// `group` of a rotation is 0 if there is none.
void quantize_fp8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                  const Tensor& codes, const Tensor& scale, int threads);

void dequantize_fp8(const Tensor& codes, const Tensor& scale, const Tensor& out, int threads);

void quantize_int8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                   int group, const Tensor& codes, const Tensor& scale, int threads);

void dequantize_int8(const Tensor& codes, const Tensor& scale, int group, const Tensor& out, int threads);

void rotate_hadamard(const Tensor& x, int group, const Tensor& out, int threads);

// What of a grid and of parts counts here: Grid and part_shape of lrq_kernels/ops/rounding_step.py.
void rounding_step(const Tensor& weight, const Tensor& values, const Tensor& scale, int64_t block_rows,
                   int64_t block_columns, const Tensor& gradient, const std::optional<Tensor>& row_curvature,
                   const std::optional<Tensor>& column_curvature, const Tensor& plain_weight, const Tensor& share,
                   uint32_t key, const std::tuple<int, int, float>& grid, int part_columns, const Tensor& new_values,
                   const Tensor& new_error, const Tensor& sums, int threads);

}  // namespace lrq::cpu

namespace lrq::cuda {

// Why kernels of this build can't run on the device; empty if they can.
std::string refusal(int device_index);

// `room` is float32 [slots] to work in, at least one slot a matrix, absent if the scale is given. With slots for the
// thread blocks of a whole GPU, too, one launch does it all.
void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, const std::optional<Tensor>& room,
                    std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    const Tensor& tensor_scale, uintptr_t stream);

void dequantize_nvfp4(const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, const Tensor& out,
                      uintptr_t stream);

void quantize_mxfp8(const Tensor& x, std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    uintptr_t stream);

void dequantize_mxfp8(const Tensor& codes, const Tensor& block_scales, const Tensor& out, uintptr_t stream);

void pack_fp4(const Tensor& codes, bool high_first, const Tensor& out, uintptr_t stream);

void unpack_fp4(const Tensor& packed, bool high_first, const Tensor& out, uintptr_t stream);

void swizzle_scales(const Tensor& scales, const Tensor& out, uintptr_t stream);

// `swizzled` is contiguous.
void unswizzle_scales(const Tensor& swizzled, const Tensor& out, uintptr_t stream);

void amax(const Tensor& x, const Tensor& out, uintptr_t stream);

// `room` as above, absent unless a matrix has one scale that is not given.
void quantize_fp8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                  const std::optional<Tensor>& room, const Tensor& codes, const Tensor& scale, uintptr_t stream);

void dequantize_fp8(const Tensor& codes, const Tensor& scale, const Tensor& out, uintptr_t stream);

// Rotates rows that have a scale each; otherwise `group` is 0.
void quantize_int8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                   const std::optional<Tensor>& room, int group, const Tensor& codes, const Tensor& scale,
                   uintptr_t stream);

void dequantize_int8(const Tensor& codes, const Tensor& scale, const Tensor& out, uintptr_t stream);

// From float32 to any type, or to float32 from any.
void rotate_hadamard(const Tensor& x, int group, const Tensor& out, uintptr_t stream);

void rounding_step(const Tensor& weight, const Tensor& values, const Tensor& scale, int64_t block_rows,
                   int64_t block_columns, const Tensor& gradient, const std::optional<Tensor>& row_curvature,
                   const std::optional<Tensor>& column_curvature, const Tensor& plain_weight, const Tensor& share,
                   uint32_t key, const std::tuple<int, int, float>& grid, int part_columns, const Tensor& new_values,
                   const Tensor& new_error, const Tensor& sums, uintptr_t stream);

}  // namespace lrq::cuda
