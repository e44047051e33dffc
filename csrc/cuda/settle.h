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

// What search.h does, for the blocks with `doubtful` codes (see Sieve), by the whole warp: one block after another, a
// weight to a lane, two codes at a time. Sets codes without signs and the scale of each.
__device__ __forceinline__ void settle(const Block16<BFloat16>& block, uint32_t doubtful, int first, float outer,
                                       float coherence, uint4 (&shared)[2], uint3& found) {
    constexpr int kHalf = nvfp4::kBlock;
    const int lane = threadIdx.x % kWarpSize, i = lane % kHalf;
    for (uint32_t waiting = __ballot_sync(kWholeWarp, doubtful != 0); waiting; waiting &= waiting - 1) {
        const int owner = __ffs(static_cast<int>(waiting)) - 1;
        if (lane == owner) {
            const uint32_t* const words = block.words;
            shared[0] = make_uint4(words[0], words[1], words[2], words[3]);
            shared[1] = make_uint4(words[4], words[5], words[6], words[7]);
        }
        __syncwarp();
        const float weight = magnitude(widen(reinterpret_cast<const BFloat16*>(shared)[i]));
        uint32_t left = __shfl_sync(kWholeWarp, doubtful, owner);
        int least = __shfl_sync(kWholeWarp, first, owner) - Sieve::kBelow;
        const float unit = decode_e8m0(254u - (to_bits(outer * decode_e4m3(least + 8)) >> 23));
        const float scaled = weight * unit;
        const float gain = divide(coherence, sum_of_lanes(scaled * scaled));
        float best = INFINITY;
        int best_code = 0;
        while (left) {
            uint32_t above = 0;
            while (left) {
                const uint32_t low = left & (0u - left);
                left ^= low;
                const uint32_t high = left ? left & (0u - left) : low;
                left &= ~high;
                const uint32_t bit = lane < kHalf ? low : high;
                const int code = least + 31 - __clz(static_cast<int>(bit));
                const float scale = outer * decode_e4m3(code) * unit;
                const LaneQuotient by_scale(scale);
                const float y = scaled * by_scale.reciprocal();
                const float error = nearest_e2m1(by_scale.of(scaled)) - y;
                const float square = scale * scale;
                const float plain = square * sum_of_lanes(error * error);
                const float along = square * sum_of_lanes(error * y);
                const float value = plain + gain * (along * along);
                if (value < best || (value == best && code < best_code)) best = value, best_code = code;
                if (plain * 0.999f <= best) above |= bit;
            }
            const float other = __shfl_xor_sync(kWholeWarp, best, kHalf);
            const int other_code = __shfl_xor_sync(kWholeWarp, best_code, kHalf);
            if (other < best || (other == best && other_code < best_code)) best = other, best_code = other_code;
            // Codes above the sixteen whose double may win still.
            above &= ~0u << Sieve::kAbove;
            if (__any_sync(kWholeWarp, above)) {
                least += 8;
                left = __reduce_or_sync(kWholeWarp, above);
                const int last = kE4M3LastCode - least;
                left = last < 32 ? left & ((2u << last) - 1u) : left;
            }
        }
        const uint32_t code = encode_e2m1(LaneQuotient(outer * decode_e4m3(best_code) * unit).of(scaled));
        const uint32_t placed = code << (i % 8 / 2 * 8 + (i % 2 ? 0 : 4));
        const uint32_t codes[2] = {__reduce_or_sync(kWholeWarp, i < 8 ? placed : 0u),
                                   __reduce_or_sync(kWholeWarp, i < 8 ? 0u : placed)};
        if (lane == owner) found = make_uint3(codes[0], codes[1], static_cast<uint32_t>(best_code));
        __syncwarp();
    }
}

}  // namespace lrq::cuda
