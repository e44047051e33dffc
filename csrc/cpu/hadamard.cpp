#include "hadamard.h"

#include "../kernels.h"
#include "clones.h"
#include "parallel.h"
#include "rows.h"

namespace lrq::cpu {
namespace {

LRQ_INLINE void butterfly(float* x, int64_t span) {
    const float s = x[0] + x[span], t = x[0] - x[span];
    const float u = x[2 * span] + x[3 * span], v = x[2 * span] - x[3 * span];
    x[0] = s + v;
    x[span] = s - v;
    x[2 * span] = t + u;
    x[3 * span] = u - t;
}

}  // namespace

LRQ_CLONES void rotate_row(float* row, int64_t columns, int group) {
    for (int64_t i = 0; i < columns; i += 4) butterfly(row + i, 1);
    float root = 0.5f;
    for (int64_t span = 4; span < group; span *= 4) {
        root *= 0.5f;
        for (int64_t first = 0; first < columns; first += 4 * span)
            for (int64_t i = first; i < first + span; ++i) butterfly(row + i, span);
    }
    for (int64_t i = 0; i < columns; ++i) row[i] *= root;
}

void rotate_hadamard(const Tensor& x, int group, const Tensor& out, int threads) {
    require(out.type == Type::kFloat32, "rotate_hadamard: the output must be float32");
    const Matrix matrix = matrix_of(x, "rotate_hadamard");
    const int64_t rows = matrix.batch * matrix.rows;
    parallel_rows(rows, worker_count(rows, threads), [&](int, int64_t index) {
        float* const row = static_cast<float*>(out.data) + index * matrix.columns;
        read_row(matrix, index / matrix.rows, index % matrix.rows, row);
        rotate_row(row, matrix.columns, group);
    });
}

}  // namespace lrq::cpu
