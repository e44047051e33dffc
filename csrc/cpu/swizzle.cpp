#include "../swizzle.h"

#include "../kernels.h"
#include "../matrix.h"
#include "parallel.h"

namespace lrq::cpu {
namespace {

const uint8_t* row_of(const Matrix& x, int64_t matrix, int64_t row) {
    return static_cast<const uint8_t*>(x.data) + matrix * x.batch_stride + row * x.row_stride;
}

}  // namespace

void swizzle_scales(const Tensor& scales, const Tensor& out, int threads) {
    const Matrix x = bytes_of(scales, "swizzle_scales");
    const int64_t rows = out.size(2), columns = out.size(1);
    require(rows >= x.rows && columns >= x.columns, "swizzle_scales: the output is too small");
    parallel_rows(x.batch * rows, worker_count(x.batch * rows, threads), [&](int, int64_t index) {
        const int64_t matrix = index / rows, row = index % rows;
        uint8_t* to = static_cast<uint8_t*>(out.data) + matrix * rows * columns;
        to += swizzled(columns / kTileColumns, row, 0);
        const int64_t present = row < x.rows ? x.columns : 0;
        const uint8_t* const from = present ? row_of(x, matrix, row) : nullptr;
        for (int64_t column = 0; column < columns; column += kTileColumns, to += kTile)
            for (int i = 0; i < kTileColumns; ++i) to[i] = column + i < present ? from[column + i] : uint8_t{0};
    });
}

void unswizzle_scales(const Tensor& swizzled_scales, const Tensor& out, int threads) {
    const Matrix x = bytes_of(swizzled_scales, "unswizzle_scales");
    const int64_t rows = out.size(2), columns = out.size(1);
    require(x.row_stride == x.columns && (x.batch == 1 || x.batch_stride == x.rows * x.columns),
            "unswizzle_scales: the input must be contiguous");
    require(x.rows >= rows && x.columns >= columns, "unswizzle_scales: the input is too small");
    parallel_rows(x.batch * rows, worker_count(x.batch * rows, threads), [&](int, int64_t index) {
        const int64_t matrix = index / rows, row = index % rows;
        const uint8_t* from = row_of(x, matrix, 0) + swizzled(x.columns / kTileColumns, row, 0);
        uint8_t* const to = static_cast<uint8_t*>(out.data) + index * columns;
        for (int64_t column = 0; column < columns; column += kTileColumns, from += kTile)
            for (int i = 0; i < kTileColumns; ++i)
                if (column + i < columns) to[column + i] = from[i];
    });
}

}  // namespace lrq::cpu
