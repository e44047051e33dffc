// Compares Sieve with the search it shortens, on as many blocks of each kind as the first argument says: the best code
// must be in doubt, and where no other is, the codes of the weights must be those of a division.
#include "../../csrc/cuda/sieve.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using lrq::cuda::Octaves;
using lrq::cuda::Sieve;
using lrq::cuda::SieveTable;

std::mt19937_64 generator(0);

float normal() { return std::normal_distribution<float>()(generator); }

uint32_t below(uint32_t bound) { return static_cast<uint32_t>(generator() % bound); }

constexpr int kKinds = 7;

float weight_of(int kind) {
    const float x = normal();
    switch (kind) {
        case 0:
            return x;
        case 1:
            return x * expf(2.0f * normal());
        case 2:
            return below(3) ? 0.0f : x;
        // Often on the grid of some scale, or on a tie.
        case 3:
            return roundf(x * 4.0f) / 4.0f;
        case 4:
            return lrq::nearest_e2m1(fabsf(x) * 3.0f);
        // All saturate at once.
        case 5:
            return (x < 0.0f ? -1.0f : 1.0f) * (1.0f + 0.3f * fabsf(x));
        default:
            return static_cast<float>(below(1000)) * 1e-3f - 0.5f;
    }
}

struct Block {
    float weights[16];
    uint32_t words[8] = {};
    float amax = 0.0f;

    Block(int kind, float tensor_scale) {
        float most = 0.0f;
        for (float& weight : weights) weight = weight_of(kind), most = fmaxf(most, fabsf(weight));
        const float level = tensor_scale * lrq::decode_e4m3(1 + below(126));
        // Somewhat above the last scale, too.
        const float over = below(8) ? 6.0f : 6.6f;
        const float unit = kind == 3 || kind == 4 || most == 0.0f ? level : over * level / most;
        for (int i = 0; i < 16; ++i) {
            const uint32_t bits = (lrq::to_bits(weights[i] * unit) + 0x8000u) >> 16;
            weights[i] = lrq::from_bits(bits << 16);
            words[i / 2] |= bits << 16 * (i % 2);
            amax = fmaxf(amax, fabsf(weights[i]));
        }
    }
};

// Whether the sieve contradicts the search.
bool wrong(const Block& block, float tensor_scale, float coherence, const Octaves* table) {
    const float ratio = block.amax / lrq::kE2M1Max / tensor_scale;
    if (!Sieve::serves(block.amax, ratio)) return false;
    const Sieve sieve(block.words, block.amax, ratio, tensor_scale, coherence, table);
    if (!sieve.decides()) return false;
    const uint32_t doubtful = sieve.doubtful();
    const int best = static_cast<int>(lrq::nvfp4::best_scale(block.weights, block.amax, tensor_scale, coherence));
    const int bit = best - sieve.first() + Sieve::kBelow;
    // A scale above those of the bits is for the one who visits them to find.
    if (bit > Sieve::kAbove + 7) return !(doubtful >> Sieve::kAbove);
    if (bit < 0 || !(doubtful >> bit & 1)) return true;
    if (doubtful & (doubtful - 1)) return false;
    uint32_t codes[2] = {};
    for (int i = 0; i < 16; ++i) {
        const float total = tensor_scale * lrq::decode_e4m3(best);
        codes[i / 8] |= lrq::encode_e2m1(fabsf(block.weights[i]) / total) << (i % 8 / 2 * 8 + (i % 2 ? 0 : 4));
    }
    return codes[0] != sieve.codes(0, best) || codes[1] != sieve.codes(1, best);
}

}  // namespace

int main(int, char** arguments) {
    constexpr int kScales = 40;
    const int count = atoi(arguments[1]) / kScales;
    std::vector<Octaves> table(SieveTable::kRows);
    int failures = 0;
    for (int i = 0; i < kScales; ++i) {
        // A power of two, the last mantissa, and any.
        const float any = expf(normal() * (i % 2 ? 3.0f : 20.0f));
        const uint32_t mantissa = i == 0 ? 0u : i == 1 ? 0x7fffffu : lrq::to_bits(any) & 0x7fffffu;
        const float tensor_scale = lrq::from_bits((lrq::to_bits(any) & 0x7f800000u) | mantissa);
        for (const float coherence : {0.0f, 4.0f, 50.0f}) {
            if (!SieveTable::serves(tensor_scale, coherence)) continue;
            SieveTable::fill(table.data(), tensor_scale, 0, 1);
            for (int kind = 0; kind < kKinds; ++kind)
                for (int j = 0; j < count; ++j)
                    failures += wrong(Block(kind, tensor_scale), tensor_scale, coherence, table.data());
        }
    }
    printf("%d", failures);
    return failures != 0;
}
