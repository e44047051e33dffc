// Compares Quotient with division next to every tie of the grids, whose mantissas are those of the odd numbers below
// 254, for every n-th mantissa of the divisor (first argument; 1: all), and on random dividends. Both scale with
// powers of two, so one exponent of the divisor stands for all but the extremes, which are tried too.
#include "../../csrc/quotient.h"

#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../csrc/cpu/clones.h"

namespace {

constexpr int kAround = 3;

LRQ_CLONES int64_t wrong_near_tie(float tie, float exponent, uint32_t first, uint32_t count, uint32_t step) {
    int32_t wrong = 0;
    for (uint32_t i = 0; i < count; ++i) {
        const float divisor = lrq::from_bits(0x3f800000u + first + i * step) * exponent;
        const lrq::Quotient quotient(divisor, 0.0f);
        const uint32_t middle = lrq::to_bits(divisor * tie);
        LRQ_UNROLL
        for (int around = -kAround; around <= kAround; ++around) {
            const float dividend = lrq::from_bits(middle + around);
            const float fast = quotient.of(dividend), exact = dividend / divisor;
            wrong += (fast < tie) != (exact < tie) || (fast > tie) != (exact > tie) || !quotient.safe();
        }
    }
    return wrong;
}

// From the reciprocal in two parts, whose divisors are those it serves.
LRQ_CLONES int64_t wrong_from_parts_near(float tie, uint32_t first, uint32_t count, uint32_t step) {
    int32_t wrong = 0;
    for (uint32_t i = 0; i < count; ++i) {
        const float divisor = lrq::from_bits(0x3f800000u + first + i * step);
        const lrq::TwoPartReciprocal reciprocal(divisor);
        const uint32_t middle = lrq::to_bits(divisor * tie);
        LRQ_UNROLL
        for (int around = -kAround; around <= kAround; ++around) {
            const float dividend = lrq::from_bits(middle + around);
            const float fast = reciprocal.times(dividend), exact = dividend / divisor;
            const bool differs = (fast < tie) != (exact < tie) || (fast > tie) != (exact > tie);
            wrong += differs && lrq::TwoPartReciprocal::serves(divisor);
        }
    }
    return wrong;
}

// The ties of integers to 127; those of E2M1 have their mantissas.
int64_t wrong_from_parts(uint32_t first, uint32_t count, uint32_t step) {
    int64_t wrong = 0;
    for (int odd = 1; odd < 254; odd += 2)
        wrong += wrong_from_parts_near(static_cast<float>(odd) * 0.5f, first, count, step);
    return wrong;
}

int64_t wrong_near_ties(float exponent, uint32_t step) {
    int64_t wrong = 0;
    for (int odd = 1; odd < 254; odd += 2)
        wrong += wrong_near_tie(static_cast<float>(odd) * 0.5f, exponent, 0, (1u << 23) / step, step);
    // The subnormals of E4M3.
    for (int odd = 1; odd < 16; odd += 2)
        wrong += wrong_near_tie(static_cast<float>(odd) * 0x1p-10f, exponent, 0, (1u << 23) / step, step);
    return wrong;
}

bool same_code(float a, float b) {
    const auto code = [](float y) {
        const float wide = lrq::magnitude(y);
        return lrq::encode_e4m3(wide < lrq::kE4M3Max ? wide : lrq::kE4M3Max) | lrq::to_bits(y) >> 31 << 7;
    };
    const auto integer = [](float y) { return nearbyintf(y < -127.0f ? -127.0f : y > 127.0f ? 127.0f : y); };
    return code(a) == code(b) && integer(a) == integer(b) && lrq::encode_e2m1(a) == lrq::encode_e2m1(b);
}

bool same_but_for_zero(float a, float b) { return (a == 0.0f && b == 0.0f) || same_code(a, b); }

int64_t wrong_at_random(int count) {
    std::mt19937 random(0);
    int64_t wrong = 0;
    for (int i = 0; i < count; ++i) {
        const float divisor = lrq::from_bits(random() & 0x7fffffffu);
        const float dividend = i % 16 ? lrq::from_bits(random() & 0xff7fffffu) : i & 16 ? -0.0f : 0.0f;
        const lrq::Quotient quotient(divisor, lrq::magnitude(dividend));
        wrong += quotient.safe() && !same_code(quotient.of(dividend), dividend / divisor);
        // Quotients of everyday size.
        const float scale = 0.001f + 1e-9f * static_cast<float>(random() >> 8);
        const float weight = scale * (1e-5f * static_cast<float>(static_cast<int32_t>(random()) >> 6));
        const lrq::Quotient everyday(scale, lrq::magnitude(weight));
        wrong += !everyday.safe() || !same_code(everyday.of(weight), weight / scale);
        const lrq::TwoPartQuotient parts(scale, lrq::magnitude(weight));
        wrong += !parts.safe() || !same_but_for_zero(parts.of(weight), weight / scale);
    }
    return wrong;
}

}  // namespace

int main(int, char** arguments) {
    const uint32_t step = static_cast<uint32_t>(std::atoi(arguments[1]));
    int64_t wrong = wrong_near_ties(1.0f, step);
    for (float exponent : {0x1p-80f, 0x1p79f}) wrong += wrong_near_ties(exponent, step * 16 + 1);
    wrong += wrong_at_random(1000000);
    wrong += wrong_from_parts(0, (1u << 23) / step, step) + wrong_from_parts((1u << 23) - 4096, 4096, 1);
    std::printf("%lld\n", static_cast<long long>(wrong));
    return wrong != 0;
}
