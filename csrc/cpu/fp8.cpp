#include "../fp8.h"

#include "../kernels.h"
#include "clones.h"
#include "scaled.h"

namespace lrq::cpu {
namespace {

LRQ_CLONES void encode_row(const float* values, int64_t count, float scale, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(Fp8::encode(values[i] / scale));
}

LRQ_CLONES void decode_row(const uint8_t* codes, int64_t count, float scale, float* values) {
    for (int64_t i = 0; i < count; ++i) values[i] = Fp8::decode(codes[i]) * scale;
}

struct Codec : Fp8 {
    static constexpr auto encode = encode_row;
    static constexpr auto decode = decode_row;
};

}  // namespace

void quantize_fp8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                  const Tensor& codes, const Tensor& scale, int threads) {
    quantize_scaled<Codec>(scaled_of(x, scaling, block, given_scale, 0, codes, scale, "quantize_fp8"), threads);
}

void dequantize_fp8(const Tensor& codes, const Tensor& scale, const Tensor& out, int threads) {
    dequantize_scaled<Codec>(scaled_codes_of(codes, scale, 0, out, "dequantize_fp8"), out.type, threads);
}

}  // namespace lrq::cpu
