#include "../kernels.h"
#include "../matrix.h"
#include "clones.h"
#include "parallel.h"

namespace lrq::cpu {
namespace {

LRQ_CLONES void pack_row(const uint8_t* codes, int64_t count, int even_shift, uint8_t* packed) {
    const int odd_shift = 4 - even_shift;
    for (int64_t i = 0; i < count; ++i)
        packed[i] = static_cast<uint8_t>((codes[2 * i] & 15) << even_shift | (codes[2 * i + 1] & 15) << odd_shift);
}

LRQ_CLONES void unpack_row(const uint8_t* packed, int64_t count, int even_shift, uint8_t* codes) {
    const int odd_shift = 4 - even_shift;
    for (int64_t i = 0; i < count; ++i) {
        codes[2 * i] = static_cast<uint8_t>(packed[i] >> even_shift & 15);
        codes[2 * i + 1] = static_cast<uint8_t>(packed[i] >> odd_shift & 15);
    }
}

// Calls `work(from, to)` for every row of bytes and of the contiguous output.
template <class Work>
void for_rows(const Matrix& x, const Tensor& out, int threads, const Work& work) {
    const int64_t rows = x.batch * x.rows;
    parallel_rows(rows, worker_count(rows, threads), [&](int, int64_t index) {
        const int64_t offset = index / x.rows * x.batch_stride + index % x.rows * x.row_stride;
        work(static_cast<const uint8_t*>(x.data) + offset, static_cast<uint8_t*>(out.data) + index * out.size(1));
    });
}

}  // namespace

void pack_fp4(const Tensor& codes, bool high_first, const Tensor& out, int threads) {
    const Matrix x = bytes_of(codes, "pack_fp4");
    for_rows(x, out, threads,
             [&](const uint8_t* from, uint8_t* to) { pack_row(from, x.columns / 2, high_first ? 4 : 0, to); });
}

void unpack_fp4(const Tensor& packed, bool high_first, const Tensor& out, int threads) {
    const Matrix x = bytes_of(packed, "unpack_fp4");
    for_rows(x, out, threads,
             [&](const uint8_t* from, uint8_t* to) { unpack_row(from, x.columns, high_first ? 4 : 0, to); });
}

}  // namespace lrq::cpu
