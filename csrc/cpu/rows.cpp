#include "rows.h"

#include "../narrow.h"
#include "clones.h"

namespace lrq::cpu {
namespace {

LRQ_CLONES void widen_row(const BFloat16* x, int64_t count, float* row) {
    for (int64_t i = 0; i < count; ++i) row[i] = widen(x[i]);
}

LRQ_CLONES void widen_row(const Float16* x, int64_t count, float* row) {
    for (int64_t i = 0; i < count; ++i) row[i] = widen(x[i]);
}

LRQ_CLONES void narrow_row(const float* row, int64_t count, BFloat16* out) {
    for (int64_t i = 0; i < count; ++i) narrow(row[i], out[i]);
}

LRQ_CLONES void narrow_row(const float* row, int64_t count, Float16* out) {
    for (int64_t i = 0; i < count; ++i) narrow(row[i], out[i]);
}

}  // namespace

void read_row(const Matrix& x, int64_t matrix, int64_t row, float* out) {
    const int64_t offset = matrix * x.batch_stride + row * x.row_stride;
    if (x.type == Type::kBFloat16)
        widen_row(static_cast<const BFloat16*>(x.data) + offset, x.columns, out);
    else if (x.type == Type::kFloat16)
        widen_row(static_cast<const Float16*>(x.data) + offset, x.columns, out);
    else
        std::memcpy(out, static_cast<const float*>(x.data) + offset, x.columns * sizeof(float));
}

void write_row(const float* row, int64_t columns, Type type, void* out, int64_t index) {
    if (type == Type::kBFloat16)
        narrow_row(row, columns, static_cast<BFloat16*>(out) + index * columns);
    else if (type == Type::kFloat16)
        narrow_row(row, columns, static_cast<Float16*>(out) + index * columns);
    else
        std::memcpy(static_cast<float*>(out) + index * columns, row, columns * sizeof(float));
}

LRQ_CLONES float row_amax(const float* row, int64_t columns) { return largest(row, columns); }

}  // namespace lrq::cpu
