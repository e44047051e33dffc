// The candidates of search.h that a block of bfloat16 leaves in doubt, by integers; host and device.
//
// A bfloat16 has 128 mantissas, and eight E4M3 codes further a scale has doubled. So a table of the tensor scale holds
// the E2M1 codes of every weight under every scale: exact ones, eight to a word. With q a code's value, h the scale and
// w the weights as integers, |E|^2 = h(hQ - 2R) + D and <E,W> = hR - D, Q = sum q^2 and R = sum qw: dot products of
// small integers. What is left of rounding is that of a few float32 operations, far below the error of a block.
#pragma once

#include "../nvfp4.h"
#include "packed.h"

namespace lrq::cuda {

// Codes of one weight under the eight scales of an octave, the smallest scale in the low nibble, and under those of the
// two octaves above it.
struct alignas(16) Octaves {
    uint32_t codes[4];
};

// Rows of the table are the bfloat16 magnitudes from a quarter of the least scale on, row 0 all that are smaller.
class SieveTable {
  public:
    static constexpr int kFirstOctave = -2;
    static constexpr int kRows = 9 * 128 + 1;

    // Whether nothing over- or underflows.
    static LRQ_INLINE bool serves(float tensor_scale, float coherence) {
        return tensor_scale > 0x1p-80f && tensor_scale < 0x1p80f && coherence >= 0.0f && coherence <= 64.0f;
    }

    // Each of `threads` fills its share.
    static LRQ_INLINE void fill(Octaves* rows, float tensor_scale, int thread, int threads) {
        const float mantissa = from_bits((to_bits(tensor_scale) & 0x7fffffu) | 127u << 23);
        const Quotient by[8] = {{mantissa, 0.0f},          {mantissa * 1.125f, 0.0f}, {mantissa * 1.25f, 0.0f},
                                {mantissa * 1.375f, 0.0f}, {mantissa * 1.5f, 0.0f},   {mantissa * 1.625f, 0.0f},
                                {mantissa * 1.75f, 0.0f},  {mantissa * 1.875f, 0.0f}};
        for (int row = thread; row < kRows; row += threads) {
            const float weight = from_bits(static_cast<uint32_t>((127 + kFirstOctave) * 128 + row - 1) << 16);
            // As `encode_e2m1`; the sum of eight biases of 2^23 is taken off at once.
            uint32_t codes = 0;
            LRQ_UNROLL
            for (int phase = 7; phase >= 0; --phase) {
                const float y = by[phase].of(weight);
                const float fine = fused(y, 2.0f, 0x1p23f), coarse = fused(y, 0.5f, 0x1p23f + 4.0f);
                codes = codes * 16 + to_bits(fminf(fminf(fine, y + (0x1p23f + 2.0f)), fminf(coarse, 0x1p23f + 7.0f)));
            }
            codes = row ? codes - 0xfb000000u : 0u;
            LRQ_UNROLL
            for (int octave = 0; octave < 3; ++octave) {
                const int above = row + 128 * octave;
                if (above < kRows) rows[above].codes[octave] = codes;
                if (row < 128 * octave) rows[row].codes[octave] = 0u;
            }
        }
    }
};

// The objective of sixteen neighbouring scales, from somewhat below amax/6 on.
class Sieve {
  public:
    static constexpr int kCount = 16;
    // Bits of `doubtful()`: bit i is code `first() - kBelow + i`, and bits from kAbove on lie above the sixteen.
    static constexpr int kBelow = 4;
    static constexpr int kAbove = kBelow + kCount;

    // `ratio` is amax / 6 / tensor_scale: of the block with the amax of its matrix somewhat over kE4M3Max, by rounding.
    static LRQ_INLINE bool serves(float most, float ratio) {
        return most > 0x1p-60f && most < 0x1p60f && ratio >= 0x1p-5f && ratio <= 1.125f * kE4M3Max;
    }

