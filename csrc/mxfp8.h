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

// What search.h does, for scales that are powers of two, in units in which the scale of the start is 1. Doubling such a
// scale moves no weight, until one becomes subnormal: the candidates before that tie with the start, and the smaller
// wins a tie. Every error is exact, so |E|^2 never falls as the scale doubles, rounding included: the bound upwards
// needs no slack, and without coherence nothing above the start can win. One loop goes both ways, so that threads of a
// warp stay together.
class Search {
  public:
    LRQ_INLINE Search(const float (&block)[kBlock], float amax, int start, float coherence) : start_(start) {
        const float unit = reciprocal(static_cast<uint32_t>(start));
        amax_ = amax * unit;
        float squares[kBlock];
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            magnitudes_[i] = magnitude(block[i]) * unit;
            squares[i] = magnitudes_[i] * magnitudes_[i];
        }
        gain_ = divide(coherence, tree_sum(squares));
    }

    LRQ_INLINE int best_exponent() {
        float bound = visit(0);
        int step = 0;
        for (bool down = true;;) {
            if (down) {
                down = --step >= least_step() && can_win_down(step);
                if (!down) step = first_coarser() - 1;
            }
            if (!down && (++step > kLastExponent - start_ || rounds_to_zero(step) || !can_win_up(bound)))
                return start_ + best_step_;
            const float plain = visit(step);
            if (step > 0) bound = plain;
        }
    }

  private:
    // The bound holds in exact arithmetic; this much of it is given up to float32.
    static constexpr float kSlack = 0.999f;
    // Below it, squares may be subnormal and errors no longer exact.
    static constexpr float kInexact = 1e-10f;
    // So far below the start the squares overflow, and nothing wins.
    static constexpr int kLeastStep = -100;

    static LRQ_INLINE float power(int step) { return from_bits(static_cast<uint32_t>(127 + step) << 23); }

    LRQ_INLINE int least_step() const { return 1 - start_ > kLeastStep ? 1 - start_ : kLeastStep; }

    LRQ_INLINE bool rounds_to_zero(int step) const { return !(0x1p-10f * power(step) < amax_); }

    LRQ_INLINE bool can_win_up(float bound) const {
        return bound < best_ || (bound < kInexact && bound * kSlack <= best_);
    }

    // Below amax the largest weight alone costs (amax - 448 * scale)^2, which grows as the scale falls.
    LRQ_INLINE bool can_win_down(int step) const {
        const float open = amax_ - kE4M3Max * power(step);
        const float clipped = open > 0.0f ? open : 0.0f;
        return clipped * clipped * kSlack <= best_;
    }

    // The first step up to a grid that is coarser at the smallest weight but zeros than the one before.
    LRQ_INLINE int first_coarser() const {
        uint32_t least = 0xffffffffu;
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            // Zero becomes the largest.
            const uint32_t before = to_bits(magnitudes_[i]) - 1u;
            least = before < least ? before : least;
        }
        const int step = static_cast<int>((least + 1u) >> 23) - 120;
        return step > 1 ? step : 1;
    }

    LRQ_INLINE float visit(int step) {
        const float inverse = power(-step);
        float squares[kBlock], products[kBlock];
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            const float y = magnitudes_[i] * inverse;
            const float error = nearest_e4m3(y) - y;
            squares[i] = error * error;
            products[i] = error * y;
        }
        const float square = power(step) * power(step);
        const float plain = square * tree_sum(squares);
        const float along = square * tree_sum(products);
        const float value = plain + gain_ * (along * along);
        // Steps come in order, those down first: of equal values the smaller scale wins.
        if (value < best_ || (value == best_ && step < best_step_)) {
            best_ = value;
            best_step_ = step;
        }
        return plain;
    }

    float magnitudes_[kBlock];
    float amax_, gain_;
    int start_;
    float best_ = INFINITY;
    int best_step_ = 0;
};

LRQ_INLINE uint32_t best_exponent(const float (&block)[kBlock], float amax, float coherence) {
    const uint32_t start = ruled_exponent(amax);
    if (start == 0) return 0;
    Search search(block, amax, static_cast<int>(start), coherence);
    return static_cast<uint32_t>(search.best_exponent());
}

}  // namespace lrq::mxfp8
