#include "amax.h"

#include "../kernels.h"

namespace lrq::cpu {

void amax(const Tensor& x, const Tensor& out, int threads) {
    require(out.type == Type::kFloat32, "amax: the output must be float32");
    const Matrix matrix = matrix_of(x, "amax");
    amax_of_matrices(
        matrix, threads, [&](int64_t m, int64_t row, float* values) { read_row(matrix, m, row, values); },
        [&](int64_t m, float most) { static_cast<float*>(out.data)[m] = most; });
}

}  // namespace lrq::cpu
