// Reads a torch.Tensor by its Python attributes: no torch header, so one build serves every torch version.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "tensor.h"

namespace lrq {

inline Type type_named(const std::string& name) {
    static constexpr std::pair<const char*, Type> kTypes[] = {
        {"torch.float32", Type::kFloat32},          {"torch.bfloat16", Type::kBFloat16},
        {"torch.float16", Type::kFloat16},          {"torch.uint8", Type::kUInt8},
        {"torch.float8_e4m3fn", Type::kFloat8E4M3}, {"torch.int8", Type::kInt8},
    };
    for (const auto& [known, type] : kTypes)
        if (name == known) return type;
    return Type::kOther;
}

}  // namespace lrq

namespace pybind11::detail {

template <>
struct type_caster<lrq::Tensor> {
    PYBIND11_TYPE_CASTER(lrq::Tensor, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        if (!hasattr(source, "data_ptr")) return false;
        const auto shape = reinterpret_borrow<object>(source.attr("shape")).cast<tuple>();
        const auto strides = source.attr("stride")().cast<tuple>();
        if (shape.size() > lrq::kMaxDimensions) return false;
        value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
        value.type = lrq::type_named(str(source.attr("dtype")).cast<std::string>());
        value.dimensions = static_cast<int>(shape.size());
        for (int i = 0; i < value.dimensions; ++i) {
            value.shape[i] = shape[i].cast<int64_t>();
            value.strides[i] = strides[i].cast<int64_t>();
        }
        const object device = source.attr("device");
        value.on_cuda = device.attr("type").cast<std::string>() == "cuda";
        const object index = device.attr("index");
        value.device_index = index.is_none() ? -1 : index.cast<int>();
        return true;
    }
};

}  // namespace pybind11::detail
