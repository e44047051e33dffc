// Largest magnitude of every matrix.
#pragma once

#include <vector>

#include "../matrix.h"
#include "parallel.h"
#include "rows.h"

namespace lrq::cpu {

// As integers, which a NaN wins.
LRQ_INLINE float larger(float a, float b) { return to_bits(a) < to_bits(b) ? b : a; }

// `read(matrix, row, values)` gives the columns of a row. Sets `out(matrix)`.
template <class Read, class Out>
void amax_of_matrices(const Matrix& x, int threads, const Read& read, const Out& out) {
    const int workers = worker_count(x.batch * x.rows, threads);
    std::vector<std::vector<float>> rows(workers, std::vector<float>(x.columns));
    std::vector<float> amax(x.batch * workers, 0.0f);
    parallel_rows(x.batch * x.rows, workers, [&](int worker, int64_t index) {
        const int64_t matrix = index / x.rows;
        float* const row = rows[worker].data();
        read(matrix, index % x.rows, row);
        float& most = amax[matrix * workers + worker];
        most = larger(most, row_amax(row, x.columns));
    });
    for (int64_t m = 0; m < x.batch; ++m) out(m, largest(&amax[m * workers], workers));
}

}  // namespace lrq::cpu
