#include "../nvfp4.h"

#include <vector>

#include "../e4m3.h"
#include "../kernels.h"
#include "../layout.h"
#include "amax.h"
#include "clones.h"
#include "expand.h"
#include "lanes.h"
#include "parallel.h"
#include "rows.h"

namespace lrq::cpu {
namespace {

using nvfp4::kBlock;
using nvfp4::Layout;

// Without the instruction every multiply-add would be a call.
#if defined(__x86_64__)
const bool kMultipliesAndAdds = __builtin_cpu_supports("fma");
#else
constexpr bool kMultipliesAndAdds = true;
#endif

LRQ_CLONES void row_ruled_scales(const float* row, int64_t blocks, float tensor_scale, uint8_t* scales) {
    for (int64_t b = 0; b < blocks; ++b)
        scales[b] = static_cast<uint8_t>(nvfp4::ruled_scale(largest(row + b * kBlock, kBlock), tensor_scale));
}

// Of `count` blocks, at most kLanes.
template <bool kFused>
LRQ_INLINE void best_scales(const float* row, int64_t count, float tensor_scale, float coherence, uint8_t* scales) {
    Blocks blocks;
    blocks.tensor_scale = tensor_scale;
    blocks.coherence = coherence;
    for (int lane = 0; lane < kLanes; ++lane) {
        // Lanes without a block repeat the last one.
        const float* const block = row + (lane < count ? lane : count - 1) * kBlock;
        blocks.amax[lane] = largest(block, kBlock);
        for (int i = 0; i < kBlock; ++i) blocks.magnitudes[i][lane] = magnitude(block[i]);
    }
    LRQ_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
        const nvfp4::Start from = nvfp4::start_of(blocks.amax[lane], tensor_scale);
        blocks.start[lane] = from.code;
        blocks.searched[lane] = from.searches ? 1 : 0;
        blocks.unit[lane] = from.unit;
        blocks.amax[lane] *= from.unit;
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) blocks.magnitudes[i][lane] *= from.unit;
    }
    Lanes<int32_t> best;
    LaneSearch<kFused>(blocks).best_codes(best);
    for (int64_t lane = 0; lane < count; ++lane) scales[lane] = static_cast<uint8_t>(best[lane]);
}

LRQ_CLONES void row_best_scales_fused(const float* row, int64_t blocks, float tensor_scale, float coherence,
                                      uint8_t* scales) {
    for (int64_t b = 0; b < blocks; b += kLanes)
        best_scales<true>(row + b * kBlock, std::min<int64_t>(kLanes, blocks - b), tensor_scale, coherence, scales + b);
}

LRQ_CLONES void row_best_scales_divided(const float* row, int64_t blocks, float tensor_scale, float coherence,
                                        uint8_t* scales) {
    for (int64_t b = 0; b < blocks; b += kLanes)
        best_scales<false>(row + b * kBlock, std::min<int64_t>(kLanes, blocks - b), tensor_scale, coherence,
                           scales + b);
}

void row_scales(const float* row, int64_t blocks, float tensor_scale, const float* coherence, uint8_t* scales) {
    if (!coherence)
        row_ruled_scales(row, blocks, tensor_scale, scales);
    else if (kMultipliesAndAdds)
        row_best_scales_fused(row, blocks, tensor_scale, *coherence, scales);
    else
        row_best_scales_divided(row, blocks, tensor_scale, *coherence, scales);
}

LRQ_CLONES void row_codes(const float* row, int64_t blocks, float tensor_scale, const uint8_t* scales, uint8_t* codes) {
    for (int64_t b = 0; b < blocks; ++b) {
        const float total = tensor_scale * decode_e4m3(scales[b]);
        // A zero total has codes 0, whatever the sign of the weight.
        const uint32_t kept = total == 0.0f ? 0 : 15;
        const float divisor = total == 0.0f ? 1.0f : total;
        uint32_t block[kBlock];
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) block[i] = encode_e2m1(row[b * kBlock + i] / divisor) & kept;
        LRQ_UNROLL
        for (int i = 0; i < kBlock / 2; ++i)
            codes[b * (kBlock / 2) + i] = static_cast<uint8_t>(block[2 * i] << 4 | block[2 * i + 1]);
    }
}

void set_tensor_scales(const Layout& layout, std::vector<std::vector<float>>& rows) {
    if (layout.given_scale) {
        for (int64_t m = 0; m < layout.x.batch; ++m)
            layout.tensor_scale[m] = layout.given_scale[m * layout.given_stride];
        return;
    }
    const int workers = static_cast<int>(rows.size());
    std::vector<float> amax(layout.x.batch * workers, 0.0f);
    parallel_rows(layout.x.batch * layout.x.rows, workers, [&](int worker, int64_t index) {
        const int64_t matrix = index / layout.x.rows;
        float* row = rows[worker].data();
        read_row(layout.x, matrix, index % layout.x.rows, row);
        float& most = amax[matrix * workers + worker];
        most = larger(most, row_amax(row, layout.x.columns));
    });
    for (int64_t m = 0; m < layout.x.batch; ++m)
        layout.tensor_scale[m] = nvfp4::scale_of_amax(largest(&amax[m * workers], workers));
}

