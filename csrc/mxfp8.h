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

// What search.h does, for scales that are powers of two. Doubling such a scale moves no weight, until one becomes
// subnormal: the candidates before that tie with the start, and the smaller wins a tie. Every error is exact, so |E|^2
// never falls as the scale doubles, rounding included: the bound upwards needs no slack, and without coherence nothing
// above the start can win. One loop goes both ways, so that threads of a warp stay together.
class Search {
  public:
    LRQ_INLINE Search(const float (&block)[kBlock], float amax, float coherence) : block_(block), amax_(amax) {
        gain_ = 0.0f;
        if (coherence == 0.0f) return;
        float squares[kBlock];
#ifdef __CUDA_ARCH__
        // Without a branch, and the bits of the division wherever the square does not vanish: amax in [224, 448] times
        // a power of two, its reciprocal correctly rounded, and two corrections, the last from a faithful quotient
        // (Markstein 1990).
        const float unit = reciprocal(ruled_exponent(amax));
        const float divisor = amax * unit;
        const float inverse = __frcp_rn(divisor);
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            const float y = magnitude(block[i]) * unit;
            float relative = y * inverse;
            relative = __fmaf_rn(__fmaf_rn(-divisor, relative, y), inverse, relative);
            relative = __fmaf_rn(__fmaf_rn(-divisor, relative, y), inverse, relative);
            squares[i] = relative * relative;
        }
#else
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            const float relative = divide(magnitude(block[i]), amax);
            squares[i] = relative * relative;
        }
#endif
        gain_ = divide(coherence, tree_sum(squares));
    }

    LRQ_INLINE int best_code(int start) {
        float bound = -INFINITY;
        bool overflows = false;
        int code = start;
        for (bool down = true;;) {
            const float plain = visit(code);
            if (code == start) overflows = !(best_ < INFINITY);
            if (code >= start) bound = plain;
            if (down) {
                down = --code >= 1 && can_win_down(code);
                if (down) continue;
                if (!can_win_up(bound)) return best_code_;
                const int coarser = overflows ? 0 : first_coarser();
                code = coarser > start ? coarser : start + 1;
            } else {
                ++code;
            }
            if (code > kLastExponent || rounds_to_zero(code) || !can_win_up(bound)) return best_code_;
        }
    }

  private:
    // The bounds hold in exact arithmetic; this much of them is given up to float32.
    static constexpr float kSlack = 0.999f;
    // Below it, squares may be subnormal and errors no longer exact.
    static constexpr float kInexact = 1e-20f;

    LRQ_INLINE bool rounds_to_zero(int code) const {
        return !(0x1p-10f * decode_e8m0(static_cast<uint32_t>(code)) < amax_);
    }

    LRQ_INLINE bool can_win_up(float bound) const {
        return bound < best_ || (bound < kInexact && bound * kSlack <= best_);
    }

    // Below amax the largest weight alone costs (1 - 448 * scale/amax)^2, which grows as the scale falls.
    LRQ_INLINE bool can_win_down(int code) const {
        const float open = 1.0f - kE4M3Max * divide(decode_e8m0(static_cast<uint32_t>(code)), amax_);
        const float clipped = open > 0.0f ? open : 0.0f;
        return clipped * clipped * kSlack <= best_;
    }

    // The first code whose grid is coarser than that of the code before at the smallest weight but zeros; 0 if unknown.
    LRQ_INLINE int first_coarser() const {
        uint32_t least = 0xffffffffu;
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            // Zero becomes the largest.
            const uint32_t before = to_bits(magnitude(block_[i])) - 1u;
            least = before < least ? before : least;
        }
        const int exponent = static_cast<int>((least + 1u) >> 23);
        return exponent == 0 ? 0 : exponent + 7;
    }

    LRQ_INLINE float visit(int code) {
        const float inverse = reciprocal(static_cast<uint32_t>(code));
        float squares[kBlock], products[kBlock];
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) {
            const float y = magnitude(block_[i]) * inverse;
            const float error = nearest_e4m3(y) - y;
            squares[i] = error * error;
            products[i] = error * y;
        }
        const float ratio = divide(decode_e8m0(static_cast<uint32_t>(code)), amax_);
        const float square = ratio * ratio;
        const float plain = square * tree_sum(squares);
        const float along = tree_sum(products);
        const float value = plain + square * (gain_ * (square * (along * along)));
        if (!rounds_to_zero(code) && (value < best_ || (value == best_ && code < best_code_))) {
            best_ = value;
            best_code_ = code;
        }
        return plain;
    }

    const float (&block_)[kBlock];
    float amax_;
    float gain_;
    float best_ = INFINITY;
    int best_code_ = 0;
};

LRQ_INLINE uint32_t best_exponent(const float (&block)[kBlock], float amax, float coherence) {
    const uint32_t start = ruled_exponent(amax);
    if (start == 0) return 0;
    Search search(block, amax, coherence);
    return static_cast<uint32_t>(search.best_code(static_cast<int>(start)));
}

}  // namespace lrq::mxfp8
