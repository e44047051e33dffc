#include "../rounding_step.h"

#include "../kernels.h"
#include "clones.h"
#include "parallel.h"
#include "rows.h"

namespace lrq::cpu {
namespace {

using rounding_step::Grid;
using rounding_step::kPart;
using rounding_step::Layout;

constexpr char kOperation[] = "rounding_step";
constexpr int64_t kPartsAtATime = 8;

// The weights of a row that lie in a part; `curvature` is that of its columns.
struct Row {
    float weight[kPart], values[kPart], gradient[kPart], scales[kPart];
    const float* curvature;
};

struct Numbers {
    float of_row, plain;
    uint32_t below, index, key;
    Grid grid;
};

// Values become the new ones and weights their errors; how many weights moved.
LRQ_CLONES int step_row(Row& row, int64_t count, Numbers n, float* squares) {
    int moves = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t fraction = rounding_step::fraction(n.index + i, n.key);
        const rounding_step::Weight after =
            rounding_step::step(row.weight[i], row.values[i], row.scales[i], row.gradient[i],
                                n.of_row * row.curvature[i] + n.plain, n.plain, fraction < n.below, n.grid);
        row.values[i] = after.value;
        row.weight[i] = after.error;
        squares[i] = after.error * after.error;
        moves += after.moves;
    }
    return moves;
}

LRQ_CLONES float sum_of_neighbours(float* x) {
    for (int64_t left = kPart / 2; left > 0; left /= 2)
        for (int64_t i = 0; i < left; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    return x[0];
}

void read_part(Matrix x, int64_t matrix, int64_t row, int64_t first, int64_t count, float* out) {
    const int64_t bytes = x.type == Type::kFloat32 ? sizeof(float) : sizeof(BFloat16);
    x.data = static_cast<const char*>(x.data) + first * bytes;
    x.columns = count;
    read_row(x, matrix, row, out);
}

void step_part(const Layout& layout, int64_t matrix, int64_t part, const float* ones) {
    const int64_t rows = layout.weight.rows, columns = layout.weight.columns;
    const int64_t top = part / layout.parts_across() * layout.part_rows();
    const int64_t first = part % layout.parts_across() * layout.part_columns();
    const int64_t count = std::min<int64_t>(columns - first, layout.part_columns());
    const float plain = layout.plain_weight[matrix];
    float squares[kPart] = {};
    Row held;
    held.curvature = layout.column_curvature ? layout.column_curvature + matrix * columns + first : ones;
    int moves = 0;
    for (int64_t row = top; row < std::min(top + layout.part_rows(), rows); ++row) {
        read_part(layout.weight, matrix, row, first, count, held.weight);
        read_part(layout.values, matrix, row, first, count, held.values);
        read_part(layout.gradient, matrix, row, first, count, held.gradient);
        const float* const scales =
            layout.scales + (matrix * layout.scale_rows + row / layout.block_rows) * layout.scale_columns;
        for (int64_t i = 0; i < count;) {
            const int64_t block = (first + i) / layout.block_columns;
            const int64_t end = std::min((block + 1) * layout.block_columns - first, count);
            std::fill(held.scales + i, held.scales + end, scales[block]);
            i = end;
        }
        const float of_row = layout.row_curvature ? layout.row_curvature[matrix * rows + row] : 1.0f;
        const Numbers numbers{of_row,
                              plain,
                              rounding_step::fraction_of(layout.share[matrix]),
                              static_cast<uint32_t>(row * columns + first),
                              layout.key,
                              layout.grid};
        const int64_t place = (matrix * rows + row) * columns + first;
        moves += step_row(held, count, numbers, squares + (row - top) * layout.part_columns());
        write_row(held.values, count, Type::kBFloat16, layout.new_values + place, 0);
        write_row(held.weight, count, Type::kBFloat16, layout.new_error + place, 0);
    }
    float* const sums = layout.sums + (matrix * layout.parts_down() * layout.parts_across() + part) * 2;
    sums[0] = sum_of_neighbours(squares);
    sums[1] = static_cast<float>(moves);
}

}  // namespace

void rounding_step(const Tensor& weight, const Tensor& values, const Tensor& scale, int64_t block_rows,
                   int64_t block_columns, const Tensor& gradient, const std::optional<Tensor>& row_curvature,
                   const std::optional<Tensor>& column_curvature, const Tensor& plain_weight, const Tensor& share,
                   uint32_t key, const std::tuple<int, int, float>& grid, int part_columns, const Tensor& new_values,
                   const Tensor& new_error, const Tensor& sums, int threads) {
    const Layout layout = rounding_step::layout_of(weight, values, scale, block_rows, block_columns, gradient,
                                                   row_curvature, column_curvature, plain_weight, share, key, grid,
                                                   part_columns, new_values, new_error, sums, kOperation);
    const std::vector<float> ones(layout.part_columns(), 1.0f);
    const int64_t parts = layout.parts_down() * layout.parts_across(), all = parts * layout.weight.batch;
    parallel_rows(
        all, worker_count(all, threads, kPartsAtATime),
        [&](int, int64_t index) { step_part(layout, index / parts, index % parts, ones.data()); }, kPartsAtATime);
}

}  // namespace lrq::cpu
