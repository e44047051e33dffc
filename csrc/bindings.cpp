#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "caster.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

// Counts changes of the signatures below; lrq_kernels/native.py refuses another number.
constexpr int kInterface = 1;

using WithoutGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.attr("interface") = kInterface;
    m.def("quantize_nvfp4_cpu", &lrq::cpu::quantize_nvfp4, WithoutGil());
    m.def("dequantize_nvfp4_cpu", &lrq::cpu::dequantize_nvfp4, WithoutGil());
    m.def("quantize_mxfp8_cpu", &lrq::cpu::quantize_mxfp8, WithoutGil());
    m.def("dequantize_mxfp8_cpu", &lrq::cpu::dequantize_mxfp8, WithoutGil());
    m.def("pack_fp4_cpu", &lrq::cpu::pack_fp4, WithoutGil());
    m.def("unpack_fp4_cpu", &lrq::cpu::unpack_fp4, WithoutGil());
    m.def("swizzle_scales_cpu", &lrq::cpu::swizzle_scales, WithoutGil());
    m.def("unswizzle_scales_cpu", &lrq::cpu::unswizzle_scales, WithoutGil());
    m.def("amax_cpu", &lrq::cpu::amax, WithoutGil());
    m.def("quantize_fp8_cpu", &lrq::cpu::quantize_fp8, WithoutGil());
    m.def("dequantize_fp8_cpu", &lrq::cpu::dequantize_fp8, WithoutGil());
    m.def("quantize_int8_cpu", &lrq::cpu::quantize_int8, WithoutGil());
    m.def("dequantize_int8_cpu", &lrq::cpu::dequantize_int8, WithoutGil());
    m.def("rotate_hadamard_cpu", &lrq::cpu::rotate_hadamard, WithoutGil());
    m.def("rounding_step_cpu", &lrq::cpu::rounding_step, WithoutGil());
#ifdef LRQ_CUDA
    m.attr("has_cuda") = true;
    m.def("cuda_refusal", &lrq::cuda::refusal, WithoutGil());
    m.def("quantize_nvfp4_cuda", &lrq::cuda::quantize_nvfp4, WithoutGil());
    m.def("dequantize_nvfp4_cuda", &lrq::cuda::dequantize_nvfp4, WithoutGil());
    m.def("quantize_mxfp8_cuda", &lrq::cuda::quantize_mxfp8, WithoutGil());
    m.def("dequantize_mxfp8_cuda", &lrq::cuda::dequantize_mxfp8, WithoutGil());
    m.def("pack_fp4_cuda", &lrq::cuda::pack_fp4, WithoutGil());
    m.def("unpack_fp4_cuda", &lrq::cuda::unpack_fp4, WithoutGil());
    m.def("swizzle_scales_cuda", &lrq::cuda::swizzle_scales, WithoutGil());
    m.def("unswizzle_scales_cuda", &lrq::cuda::unswizzle_scales, WithoutGil());
    m.def("amax_cuda", &lrq::cuda::amax, WithoutGil());
    m.def("quantize_fp8_cuda", &lrq::cuda::quantize_fp8, WithoutGil());
    m.def("dequantize_fp8_cuda", &lrq::cuda::dequantize_fp8, WithoutGil());
    m.def("quantize_int8_cuda", &lrq::cuda::quantize_int8, WithoutGil());
    m.def("dequantize_int8_cuda", &lrq::cuda::dequantize_int8, WithoutGil());
    m.def("rotate_hadamard_cuda", &lrq::cuda::rotate_hadamard, WithoutGil());
    m.def("rounding_step_cuda", &lrq::cuda::rounding_step, WithoutGil());
#else
    m.attr("has_cuda") = false;
#endif
}
