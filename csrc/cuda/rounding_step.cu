#include "../rounding_step.h"

#include "../kernels.h"
#include "vector.h"

namespace lrq::cuda {
namespace {

using rounding_step::kPart;
using rounding_step::Layout;

constexpr char kOperation[] = "rounding_step";
// A thread block for a part, a vector for a thread.
constexpr int kThreads = kPart / kVector;
constexpr int kWarps = kThreads / kWarpSize;

struct Division {
    Divisor block_rows, block_columns, parts_across;
    // Whether a vector has one scale.
    bool uniform;
};

// Neighbours are added until one is left, in every lane.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int apart = 1; apart < kLanes; apart *= 2) x += __shfl_xor_sync(kWholeWarp, x, apart);
    return x;
}

// Squared errors and moves of the thread block, for its first thread.
__device__ __forceinline__ float2 sums_of_part(float squares, int moves) {
    __shared__ float2 shared[kWarps];
    const unsigned lane = threadIdx.x % kWarpSize;
    squares = sum_of_lanes<kWarpSize>(squares);
    moves = __reduce_add_sync(kWholeWarp, moves);
    if (lane == 0) shared[threadIdx.x / kWarpSize] = make_float2(squares, static_cast<float>(moves));
    __syncthreads();
    const float2 mine = shared[lane % kWarps];
    return make_float2(sum_of_lanes<kWarps>(mine.x), sum_of_lanes<kWarps>(mine.y));
}

template <bool kAligned>
__device__ __forceinline__ Vector<float> curvatures(const float* of_columns, int64_t place, int left) {
    if (of_columns) return load_vector<kAligned>(of_columns + place, left);
    Vector<float> ones;
#pragma unroll
    for (int i = 0; i < kVector; ++i) ones.words[i] = __float_as_uint(1.0f);
    return ones;
}

template <class T, class Gradient, bool kAligned>
__global__ void __launch_bounds__(kThreads) step_kernel(Layout layout, Division division) {
    await_predecessor();
    const int64_t matrix = batch_index(), rows = layout.weight.rows, columns = layout.weight.columns;
    if (matrix >= layout.weight.batch) return;
    const uint32_t down = division.parts_across.quotient(blockIdx.x);
    const uint32_t across = division.parts_across.remainder(blockIdx.x, down);
    const uint32_t position = threadIdx.x * kVector, beside = position & (layout.part_columns() - 1);
    const uint32_t row = down * layout.part_rows() + (position >> layout.column_bits);
    const uint32_t column = across * layout.part_columns() + beside;
    const int left = row < rows ? static_cast<int>(min(columns - column, int64_t{kVector})) : 0;

    float squares[kVector] = {};
    int moves = 0;
    if (left > 0) {
        const auto source = [&](const Matrix& x, auto type) {
            const int64_t offset = matrix * x.batch_stride + row * x.row_stride + column;
            return load_vector<kAligned>(static_cast<const decltype(type)*>(x.data) + offset, left);
        };
        const Vector<T> weight = source(layout.weight, T{});
        const Vector<BFloat16> value = source(layout.values, BFloat16{});
        const Vector<Gradient> gradient = source(layout.gradient, Gradient{});
        const Vector<float> curvature = curvatures<kAligned>(layout.column_curvature, matrix * columns + column, left);
        const float of_row = layout.row_curvature ? __ldg(layout.row_curvature + matrix * rows + row) : 1.0f;
        const float* const scales =
            layout.scales + (matrix * layout.scale_rows + division.block_rows.quotient(row)) * layout.scale_columns;
        const float scale = __ldg(scales + division.block_columns.quotient(column));
        const float plain = __ldg(layout.plain_weight + matrix);
        const uint32_t below = rounding_step::fraction_of(__ldg(layout.share + matrix));
        const uint32_t index = row * static_cast<uint32_t>(columns) + column;
        float new_values[kVector], new_errors[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float shared = kAligned || division.uniform || i >= left
                                     ? scale
                                     : __ldg(scales + division.block_columns.quotient(column + i));
            const rounding_step::Weight after =
                rounding_step::step(weight[i], value[i], shared, gradient[i], of_row * curvature[i] + plain, plain,
                                    rounding_step::fraction(index + i, layout.key) < below, layout.grid);
            new_values[i] = after.value;
            new_errors[i] = after.error;
            if (kAligned || i < left) {
                squares[i] = after.error * after.error;
                moves += after.moves;
            }
        }
        const int64_t place = (matrix * rows + row) * columns + column;
        if constexpr (kAligned) {
            store_values(layout.new_values + place, new_values);
            store_values(layout.new_error + place, new_errors);
        } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (i >= left) break;
                narrow(new_values[i], layout.new_values[place + i]);
                narrow(new_errors[i], layout.new_error[place + i]);
            }
        }
    }
    const float total = ((squares[0] + squares[1]) + (squares[2] + squares[3])) +
                        ((squares[4] + squares[5]) + (squares[6] + squares[7]));
    const float2 sums = sums_of_part(total, moves);
    if (threadIdx.x == 0) reinterpret_cast<float2*>(layout.sums)[matrix * gridDim.x + blockIdx.x] = sums;
}

