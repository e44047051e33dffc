// One step of discrete rounding: which weights move to a neighbour on their grid; host and device, the same bits.
#pragma once

#include <optional>
#include <tuple>

#include "matrix.h"
#include "minifloat.h"

namespace lrq::rounding_step {

constexpr int kPart = 2048;
// A bit more than half of a step's own curvature: noise moves nothing.
constexpr float kHalf = 0.5f + 0x1p-14f;

struct Grid {
    int mantissa, least_octave;
    float largest;
};

// Scales, curvatures and outputs are contiguous; a part has 2^column_bits columns.
struct Layout {
    Matrix weight, values, gradient;
    const float *scales, *row_curvature, *column_curvature, *plain_weight, *share;  // a curvature may be null: ones
    int64_t block_rows, block_columns, scale_rows, scale_columns;
    uint32_t key;
    Grid grid;
    int column_bits;
    BFloat16 *new_values, *new_error;
    float* sums;

    LRQ_INLINE int part_columns() const { return 1 << column_bits; }
    LRQ_INLINE int part_rows() const { return kPart >> column_bits; }
    int64_t parts_down() const { return (weight.rows + part_rows() - 1) / part_rows(); }
    int64_t parts_across() const { return (weight.columns + part_columns() - 1) / part_columns(); }
};

inline Layout layout_of(const Tensor& weight, const Tensor& values, const Tensor& scale, int64_t block_rows,
                        int64_t block_columns, const Tensor& gradient, const std::optional<Tensor>& row_curvature,
                        const std::optional<Tensor>& column_curvature, const Tensor& plain_weight, const Tensor& share,
                        uint32_t key, const std::tuple<int, int, float>& grid, int part_columns,
                        const Tensor& new_values, const Tensor& new_error, const Tensor& sums,
                        const std::string& operation) {
    const auto floats = [&](const Tensor& x) {
        require(x.type == Type::kFloat32, operation + ": scales, curvatures, plain_weight and sums must be float32");
        return static_cast<float*>(x.data);
    };
    const auto bfloats = [&](const Tensor& x) {
        require(x.type == Type::kBFloat16, operation + ": values and errors must be bfloat16");
        return static_cast<BFloat16*>(x.data);
    };
    Layout layout{};
    layout.weight = matrix_of(weight, operation);
    bfloats(values);
    layout.values = matrix_of(values, operation);
    layout.gradient = matrix_of(gradient, operation);
    layout.scales = floats(scale);
    layout.row_curvature = row_curvature ? floats(*row_curvature) : nullptr;
    layout.column_curvature = column_curvature ? floats(*column_curvature) : nullptr;
    layout.plain_weight = floats(plain_weight);
    layout.share = floats(share);
    layout.block_rows = block_rows;
    layout.block_columns = block_columns;
    layout.scale_rows = scale.size(2);
    layout.scale_columns = scale.size(1);
    layout.key = key;
    layout.grid = {std::get<0>(grid), std::get<1>(grid), std::get<2>(grid)};
    while (layout.part_columns() < part_columns && layout.part_rows() > 1) ++layout.column_bits;
    layout.new_values = bfloats(new_values);
    layout.new_error = bfloats(new_error);
    layout.sums = floats(sums);
    require(sums.size(2) == layout.parts_down() * layout.parts_across(), operation + ": the sums are of other parts");
    return layout;
}

// The hash of a weight, 24 bits: the first rounds of lowbias32 (Wellons, 2018).
LRQ_INLINE uint32_t fraction(uint32_t index, uint32_t key) {
    uint32_t x = index ^ key;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x >> 8;
}

// Hashes below it are the share.
LRQ_INLINE uint32_t fraction_of(float share) {
    const float most = share * 0x1p24f < 0x1p24f ? share * 0x1p24f : 0x1p24f;
    return share > 0.0f ? static_cast<uint32_t>(ceilf(most)) : 0u;
}

struct Weight {
    float value, error;
    uint32_t moves;  // 0 or 1
};

// `curvature` includes `plain`.
LRQ_INLINE Weight step(float weight, float value, float scale, float gradient, float curvature, float plain,
                       bool chosen, Grid grid) {
    const float error = value * scale - weight;
    const float slope = gradient + plain * error;
    const int32_t value_bits = static_cast<int32_t>(to_bits(value)), slope_bits = static_cast<int32_t>(to_bits(slope));
    // Towards zero, the step below a power of two is that of the octave below.
    const int32_t towards_zero = ((value_bits ^ slope_bits) >> 31) + 1;
    const int32_t inner = (value_bits & 0x7fffffff) - towards_zero;
    const int32_t octave = (inner > grid.least_octave ? inner : grid.least_octave) & 0x7f800000;
    const float gap = from_bits(static_cast<uint32_t>(octave - (grid.mantissa << 23)));
    const float moved = value - from_bits(to_bits(gap) | (to_bits(slope) & 0x80000000u));
    const float least = curvature * scale * (gap * kHalf);
    // Masks: of conditions GCC would make branches.
    const auto mask = [](bool holds) { return -static_cast<uint32_t>(holds); };
    const uint32_t moves =
        mask(chosen) & mask(least > 0.0f) & mask(magnitude(slope) > least) & mask(magnitude(moved) <= grid.largest);
    const float target = from_bits((to_bits(moved) & moves) | (to_bits(value) & ~moves));
    return {target, target * scale - weight, moves & 1u};
}

}  // namespace lrq::rounding_step
