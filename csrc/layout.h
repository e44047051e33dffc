// The layout of a call, from its tensors: host only.
#pragma once

#include <optional>

#include "nvfp4.h"
#include "tensor.h"

namespace lrq::nvfp4 {

inline Layout layout_of(const Tensor& x, const std::optional<Tensor>& given_scale, const Tensor& codes,
                        const Tensor& block_scales, const Tensor& tensor_scale) {
    require(codes.type == Type::kUInt8 && block_scales.type == Type::kFloat8E4M3, "quantize_nvfp4: types of outputs");
    require(tensor_scale.type == Type::kFloat32, "quantize_nvfp4: tensor_scale must be float32");
    require(!given_scale || given_scale->type == Type::kFloat32, "quantize_nvfp4: the given scale must be float32");
    Layout layout{};
    layout.x = matrix_of(x, "quantize_nvfp4");
    layout.codes = static_cast<uint8_t*>(codes.data);
    layout.code_rows = codes.size(2);
    layout.blocks = codes.size(1) / (kBlock / 2);
    layout.scales = static_cast<uint8_t*>(block_scales.data);
    layout.row_tiles = block_scales.size(2) / kTileRows;
    layout.column_tiles = block_scales.size(1) / kTileColumns;
    layout.given_scale = given_scale ? static_cast<const float*>(given_scale->data) : nullptr;
    layout.given_stride = given_scale ? given_scale->stride(1) : 0;
    layout.tensor_scale = static_cast<float*>(tensor_scale.data);
    require(layout.blocks * kBlock >= layout.x.columns && layout.code_rows >= layout.x.rows &&
                layout.column_tiles * kTileColumns >= layout.blocks && layout.row_tiles * kTileRows >= layout.code_rows,
            "quantize_nvfp4: the outputs are too small for x");
    return layout;
}

}  // namespace lrq::nvfp4