// Codes already apart, one a byte.
struct Nvfp4 {
    static constexpr int kBlock = nvfp4::kBlock;
    static constexpr int kBytes = kBlock;
    static LRQ_INLINE float scale(uint8_t code, float tensor_scale) { return tensor_scale * decode_signed_e4m3(code); }
    static LRQ_INLINE void decode(const uint8_t* codes, float (&values)[kBlock]) {
        LRQ_UNROLL
        for (int i = 0; i < kBlock; ++i) values[i] = decode_e2m1(codes[i]);
    }
};

// Many blocks are taken apart before the first is decoded: reading bytes just written would wait for them.
template <class T>
LRQ_INLINE void expand_packed(const uint8_t* packed, const uint8_t* scales, float outer, int64_t columns, T* out) {
    constexpr int64_t kBlocks = 64, kColumns = kBlocks * kBlock;
    uint8_t codes[kColumns];
    for (int64_t first = 0; first < columns; first += kColumns, packed += kColumns / 2, scales += kBlocks) {
        const int64_t count = std::min(columns - first, kColumns);
        const int64_t bytes = (count + kBlock - 1) / kBlock * (kBlock / 2);
        for (int64_t i = 0; i < bytes; ++i) {
            codes[2 * i] = packed[i] >> 4;
            codes[2 * i + 1] = packed[i] & 15u;
        }
        expand_blocks<Nvfp4>(codes, scales, outer, count, out + first);
    }
}

LRQ_CLONES void expand(const uint8_t* codes, const uint8_t* scales, float outer, int64_t columns, float* out) {
    expand_packed(codes, scales, outer, columns, out);
}

LRQ_CLONES void expand(const uint8_t* codes, const uint8_t* scales, float outer, int64_t columns, BFloat16* out) {
    expand_packed(codes, scales, outer, columns, out);
}

LRQ_CLONES void expand(const uint8_t* codes, const uint8_t* scales, float outer, int64_t columns, Float16* out) {
    expand_packed(codes, scales, outer, columns, out);
}

}  // namespace

void quantize_nvfp4(const Tensor& x, const std::optional<Tensor>& given_scale, std::optional<double> coherence,
                    const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, int threads) {
    const Layout layout = nvfp4::layout_of(x, given_scale, codes, block_scales, tensor_scale);
    const int64_t scale_rows = layout.row_tiles * nvfp4::kTileRows;
    const int64_t scale_columns = layout.column_tiles * nvfp4::kTileColumns;
    const int workers = worker_count(layout.x.batch * layout.x.rows, threads);
    std::vector<std::vector<float>> rows(workers, std::vector<float>(layout.blocks * kBlock, 0.0f));
    std::vector<std::vector<uint8_t>> scales(workers, std::vector<uint8_t>(scale_columns, 0));
    set_tensor_scales(layout, rows);
    const float penalty = static_cast<float>(coherence.value_or(0.0));
    const float* const searched = coherence ? &penalty : nullptr;

    parallel_rows(layout.x.batch * scale_rows, workers, [&](int worker, int64_t index) {
        const int64_t matrix = index / scale_rows, row = index % scale_rows;
        uint8_t* const row_of_scales = scales[worker].data();
        uint8_t* const row_of_codes = layout.codes + (matrix * layout.code_rows + row) * layout.blocks * (kBlock / 2);
        std::fill_n(row_of_scales, scale_columns, uint8_t{0});
        if (row < layout.x.rows) {
            float* const values = rows[worker].data();
            read_row(layout.x, matrix, row, values);
            row_scales(values, layout.blocks, layout.tensor_scale[matrix], searched, row_of_scales);
            row_codes(values, layout.blocks, layout.tensor_scale[matrix], row_of_scales, row_of_codes);
        } else if (row < layout.code_rows) {
            std::fill_n(row_of_codes, layout.blocks * (kBlock / 2), uint8_t{0});
        }
        uint8_t* const out = layout.scales + matrix * scale_rows * scale_columns;
        for (int64_t b = 0; b < scale_columns; ++b) out[swizzled(layout.column_tiles, row, b)] = row_of_scales[b];
    });
}

void dequantize_nvfp4(const Tensor& codes, const Tensor& block_scales, const Tensor& tensor_scale, const Tensor& out,
                      int threads) {
    const Expansion layout = expansion_of(codes, block_scales, &tensor_scale, out, 2, kBlock, "dequantize_nvfp4");
    expand_rows(layout, threads,
                [&](int64_t matrix, const uint8_t* row, const uint8_t* scales, int64_t columns, auto* values) {
                    expand(row, scales, layout.tensor_scale[matrix], columns, values);
                });
}

}  // namespace lrq::cpu
