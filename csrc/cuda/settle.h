// Codes of scales between which only the reference's own rounding decides.
#pragma once

#include "block16.h"
#include "sieve.h"
#include "vector.h"

namespace lrq::cuda {

// Of 16 neighbouring lanes, for all of them: the order of `tree_sum`.
__device__ __forceinline__ float sum_of_lanes(float term) {
#pragma unroll
    for (int apart = 8; apart > 0; apart /= 2) term += __shfl_xor_sync(kWholeWarp, term, apart);
    return term;
}

// Quotients that round to E2M1 as true ones; the caller divides by normal numbers near 1.
class LaneQuotient {
  public:
    __device__ __forceinline__ explicit LaneQuotient(float divisor) : divisor_(divisor), parts_(divisor) {}

    __device__ __forceinline__ float reciprocal() const {
        return TwoPartReciprocal::serves(divisor_) ? parts_.high() : reciprocal_of(divisor_);
    }
    __device__ __forceinline__ float of(float dividend) const {
        return TwoPartReciprocal::serves(divisor_) ? parts_.times(dividend) : divide(dividend, divisor_);
    }

  private:
    float divisor_;
    TwoPartReciprocal parts_;
};

constexpr int kHalfWarp = nvfp4::kBlock;

// Takes the two lowest bits, one for either half of the warp; a last one for both.
__device__ __forceinline__ uint32_t take_two(uint32_t& bits) {
    const uint32_t low = bits & (0u - bits);
    bits ^= low;
    const uint32_t high = bits ? bits & (0u - bits) : low;
    bits &= ~high;
    return threadIdx.x % kWarpSize < kHalfWarp ? low : high;
}

// What a lane of each half visits of one block, as `Search` of search.h does.
struct Weight {
    // Of the lane, and what the whole warp knows. Codes are numbered from `least` on.
    float magnitude, outer, unit;
    int least;

    __device__ __forceinline__ int code(uint32_t bit) const { return least + 31 - __clz(static_cast<int>(bit)); }
    __device__ __forceinline__ float scale(uint32_t bit) const {
        return outer * decode_e4m3(static_cast<uint32_t>(code(bit))) * unit;
    }

    // The lane's terms of the sums.
    __device__ __forceinline__ void visit(float scale, float& square, float& product) const {
        const LaneQuotient by_scale(scale);
        const float y = magnitude * by_scale.reciprocal();
        const float error = nearest_e2m1(by_scale.of(magnitude)) - y;
        square = error * error;
        product = error * y;
    }
};

// Whether |E|^2 alone rules out the codes of all `bits`.
__device__ __forceinline__ bool all_lose(const Weight& weight, uint32_t bits, float limit) {
    bool lose = true;
    while (bits) {
        const float scale = weight.scale(take_two(bits));
        float square, product;
        weight.visit(scale, square, product);
        lose &= scale * scale * sum_of_lanes(square) * 0.999f > limit;
    }
    return __all_sync(kWholeWarp, lose);
}

// The best code of the bits, and of doubled scales above them.
__device__ __forceinline__ int best_of(Weight weight, uint32_t bits, float coherence) {
    const float gain = divide(coherence, sum_of_lanes(weight.magnitude * weight.magnitude));
    float best = INFINITY;
    int best_code = 0;
    while (bits) {
        uint32_t above = 0;
        while (bits) {
            const uint32_t bit = take_two(bits);
            const float scale = weight.scale(bit), area = scale * scale;
            float square, product;
            weight.visit(scale, square, product);
            const float plain = area * sum_of_lanes(square);
            const float along = area * sum_of_lanes(product);
            const float value = plain + gain * (along * along);
            const int code = weight.code(bit);
            if (value < best || (value == best && code < best_code)) best = value, best_code = code;
            if (plain * 0.999f <= best) above |= bit;
        }
        const float other = __shfl_xor_sync(kWholeWarp, best, kHalfWarp);
        const int other_code = __shfl_xor_sync(kWholeWarp, best_code, kHalfWarp);
        if (other < best || (other == best && other_code < best_code)) best = other, best_code = other_code;
        // Above the sixteen, a code whose |E|^2 is no bound to the double of its scale.
        weight.least += 8;
        const int last = kE4M3LastCode - weight.least;
        bits = __reduce_or_sync(kWholeWarp, above) & ~0u << Sieve::kAbove & (last < 31 ? (2u << last) - 1u : ~0u);
    }
    return best_code;
}

// What a sieve leaves of a lane's block.
struct Doubt {
    uint32_t codes = 0;  // see Sieve
    int first = 0;
    float unit = 0.0f, limit = 0.0f;
};

// What search.h does, for the blocks with codes in doubt, by the whole warp: one block after another, a weight to a
// lane, two codes at a time. Sets codes without signs and the scale, where they are not those of the sieve.
__device__ __forceinline__ void settle(const Block16<BFloat16>& block, const Doubt& doubt, float outer, float coherence,
                                       uint4 (&shared)[2], uint3& result) {
    const int lane = threadIdx.x % kWarpSize, i = lane % kHalfWarp;
    for (uint32_t waiting = __ballot_sync(kWholeWarp, doubt.codes != 0); waiting; waiting &= waiting - 1) {
        const int owner = __ffs(static_cast<int>(waiting)) - 1;
        __syncwarp();
        if (lane == owner) {
            const uint32_t* const words = block.words;
            shared[0] = make_uint4(words[0], words[1], words[2], words[3]);
            shared[1] = make_uint4(words[4], words[5], words[6], words[7]);
        }
        __syncwarp();
        const uint32_t bits = __shfl_sync(kWholeWarp, doubt.codes, owner);
        const float unit = __shfl_sync(kWholeWarp, doubt.unit, owner);
        const Weight weight{magnitude(widen(reinterpret_cast<const BFloat16*>(shared)[i])) * unit, outer, unit,
                            __shfl_sync(kWholeWarp, doubt.first, owner) - Sieve::kBelow};
        const uint32_t inside = Sieve::inside(bits);
        const float limit = __shfl_sync(kWholeWarp, doubt.limit, owner);
        if ((inside & (inside - 1)) == 0 && all_lose(weight, bits ^ inside, limit)) continue;
        const int best = best_of(weight, bits, coherence);
        const float scale = outer * decode_e4m3(static_cast<uint32_t>(best)) * unit;
        const uint32_t code = encode_e2m1(LaneQuotient(scale).of(weight.magnitude));
        const uint32_t placed = code << (i % 8 / 2 * 8 + (i % 2 ? 0 : 4));
        const uint32_t codes[2] = {__reduce_or_sync(kWholeWarp, i < 8 ? placed : 0u),
                                   __reduce_or_sync(kWholeWarp, i < 8 ? 0u : placed)};
        if (lane == owner) result = make_uint3(codes[0], codes[1], static_cast<uint32_t>(best));
    }
}

}  // namespace lrq::cuda
