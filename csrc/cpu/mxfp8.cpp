#include "../mxfp8.h"

#include <vector>

#include "../kernels.h"
#include "clones.h"
#include "expand.h"
#include "parallel.h"
#include "rows.h"

namespace lrq::cpu {
namespace {

using mxfp8::kBlock;
using mxfp8::Layout;

LRQ_CLONES void row_exponents(const float* row, int64_t blocks, uint8_t* exponents) {
    for (int64_t b = 0; b < blocks; ++b)
        exponents[b] = static_cast<uint8_t>(mxfp8::ruled_exponent(largest(row + b * kBlock, kBlock)));
}

LRQ_CLONES void row_best_exponents(const float* row, int64_t blocks, float coherence, uint8_t* exponents) {
    for (int64_t b = 0; b < blocks; ++b) {
        const float (&block)[kBlock] = *reinterpret_cast<const float (*)[kBlock]>(row + b * kBlock);
        exponents[b] = static_cast<uint8_t>(mxfp8::best_exponent(block, largest(block, kBlock), coherence));
    }
}

LRQ_CLONES void row_codes(const float* row, int64_t blocks, const uint8_t* exponents, uint8_t* codes) {
    for (int64_t b = 0; b < blocks; ++b) {
        const float inverse = mxfp8::reciprocal(exponents[b]);
        // A block without an exponent has codes 0, whatever the signs of the weights.
        const uint32_t kept = exponents[b] ? 0xffu : 0u;
        for (int i = 0; i < kBlock; ++i)
            codes[b * kBlock + i] = static_cast<uint8_t>(encode_signed_e4m3(row[b * kBlock + i] * inverse) & kept);
    }
}

struct Mxfp8 {
    static constexpr int kBlock = mxfp8::kBlock;
    static constexpr int kBytes = kBlock;
    static LRQ_INLINE float scale(uint8_t exponent, float) { return decode_e8m0(exponent); }
    static LRQ_INLINE void decode(const uint8_t* codes, float (&values)[kBlock]) {
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) values[i] = decode_signed_e4m3(codes[i]);
    }
};

LRQ_CLONES void expand(const uint8_t* codes, const uint8_t* scales, int64_t columns, float* out) {
    expand_blocks<Mxfp8>(codes, scales, 1.0f, columns, out);
}

LRQ_CLONES void expand(const uint8_t* codes, const uint8_t* scales, int64_t columns, BFloat16* out) {
    expand_blocks<Mxfp8>(codes, scales, 1.0f, columns, out);
}

LRQ_CLONES void expand(const uint8_t* codes, const uint8_t* scales, int64_t columns, Float16* out) {
    expand_blocks<Mxfp8>(codes, scales, 1.0f, columns, out);
}

}  // namespace

void quantize_mxfp8(const Tensor& x, std::optional<double> coherence, const Tensor& codes, const Tensor& block_scales,
                    int threads) {
    const Layout layout = mxfp8::layout_of(x, codes, block_scales);
    const int64_t scale_rows = layout.row_tiles * kTileRows, scale_columns = layout.column_tiles * kTileColumns;
    const int64_t code_columns = layout.blocks * kBlock;
    const int workers = worker_count(layout.x.batch * scale_rows, threads);
    std::vector<std::vector<float>> rows(workers, std::vector<float>(code_columns, 0.0f));
    std::vector<std::vector<uint8_t>> scales(workers, std::vector<uint8_t>(scale_columns, 0));

    parallel_rows(layout.x.batch * scale_rows, workers, [&](int worker, int64_t index) {
        const int64_t matrix = index / scale_rows, row = index % scale_rows;
        uint8_t* const exponents = scales[worker].data();
        uint8_t* const row_of_codes = layout.codes + (matrix * layout.code_rows + row) * code_columns;
        if (row < layout.x.rows) {
            float* const values = rows[worker].data();
            read_row(layout.x, matrix, row, values);
            if (coherence)
                row_best_exponents(values, layout.blocks, static_cast<float>(*coherence), exponents);
            else
                row_exponents(values, layout.blocks, exponents);
            row_codes(values, layout.blocks, exponents, row_of_codes);
        } else {
            std::fill_n(exponents, scale_columns, uint8_t{0});
            if (row < layout.code_rows) std::fill_n(row_of_codes, code_columns, uint8_t{0});
        }
        uint8_t* const out = layout.scales + matrix * scale_rows * scale_columns;
        for (int64_t b = 0; b < scale_columns; ++b) out[swizzled(layout.column_tiles, row, b)] = exponents[b];
    });
}

void dequantize_mxfp8(const Tensor& codes, const Tensor& block_scales, const Tensor& out, int threads) {
    const Expansion layout = expansion_of(codes, block_scales, nullptr, out, 1, kBlock, "dequantize_mxfp8");
    expand_rows(layout, threads, [](int64_t, const uint8_t* row, const uint8_t* scales, int64_t columns, auto* values) {
        expand(row, scales, columns, values);
    });
}

}  // namespace lrq::cpu
