// What the host decides of matrices that no test has the memory for: which way their vectors are found, and whether one
// launch takes them. Nothing is launched. Prints what is wrong.
#include <cstdio>

#include "../../csrc/cuda/fp8.cu"

namespace lrq::cuda {

constexpr int64_t kMany = int64_t{1} << 32;

bool refuses_rows(int64_t rows, int64_t columns) {
    Scaled layout{};
    layout.x = {nullptr, Type::kBFloat16, 1, rows, columns, 0, columns};
    layout.tile_rows = 1, layout.tile_columns = columns;
    try {
        quantize_scaled<Codec>(layout, std::nullopt, 0, "quantize_fp8");
    } catch (const std::invalid_argument&) {
        return true;
    } catch (const std::runtime_error&) {  // of CUDA: there may be no GPU
    }
    return false;
}

int wrong() {
    int count = 0;
    const auto expect = [&](bool holds, const char* what) {
        if (!holds) std::printf("%s\n", what), ++count;
    };
    // Expanded rows: the stride of the input is 0, that of the output the number of columns.
    const Matrix expanded{nullptr, Type::kBFloat16, 1, 2, kMany + 8, 0, 0};
    expect(way_of<BFloat16>(expanded) == Way::kAny, "32 bits hold no columns of 2^32 + 8");
    expect(way_of<BFloat16>({nullptr, Type::kBFloat16, 1, 2, 4096, 0, 0}) == Way::kAligned,
           "expanded rows are aligned");
    expect(refuses_rows(kMany + 4, 8), "2^32 + 4 rows are no 4");
    return count;
}

}  // namespace lrq::cuda

int main() { return lrq::cuda::wrong(); }
