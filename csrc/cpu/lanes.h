// The search of ../search.h for sixteen NVFP4 blocks at a time: a block is a lane, so no sum crosses lanes. The loops,
// bounds and order of additions are the same, and so are the bits.
#pragma once

#include "../nvfp4.h"

namespace lrq::cpu {

// Every loop over lanes is one that GCC vectorises.
constexpr int kLanes = 16;

template <class T>
using Lanes = T[kLanes];

LRQ_INLINE bool any(const Lanes<int32_t>& lanes) {
    int32_t found = 0;
    LRQ_UNROLL
    for (int l = 0; l < kLanes; ++l) found |= lanes[l];
    return found != 0;
}

struct Blocks {
    Lanes<float> magnitudes[nvfp4::kBlock];
    Lanes<float> amax, unit;
    Lanes<int32_t> start;
    // 1 where a block is searched; the others keep `start`.
    Lanes<int32_t> searched;
    float tensor_scale, coherence;
};

// `kFused`: quotients by multiply-adds, for machines that have them.
template <bool kFused>
class LaneSearch {
  public:
    LRQ_INLINE explicit LaneSearch(const Blocks& blocks) : blocks_(blocks) {
        LRQ_UNROLL
        for (int l = 0; l < kLanes; ++l) {
            gain_[l] = blocks.coherence / sum_of_squares<0, 1>(l);
            best_[l] = INFINITY;
            best_code_[l] = 0;
        }
    }

    LRQ_INLINE void best_codes(Lanes<int32_t>& codes) {
        upwards();
        downwards();
        LRQ_UNROLL
        for (int l = 0; l < kLanes; ++l) codes[l] = blocks_.searched[l] ? best_code_[l] : blocks_.start[l];
    }

  private:
    using Candidates = nvfp4::Candidates;
    static constexpr int kSize = nvfp4::kBlock;
    static constexpr int kOctave = Candidates::kOctave;
    static constexpr float kSlack = 0.999f;

    LRQ_INLINE void upwards() {
        Lanes<float> bounds[kOctave];
        Lanes<int32_t> code;
        LRQ_UNROLL
        for (int l = 0; l < kLanes; ++l) {
            code[l] = blocks_.start[l];
            LRQ_UNROLL
            for (int i = 0; i < kOctave; ++i) bounds[i][l] = -INFINITY;
        }
        for (int phase = 0;; phase = (phase + 1) % kOctave) {
            Lanes<int32_t> open, visited;
            LRQ_UNROLL
            for (int l = 0; l < kLanes; ++l) {
                const int32_t inside = blocks_.searched[l] & int32_t{code[l] <= Candidates::kLast};
                visited[l] = inside & can_win(bounds[phase][l], l);
                open[l] = inside & any_can_win(bounds, l);
            }
            if (!any(open)) return;
            if (any(visited)) {
                Lanes<float> plain;
                visit(code, visited, plain);
                LRQ_UNROLL
                for (int l = 0; l < kLanes; ++l) {
                    const float bound = code[l] + kOctave >= Candidates::kDoublesFrom ? plain[l] : -INFINITY;
                    bounds[phase][l] = visited[l] ? bound : bounds[phase][l];
                }
            }
            LRQ_UNROLL
            for (int l = 0; l < kLanes; ++l) ++code[l];
        }
    }

    LRQ_INLINE void downwards() {
        Lanes<int32_t> code, visited;
        LRQ_UNROLL
        for (int l = 0; l < kLanes; ++l) {
            code[l] = blocks_.start[l];
            visited[l] = blocks_.searched[l];
        }
        for (;;) {
            LRQ_UNROLL
            for (int l = 0; l < kLanes; ++l) {
                --code[l];
                // Below amax the largest weight alone costs (amax - max * scale)^2, which grows as the scale falls.
                const float open = blocks_.amax[l] - Candidates::kLargest * scale(code[l], l);
                const float clipped = (open + magnitude(open)) * 0.5f;
                visited[l] &= can_win(clipped * clipped, l) & int32_t{code[l] >= Candidates::kFirst};
            }
            if (!any(visited)) return;
            Lanes<float> plain;
            visit(code, visited, plain);
        }
    }

