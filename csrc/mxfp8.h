// MXFP8 of one block of 32, and where a matrix keeps its codes and scales; host and device.
#pragma once

#include "e4m3.h"
#include "matrix.h"
#include "search.h"
#include "swizzle.h"

namespace lrq::mxfp8 {

constexpr int kBlock = 32;
constexpr int kLastExponent = 254;

// Codes and scales are contiguous; strides count elements.
struct Layout {
    Matrix x;
    uint8_t* codes;
    int64_t code_rows, blocks;
    uint8_t* scales;
    int64_t row_tiles, column_tiles;
};

inline Layout layout_of(const Tensor& x, const Tensor& codes, const Tensor& block_scales) {
    require(codes.type == Type::kFloat8E4M3 && block_scales.type == Type::kUInt8, "quantize_mxfp8: types of outputs");
    Layout layout{};
    layout.x = matrix_of(x, "quantize_mxfp8");
    layout.codes = static_cast<uint8_t*>(codes.data);
    layout.code_rows = codes.size(2);
    layout.blocks = codes.size(1) / kBlock;
    layout.scales = static_cast<uint8_t*>(block_scales.data);
    layout.row_tiles = block_scales.size(2) / kTileRows;
    layout.column_tiles = block_scales.size(1) / kTileColumns;
    require(layout.blocks * kBlock >= layout.x.columns && layout.code_rows >= layout.x.rows &&
                layout.column_tiles * kTileColumns >= layout.blocks && layout.row_tiles * kTileRows >= layout.code_rows,
            "quantize_mxfp8: the outputs are too small for x");
    return layout;
}

// The smallest e with amax <= 448 * 2^(e-127), 0 for a block that counts as zero. 448 is 1.75 * 2^8: e is the exponent
// of amax less 8, and one more where the mantissa is above 1.75. The rounded quotient amax/448 has the same exponent.
LRQ_INLINE uint32_t ruled_exponent(float amax) {
    const int32_t exponent = static_cast<int32_t>((to_bits(amax) + 0x1fffffu) >> 23) - 8;
    return exponent > 0 ? static_cast<uint32_t>(exponent) : 0u;
}

// 1/2^(exponent-127): a product with it has the bits of the quotient.
LRQ_INLINE float reciprocal(uint32_t exponent) { return decode_e8m0(kLastExponent - exponent); }

// The sum of `term(i) + term(i + 16)`, i below 16, in the order of `tree_sum`.
template <int kSize = 1, class Term>
LRQ_INLINE auto sum_of_pairs(const Term& term, int first = 0) {
    if constexpr (2 * kSize == kBlock) {
        return term(first);
    } else {
        return sum_of_pairs<2 * kSize>(term, first) + sum_of_pairs<2 * kSize>(term, first + kSize);
    }
}

struct Sums {
    float squares, products;
    LRQ_INLINE Sums operator+(Sums other) const { return {squares + other.squares, products + other.products}; }
};

// Of E^2 and EW of a block that is multiplied by `factor`, a power of two, first.
LRQ_INLINE Sums errors_of(const float (&block)[kBlock], float factor) {
    const auto sums = [&](int i) {
        const float y[2] = {magnitude(block[i]) * factor, magnitude(block[i + kBlock / 2]) * factor};
        float nearest[2];
        nearest_e4m3x2(y, nearest);
        const float error[2] = {nearest[0] - y[0], nearest[1] - y[1]};
        return Sums{error[0] * error[0] + error[1] * error[1], error[0] * y[0] + error[1] * y[1]};
    };
#ifdef __CUDA_ARCH__
    return sum_of_pairs(sums);
#else
    // In arrays, which compilers make vectors of.
    float squares[kBlock / 2], products[kBlock / 2];
    LRQ_UNROLL
    for (int i = 0; i < kBlock / 2; ++i) {
        const Sums both = sums(i);
        squares[i] = both.squares, products[i] = both.products;
    }
    return {tree_sum(squares), tree_sum(products)};
#endif
}

// |E|^2 + gain <E,W>^2 from the sums under a scale.
LRQ_INLINE float objective(Sums sums, float scale, float gain) {
    const float area = scale * scale, along = area * sums.products;
    return area * sums.squares + gain * (along * along);
}

// The better one of the rule's exponent and the one below, under which the largest weights saturate. One above moves
// only small weights, to a coarser grid.
LRQ_INLINE uint32_t best_exponent(const float (&block)[kBlock], float amax, float coherence) {
    const uint32_t start = ruled_exponent(amax);
    if (start < 2) return start;
    // In units in which the scale of the start is 1.
    const float unit = reciprocal(start);
    const auto square = [&](int i) {
        const float one = block[i] * unit, other = block[i + kBlock / 2] * unit;
        return one * one + other * other;
    };
    const float gain = divide(coherence, sum_of_pairs(square));
    const float here = objective(errors_of(block, unit), 1.0f, gain);
    return objective(errors_of(block, unit * 2.0f), 0.5f, gain) <= here ? start - 1 : start;
}

}  // namespace lrq::mxfp8