    LRQ_INLINE Sieve(const uint32_t (&words)[8], float most, float ratio, float tensor_scale, float coherence,
                     const Octaves* table)
        : coherence_(coherence) {
        const int wanted = static_cast<int>(encode_e4m3(ratio * 0.825f));
        first_ = wanted < kE4M3LastCode - kCount + 1 ? wanted : kE4M3LastCode - kCount + 1;
        // In units in which twice the largest weight is an integer of 15 bits. Where a smaller one is none, its codes
        // are 0.
        const float unit = from_bits((268u << 23) - (to_bits(most) & 0x7f800000u));
        unit_ = 0.5f * unit;
        most_ = most * unit_;
        half_ = tensor_scale * unit_ * 0.5f;
        uint32_t doubles[kBlock / 2], lower[kBlock], upper[kBlock];
        float squares[2] = {};
        const uint32_t exponent = (to_bits(tensor_scale) >> 23) + static_cast<uint32_t>(first_ / 8 - 7);
        const uint32_t before = ((exponent + static_cast<uint32_t>(SieveTable::kFirstOctave)) << 7) - 1u;
        const uint32_t minus_before = ((0u - before) & 0xffffu) * 0x10001u;
        const uint32_t shift = static_cast<uint32_t>(first_ % 8) * 4;
        LRQ_UNROLL
        for (int i = 0; i < kBlock / 2; ++i) {
            const uint32_t bits = words[i] & 0x7fff7fffu;
            const float even = from_bits(permute(bits, 0, 0x1044)), odd = from_bits(permute(bits, 0, 0x3244));
            squares[0] = fused(even, even, squares[0]);
            squares[1] = fused(odd, odd, squares[1]);
            doubles[i] = permute(to_bits(fused(odd, unit, 0x1p23f)), to_bits(fused(even, unit, 0x1p23f)), 0x5410);
            const uint32_t offsets = add_above_zero(bits, minus_before) * sizeof(Octaves);
            read(table, permute(offsets, 0, 0x4410), shift, lower[2 * i], upper[2 * i]);
            read(table, permute(offsets, 0, 0x4432), shift, lower[2 * i + 1], upper[2 * i + 1]);
        }
        total_ = (squares[0] + squares[1]) * unit_ * unit_;
        gain_ = coherence * 0.25f * near_reciprocal(total_);
        // Zero is added, in a way that keeps the compiler from making it a constant, which it would copy for every use.
        values_of_codes_ = 0x03020100u + (to_bits(most) >> 31);
        low_nibbles_ = 0x0f0f0f0fu + (to_bits(most) >> 31);
        visit<0>(lower, doubles);
        visit<8>(upper, doubles);
    }

    LRQ_INLINE int first() const { return first_; }
    // The power of two that takes weights to those of the objective.
    LRQ_INLINE float unit() const { return unit_; }
    // Eight codes of a scale, packed as they are stored, without signs; only of the best.
    LRQ_INLINE uint32_t codes(int half, int code) const {
        return permute(codes_[2 * half], codes_[2 * half + 1], (code - first_) & 2 ? 0x7632 : 0x5410);
    }

    // Not where some scale holds the block almost exactly: there float32 decides which scale is visited.
    LRQ_INLINE bool decides() const { return best_ > total_ * 0x1p-12f && !can_win_below(kBelow + 1); }

    // What is above it is above the best for the reference, too. With u = 2^-24, f the objective and D = |W|^2, here
    // |E|^2 is wrong by at most 2uD, that of D apart, which all scales share, and <E,W> by 10uD, which moves f by
    // 20u sqrt(gfD); there they are by 4u sqrt(fD) and 3uD. Both sides of the comparison are wrong, and
    // sqrt(gfD) <= D/16 + 4gf.
    LRQ_INLINE float limit() const { return best_ + (0x1.8p-21f * total_ + 0x1p-16f * (coherence_ * best_)); }

    // Of bits of `doubtful()`, those of the sixteen.
    static LRQ_INLINE uint32_t inside(uint32_t bits) { return bits & ((1u << kAbove) - (1u << kBelow)); }

    // Codes that may win.
    LRQ_INLINE uint32_t doubtful() const {
        // Doubling a scale that saturates nothing can't lower |E|^2.
        const int left = kE4M3LastCode + 1 - kCount - first_;
        uint32_t bits = below_limit(plain_) & ((1u << (left < 8 ? left : 8)) - 1u);
        bits = bits << kCount | below_limit(values_);
        bits <<= kBelow;
        if (can_win_below(1))
            for (int i = 1; i <= kBelow; ++i) bits |= can_win_below(i) ? 1u << (kBelow - i) : 0u;
        return bits;
    }

  private:
    static constexpr int kBlock = nvfp4::kBlock;
    // An integer below 2^23 or'ed to it is a float32 as it stands.
    static constexpr uint32_t kInteger = 0x4b000000u;

    // Bits of the values below the limit. Arithmetic of floats leaves the units of integers to what needs them.
    template <int kValues>
    LRQ_INLINE uint32_t below_limit(const float (&values)[kValues]) const {
        const float steep = limit() * 0x1p40f;
        float bits = 0.0f;
        LRQ_UNROLL
        for (int i = kValues - 1; i >= 0; --i) bits = fused(bits, 2.0f, clamped(fused(values[i], -0x1p40f, steep)));
        return to_bits(bits + 0x1p23f) & ((1u << kValues) - 1u);
    }

    // To [0, 1].
    static LRQ_INLINE float clamped(float value) {
#ifdef __CUDA_ARCH__
        return __saturatef(value);
#else
        return fminf(fmaxf(value, 0.0f), 1.0f);
#endif
    }

