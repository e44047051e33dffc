#include "amax.h"

#include "../kernels.h"

namespace lrq::cuda {

void amax(const Tensor& x, const Tensor& out, uintptr_t stream) {
    constexpr char kOperation[] = "amax";
    require(out.type == Type::kFloat32, "amax: the output must be float32");
    const Matrix matrix = matrix_of(x, kOperation);
    float* const most = static_cast<float*>(out.data);
    const DeviceGuard guard(x.device_index, kOperation);
    check(cudaMemsetAsync(most, 0, matrix.batch * sizeof(float), reinterpret_cast<cudaStream_t>(stream)), kOperation);
    if (x.type == Type::kBFloat16)
        launch_amax<BFloat16, false>(matrix, most, stream, kOperation);
    else if (x.type == Type::kFloat16)
        launch_amax<Float16, false>(matrix, most, stream, kOperation);
    else
        launch_amax<float, false>(matrix, most, stream, kOperation);
}

}  // namespace lrq::cuda
