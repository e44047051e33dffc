#include "hadamard.h"

#include "../kernels.h"

namespace lrq::cuda {
namespace {

constexpr char kOperation[] = "rotate_hadamard";

template <class T>
struct Rotated {
    Matrix x;
    T* out;
};

// A thread block rotates a row, in rounds.
template <int kGroup, class T, class Out, bool kAligned>
__global__ void __launch_bounds__(kRotationThreads) rotate_kernel(Rotated<Out> layout) {
    await_predecessor();
    extern __shared__ float4 room[];
    const Rotation<kGroup> rotation(reinterpret_cast<float*>(room));
    const int64_t matrix = batch_index(), row = blockIdx.x, columns = layout.x.columns;
    if (matrix >= layout.x.batch) return;
    const T* const source =
        static_cast<const T*>(layout.x.data) + matrix * layout.x.batch_stride + row * layout.x.row_stride;
    Out* const out = layout.out + (matrix * layout.x.rows + row) * columns;
    for (int64_t first = 0; first < columns; first += blockDim.x * kRotated) {
        float values[kRotated];
        load_rotated<kAligned>(source, first + threadIdx.x * kRotated, columns, values);
        rotation.rotate(values);
        const int64_t block = first + threadIdx.x / kSharers * (kSharers * kRotated);
#pragma unroll
        for (int i = 0; i < kRotated; ++i) {
            const int64_t column = block + rotation.position(i);
            if (column < columns) narrow(values[i], out[column]);
        }
    }
}

template <class T, class Out>
void rotate_as(const Matrix& x, int group, void* out, uintptr_t stream) {
    with_group(group, kOperation, [&](auto constant) {
        constexpr int kGroup = decltype(constant)::value;
        const auto kernel =
            is_aligned_throughout<T>(x) ? rotate_kernel<kGroup, T, Out, true> : rotate_kernel<kGroup, T, Out, false>;
        const unsigned threads = rotation_threads<kGroup, 1>(x.columns);
        launch_sharing(kOperation, kernel, batch_grid(x.rows, x.batch, kOperation), dim3(threads),
                       rotation_bytes(threads), stream, Rotated<Out>{x, static_cast<Out*>(out)});
    });
}

}  // namespace

void rotate_hadamard(const Tensor& x, int group, const Tensor& out, uintptr_t stream) {
    const Matrix matrix = matrix_of(x, kOperation);
    const DeviceGuard guard(x.device_index, kOperation);
    if (x.type == Type::kBFloat16 && out.type == Type::kFloat32)
        rotate_as<BFloat16, float>(matrix, group, out.data, stream);
    else if (x.type == Type::kFloat16 && out.type == Type::kFloat32)
        rotate_as<Float16, float>(matrix, group, out.data, stream);
    else if (x.type == Type::kFloat32 && out.type == Type::kFloat32)
        rotate_as<float, float>(matrix, group, out.data, stream);
    else if (x.type == Type::kFloat32 && out.type == Type::kBFloat16)
        rotate_as<float, BFloat16>(matrix, group, out.data, stream);
    else if (x.type == Type::kFloat32 && out.type == Type::kFloat16)
        rotate_as<float, Float16>(matrix, group, out.data, stream);
    else
        require(false, "rotate_hadamard: float32 is given or wanted");
}

}  // namespace lrq::cuda