    static LRQ_INLINE float near_reciprocal(float value) {
#ifdef __CUDA_ARCH__
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(value));
        return value;
#else
        return 1.0f / value;
#endif
    }

    static LRQ_INLINE void read(const Octaves* table, uint32_t offset, uint32_t shift, uint32_t& lower,
                                uint32_t& upper) {
        const char* const place = reinterpret_cast<const char*>(table) + offset;
#ifdef __CUDA_ARCH__
        const uint4 row = *reinterpret_cast<const uint4*>(place);
        lower = funnel(row.x, row.y, shift), upper = funnel(row.y, row.z, shift);
#else
        const Octaves& row = *reinterpret_cast<const Octaves*>(place);
        lower = funnel(row.codes[0], row.codes[1], shift), upper = funnel(row.codes[1], row.codes[2], shift);
#endif
    }

    // Four codes of eight scales each, from a word for each of four weights with codes of eight scales. Word i has
    // scale `kEarly[i]` in its low half and that scale + 2 in its high one, in the order in which codes are stored.
    LRQ_INLINE void transpose(const uint32_t* weights, uint32_t (&scales)[4]) const {
        const uint32_t low = low_nibbles_;
        const uint32_t even[2] = {select_bits(low, weights[1], weights[0] << 4),
                                  select_bits(low, weights[3], weights[2] << 4)};
        const uint32_t odd[2] = {select_bits(low, weights[1] >> 4, weights[0]),
                                 select_bits(low, weights[3] >> 4, weights[2])};
        scales[0] = permute(even[0], even[1], 0x5140), scales[1] = permute(odd[0], odd[1], 0x5140);
        scales[2] = permute(even[0], even[1], 0x7362), scales[3] = permute(odd[0], odd[1], 0x7362);
    }

    template <int kFrom>
    LRQ_INLINE void visit(const uint32_t (&words)[kBlock], const uint32_t (&doubles)[kBlock / 2]) {
        constexpr int kEarly[4] = {0, 1, 4, 5};
        uint32_t scales[4][4];
        LRQ_UNROLL
        for (int i = 0; i < 4; ++i) transpose(words + 4 * i, scales[i]);
        LRQ_UNROLL
        for (int i = 0; i < 4; ++i) {
            float values[2];
            LRQ_UNROLL
            for (int late = 0; late < 2; ++late) {
                uint32_t squares = kInteger, products = kInteger;
                LRQ_UNROLL
                for (int part = 0; part < 4; ++part)
                    add(scales[part][i] >> 16 * late, doubles + 2 * part, squares, products);
                values[late] = objective(kFrom + kEarly[i] + 2 * late, from_bits(squares) - 0x1p23f,
                                         from_bits(products) - 0x1p23f);
            }
            const float least = fminf(values[0], values[1]);
            if (least < best_) {
                LRQ_UNROLL
                for (int part = 0; part < 4; ++part) codes_[part] = scales[part][i];
            }
            best_ = fminf(least, best_);
        }
    }

    // Q, and twice R.
    LRQ_INLINE float objective(int index, float q, float r) {
        const float scale = half_ * from_bits((static_cast<uint32_t>(first_ + index) << 20) + (120u << 23));
        const float plain = fused(scale, fused(scale, q, -r), total_);
        const float along = fused(scale, r, -2.0f * total_);
        values_[index] = fused(along * gain_, along, plain);
        if (index >= kCount - 8) plain_[index - (kCount - 8)] = plain;
        return values_[index];
    }

    LRQ_INLINE void add(uint32_t codes, const uint32_t* doubles, uint32_t& squares, uint32_t& products) const {
        // Twice the values of E2M1, by code.
        const uint32_t values = permute(values_of_codes_, 0x0c080604u, codes);
        squares = dot_bytes(values, values, squares);
        products = dot_low(doubles[0], values, products);
        products = dot_high(doubles[1], values, products);
    }

    // Below amax the largest weight alone costs (amax - 6 * scale)^2, which grows as the scale falls.
    LRQ_INLINE bool can_win_below(int codes) const {
        const float open = most_ - 2.0f * kE2M1Max * (half_ * decode_e4m3(static_cast<uint32_t>(first_ - codes)));
        const float clipped = open > 0.0f ? open : 0.0f;
        return clipped * clipped * 0.999f <= limit();
    }

    float coherence_, unit_, most_, half_, total_, gain_;
    float values_[kCount], plain_[8];
    float best_ = INFINITY;
    int first_;
    uint32_t values_of_codes_, low_nibbles_;
    // Of both scales of a word.
    uint32_t codes_[4] = {};
};

}  // namespace lrq::cuda
