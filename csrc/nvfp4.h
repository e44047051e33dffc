// NVFP4 of one block of 16, and where a matrix keeps its codes and scales; host and device.
#pragma once

#include "matrix.h"
#include "minifloat.h"
#include "search.h"
#include "swizzle.h"

namespace lrq::nvfp4 {

constexpr int kBlock = 16;
constexpr int kRowMultiple = 16;
using lrq::kTile;
using lrq::kTileColumns;
using lrq::kTileRows;

// Codes, scales and the tensor scale are contiguous; strides count elements.
struct Layout {
    Matrix x;
    uint8_t* codes;
    int64_t code_rows, blocks;
    uint8_t* scales;
    int64_t row_tiles, column_tiles;
    const float* given_scale;  // null: computed from the amax
    int64_t given_stride;
    float* tensor_scale;
};

struct Candidates {
    static constexpr int kSize = kBlock;
    static constexpr int kFirst = 1;
    static constexpr int kLast = kE4M3LastCode;
    static constexpr int kOctave = 8;
    static constexpr int kDoublesFrom = 16;
    static constexpr float kLargest = kE2M1Max;
    static constexpr float kZeroBelow = 0.25f;

    static LRQ_INLINE float nearest(float y) { return nearest_e2m1(y); }
    LRQ_INLINE float scale(int code) const { return tensor_scale * decode_e4m3(code) * unit; }

    float tensor_scale, unit;
};

LRQ_INLINE float scale_of_amax(float amax) {
    const float quotient = divide(amax, kE4M3Max * kE2M1Max);
    return quotient == 0.0f ? 1.0f : quotient;
}

LRQ_INLINE uint32_t ruled_scale(float amax, float tensor_scale) {
    const float ratio = divide(divide(amax, kE2M1Max), tensor_scale);
    return encode_e4m3(ratio < kE4M3Max ? ratio : kE4M3Max);
}

// Where the search of a block begins: a scale that saturates nothing, and a unit in which it is near 1. Without weights
// or scale, or far beyond the last scale, there is nothing to search: `code` is the best.
struct Start {
    int code;
    bool searches;
    float unit;
};

LRQ_INLINE Start start_of(float amax, float tensor_scale) {
    const uint32_t ruled = ruled_scale(amax, tensor_scale);
    int start = ruled ? static_cast<int>(ruled) : 1;
    const float scale = tensor_scale * decode_e4m3(start);
    if (!(amax > 0.0f && scale > 0.0f)) return {0, false, 1.0f};
    start += divide(amax, scale) > kE2M1Max && start < kE4M3LastCode ? 1 : 0;
    const float total = tensor_scale * decode_e4m3(start);
    // Of a block far beyond the last scale that is the best one: its largest weight decides.
    return {start, amax <= 0x1p20f * total, decode_e8m0(254u - (to_bits(total) >> 23))};
}

LRQ_INLINE uint32_t best_scale(const float (&block)[kBlock], float amax, float tensor_scale, float coherence) {
    const Start start = start_of(amax, tensor_scale);
    if (!start.searches) return start.code;
    float magnitudes[kBlock];
    LRQ_UNROLL
    for (int i = 0; i < kBlock; ++i) magnitudes[i] = magnitude(block[i]) * start.unit;
    Search<Candidates> search(magnitudes, amax * start.unit, coherence, {tensor_scale, start.unit});
    return search.best_code(start.code);
}

}  // namespace lrq::nvfp4