template <class T, class Gradient>
void run(const Layout& layout, uintptr_t stream) {
    const Matrix& x = layout.weight;
    require(x.columns <= std::numeric_limits<int32_t>::max() - kPart &&
                x.rows <= std::numeric_limits<int32_t>::max() - kPart,
            "rounding_step: the matrix is too large for one launch");
    const Division division{Divisor(layout.block_rows, kOperation), Divisor(layout.block_columns, kOperation),
                            Divisor(layout.parts_across(), kOperation),
                            layout.block_columns >= x.columns || layout.block_columns % kVector == 0};
    const bool aligned =
        division.uniform && is_aligned_throughout<T>(x) && is_aligned_throughout<BFloat16>(layout.values) &&
        is_aligned_throughout<Gradient>(layout.gradient) && is_multiple(layout.column_curvature, sizeof(uint4)) &&
        is_multiple(layout.new_values, sizeof(uint4)) && is_multiple(layout.new_error, sizeof(uint4));
    launch(kOperation, aligned ? step_kernel<T, Gradient, true> : step_kernel<T, Gradient, false>,
           batch_grid(layout.parts_down() * layout.parts_across(), x.batch, kOperation), dim3(kThreads), stream, layout,
           division);
}

template <class T>
void run_by_gradient(const Layout& layout, uintptr_t stream) {
    layout.gradient.type == Type::kBFloat16 ? run<T, BFloat16>(layout, stream) : run<T, float>(layout, stream);
}

}  // namespace

void rounding_step(const Tensor& weight, const Tensor& values, const Tensor& scale, int64_t block_rows,
                   int64_t block_columns, const Tensor& gradient, const std::optional<Tensor>& row_curvature,
                   const std::optional<Tensor>& column_curvature, const Tensor& plain_weight, const Tensor& share,
                   uint32_t key, const std::tuple<int, int, float>& grid, int part_columns, const Tensor& new_values,
                   const Tensor& new_error, const Tensor& sums, uintptr_t stream) {
    const Layout layout = rounding_step::layout_of(weight, values, scale, block_rows, block_columns, gradient,
                                                   row_curvature, column_curvature, plain_weight, share, key, grid,
                                                   part_columns, new_values, new_error, sums, kOperation);
    const DeviceGuard guard(weight.device_index, kOperation);
    if (weight.type == Type::kBFloat16)
        run_by_gradient<BFloat16>(layout, stream);
    else if (weight.type == Type::kFloat16)
        run_by_gradient<Float16>(layout, stream);
    else
        run_by_gradient<float>(layout, stream);
}

}  // namespace lrq::cuda
