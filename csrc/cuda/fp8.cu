#include "../fp8.h"

#include "../kernels.h"
#include "scaled.h"
#include "unscaled.h"

namespace lrq::cuda {
namespace {

struct Codec : Fp8 {
    // It keeps the sign of zero.
    using Quotient = lrq::Quotient;

    template <bool kBounded>
    static __device__ __forceinline__ uint32_t pack(float a, float b, float c, float d) {
        return encode_e4m3x2(b, a) | encode_e4m3x2(d, c) << 16;
    }

    static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
        decode_e4m3x2(word & 0xffffu, values[1], values[0]);
        decode_e4m3x2(word >> 16, values[3], values[2]);
    }
};

}  // namespace

void quantize_fp8(const Tensor& x, const std::string& scaling, int64_t block, const std::optional<Tensor>& given_scale,
                  const std::optional<Tensor>& room, const Tensor& codes, const Tensor& scale, uintptr_t stream) {
    constexpr char kOperation[] = "quantize_fp8";
    const DeviceGuard guard(x.device_index, kOperation);
    quantize_scaled<Codec>(scaled_of(x, scaling, block, given_scale, 0, codes, scale, kOperation), room, stream,
                           kOperation);
}

void dequantize_fp8(const Tensor& codes, const Tensor& scale, const Tensor& out, uintptr_t stream) {
    constexpr char kOperation[] = "dequantize_fp8";
    const DeviceGuard guard(codes.device_index, kOperation);
    dequantize_scaled<Codec>(scaled_codes_of(codes, scale, 0, out, kOperation), out.type, stream, kOperation);
}

}  // namespace lrq::cuda
