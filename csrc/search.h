// The block scale that minimises |E|^2 + g <E,W>^2/|W|^2: the loops, bounds and order of additions of
// lrq_kernels/reference/search.py, which derives them; a thread a block. On a CPU, cpu/lanes.h.
#pragma once

#include "quotient.h"

namespace lrq {

// Halves are added until one is left: the order every backend keeps.
template <int kSize>
LRQ_INLINE float tree_sum(const float (&terms)[kSize]) {
    if constexpr (kSize == 1) {
        return terms[0];
    } else {
        float halves[kSize / 2];
        LRQ_UNROLL
        for (int i = 0; i < kSize / 2; ++i) halves[i] = terms[i] + terms[i + kSize / 2];
        return tree_sum(halves);
    }
}

// `Candidates` holds kSize, kFirst, kLast, kOctave, kDoublesFrom, kLargest, kZeroBelow,
// nearest(y) and scale(code), in the units of the block.
template <class Candidates>
class Search {
  public:
    // The objective is even in W: only magnitudes enter, and the signs of zero sums cancel in squares.
    LRQ_INLINE Search(const float (&magnitudes)[Candidates::kSize], float amax, float coherence, Candidates candidates)
        : magnitudes_(magnitudes), amax_(amax), candidates_(candidates) {
        float squares[kSize];
        LRQ_UNROLL
        for (int i = 0; i < kSize; ++i) squares[i] = magnitudes[i] * magnitudes[i];
        gain_ = divide(coherence, tree_sum(squares));
    }

    // Upwards from `start` first, then downwards, in one loop: threads of a warp stay together.
    LRQ_INLINE int best_code(int start) {
        // Doubling a scale can't lower |E|^2, so every phase of the octave has its own bound. The bounds move through
        // the array, one place a step: indices stay constant, and a GPU keeps them in registers.
        float bounds[kOctave];
        LRQ_UNROLL
        for (int i = 0; i < kOctave; ++i) bounds[i] = -INFINITY;
        int code = start;
        for (bool upwards = true;;) {
            const float plain = visit(code);
            if (upwards) {
                float bound = code + kOctave >= Candidates::kDoublesFrom ? plain : -INFINITY;
                do {
                    LRQ_UNROLL
                    for (int i = 1; i < kOctave; ++i) bounds[i - 1] = bounds[i];
                    bounds[kOctave - 1] = bound;
                    bound = bounds[0];
                    upwards = ++code <= Candidates::kLast && any_can_win(bounds);
                } while (upwards && !can_win(bound));
                if (!upwards) code = start;
            }
            if (!upwards && (--code < Candidates::kFirst || !can_win_below(code))) return best_code_;
        }
    }

  private:
    static constexpr int kSize = Candidates::kSize;
    static constexpr int kOctave = Candidates::kOctave;
    // The bounds hold in exact arithmetic; this much of them is given up to float32.
    static constexpr float kSlack = 0.999f;

    LRQ_INLINE float visit(int code) {
        const float scale = candidates_.scale(code);
        float squares[kSize], products[kSize];
        if (TwoPartReciprocal::serves(scale)) {
            const TwoPartReciprocal reciprocal(scale);
            const float inverse = reciprocal.high();
            LRQ_UNROLL
            for (int i = 0; i < kSize; ++i) {
                const float y = magnitudes_[i] * inverse;
                const float error = Candidates::nearest(reciprocal.times(magnitudes_[i])) - y;
                squares[i] = error * error;
                products[i] = error * y;
            }
        } else {
            const float inverse = reciprocal_of(scale);
            LRQ_UNROLL
            for (int i = 0; i < kSize; ++i) {
                const float y = magnitudes_[i] * inverse;
                const float error = Candidates::nearest(divide(magnitudes_[i], scale)) - y;
                squares[i] = error * error;
                products[i] = error * y;
            }
        }
        const float square = scale * scale;
        const float plain = square * tree_sum(squares);
        const float along = square * tree_sum(products);
        const float value = plain + gain_ * (along * along);
        const bool rounds_to_zero = !(Candidates::kZeroBelow * scale < amax_);
        if (!rounds_to_zero && (value < best_ || (value == best_ && code < best_code_))) {
            best_ = value;
            best_code_ = code;
        }
        return plain;
    }

    LRQ_INLINE bool can_win(float bound) const { return bound * kSlack <= best_; }

    LRQ_INLINE bool any_can_win(const float (&bounds)[kOctave]) const {
        bool any = false;
        LRQ_UNROLL
        for (int i = 0; i < kOctave; ++i) any |= can_win(bounds[i]);
        return any;
    }

    // Below amax the largest weight alone costs (amax - max * scale)^2, which grows as the scale falls.
    LRQ_INLINE bool can_win_below(int code) const {
        const float open = amax_ - Candidates::kLargest * candidates_.scale(code);
        const float clipped = open > 0.0f ? open : 0.0f;
        return can_win(clipped * clipped);
    }

    const float (&magnitudes_)[kSize];
    float amax_;
    Candidates candidates_;
    float gain_;
    float best_ = INFINITY;
    int best_code_ = 0;
};

}  // namespace lrq