    LRQ_INLINE int32_t can_win(float bound, int l) const { return bound * kSlack <= best_[l]; }

    LRQ_INLINE int32_t any_can_win(const Lanes<float> (&bounds)[kOctave], int l) const {
        return can_win(bounds[0][l], l) | can_win(bounds[1][l], l) | can_win(bounds[2][l], l) |
               can_win(bounds[3][l], l) | can_win(bounds[4][l], l) | can_win(bounds[5][l], l) |
               can_win(bounds[6][l], l) | can_win(bounds[7][l], l);
    }

    LRQ_INLINE float scale(int32_t code, int l) const {
        return Candidates{blocks_.tensor_scale, blocks_.unit[l]}.scale(code);
    }

    // Plain errors of all lanes; those of `visited` may win.
    LRQ_INLINE void visit(const Lanes<int32_t>& code, const Lanes<int32_t>& visited, Lanes<float>& plain) {
        if constexpr (kFused) {
            Lanes<int32_t> refused;
            LRQ_UNROLL
            for (int l = 0; l < kLanes; ++l)
                refused[l] = visited[l] & int32_t{!TwoPartReciprocal::serves(scale(code[l], l))};
            if (!any(refused)) return visit_by<TwoPartReciprocal>(code, visited, plain);
        }
        visit_by<Division>(code, visited, plain);
    }

    struct Division {
        LRQ_INLINE explicit Division(float divisor) : divisor_(divisor) {}
        LRQ_INLINE float high() const { return 1.0f / divisor_; }
        LRQ_INLINE float times(float dividend) const { return dividend / divisor_; }
        float divisor_;
    };

    template <class Reciprocal>
    LRQ_INLINE void visit_by(const Lanes<int32_t>& code, const Lanes<int32_t>& visited, Lanes<float>& plain) {
        LRQ_UNROLL
        for (int l = 0; l < kLanes; ++l) {
            const float divisor = scale(code[l], l), square = divisor * divisor;
            const Reciprocal reciprocal(divisor);
            const Sums sums = sums_of<0, 1>(reciprocal, reciprocal.high(), l);
            plain[l] = square * sums.squares;
            const float along = square * sums.products;
            const float value = plain[l] + gain_[l] * (along * along);
            const bool better = value < best_[l], equal = value == best_[l], smaller = code[l] < best_code_[l];
            const bool stays = Candidates::kZeroBelow * divisor < blocks_.amax[l];
            const int32_t wins =
                -(visited[l] & int32_t{stays} & (int32_t{better} | (int32_t{equal} & int32_t{smaller})));
            best_[l] = from_bits((to_bits(value) & wins) | (to_bits(best_[l]) & ~wins));
            best_code_[l] = (code[l] & wins) | (best_code_[l] & ~wins);
        }
    }

    struct Sums {
        float squares, products;
    };

    // Terms kFirst, kFirst + kStep, ...: halves are added until one is left.
    template <int kFirst, int kStep, class Reciprocal>
    LRQ_INLINE Sums sums_of(const Reciprocal& reciprocal, float inverse, int l) const {
        if constexpr (kStep == kSize) {
            const float w = blocks_.magnitudes[kFirst][l], y = w * inverse;
            const float error = Candidates::nearest(reciprocal.times(w)) - y;
            return {error * error, error * y};
        } else {
            const Sums a = sums_of<kFirst, 2 * kStep>(reciprocal, inverse, l);
            const Sums b = sums_of<kFirst + kStep, 2 * kStep>(reciprocal, inverse, l);
            return {a.squares + b.squares, a.products + b.products};
        }
    }

    template <int kFirst, int kStep>
    LRQ_INLINE float sum_of_squares(int l) const {
        if constexpr (kStep == kSize)
            return blocks_.magnitudes[kFirst][l] * blocks_.magnitudes[kFirst][l];
        else
            return sum_of_squares<kFirst, 2 * kStep>(l) + sum_of_squares<kFirst + kStep, 2 * kStep>(l);
    }

    const Blocks& blocks_;
    Lanes<float> gain_, best_;
    Lanes<int32_t> best_code_;
};

}  // namespace lrq::cpu
