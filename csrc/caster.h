// Reads a torch.Tensor by its Python attributes: no torch header, so one build serves every torch version.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>
#include <utility>

#include "tensor.h"

namespace lrq {

inline Type type_named(std::string_view name) {
    static constexpr std::pair<std::string_view, Type> kTypes[] = {
        {"torch.float32", Type::kFloat32},          {"torch.bfloat16", Type::kBFloat16},
        {"torch.float16", Type::kFloat16},          {"torch.uint8", Type::kUInt8},
        {"torch.float8_e4m3fn", Type::kFloat8E4M3}, {"torch.int8", Type::kInt8},
    };
    for (const auto& [known, type] : kTypes)
        if (name == known) return type;
    return Type::kOther;
}

// torch's dtypes are singletons that are never freed: their addresses name them.
inline Type type_of(pybind11::handle dtype) {
    static std::pair<const PyObject*, Type> seen[16];
    for (auto& [object, type] : seen) {
        if (object == dtype.ptr()) return type;
        if (object) continue;
        type = type_named(std::string(pybind11::str(dtype)));
        object = dtype.ptr();
        return type;
    }
    return type_named(std::string(pybind11::str(dtype)));
}

// Attribute names, made once: a call reads six of them for every tensor.
struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* get_device = PyUnicode_InternFromString("get_device");
    PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");

    static const Names& get() {
        static const Names names;
        return names;
    }
};

inline pybind11::object attribute(pybind11::handle source, PyObject* name) {
    return pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(source.ptr(), name));
}

inline pybind11::object answer(pybind11::handle source, PyObject* method) {
    return pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(source.ptr(), method));
}

inline bool read_sizes(const pybind11::object& sizes, int64_t* out, int count) {
    if (!sizes || !PyTuple_Check(sizes.ptr()) || PyTuple_GET_SIZE(sizes.ptr()) != count) return false;
    for (int i = 0; i < count; ++i) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    return true;
}

inline bool read_tensor(pybind11::handle source, Tensor& tensor) {
    const Names& names = Names::get();
    const pybind11::object shape = attribute(source, names.shape);
    if (!shape || !PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) > kMaxDimensions) return false;
    tensor.dimensions = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    const pybind11::object address = answer(source, names.data_ptr), device = answer(source, names.get_device);
    const pybind11::object dtype = attribute(source, names.dtype), is_cuda = attribute(source, names.is_cuda);
    if (!address || !device || !dtype || !is_cuda) return false;
    tensor.data = PyLong_AsVoidPtr(address.ptr());
    tensor.type = type_of(dtype);
    tensor.on_cuda = is_cuda.ptr() == Py_True;
    tensor.device_index = static_cast<int>(PyLong_AsLong(device.ptr()));
    return read_sizes(shape, tensor.shape, tensor.dimensions) &&
           read_sizes(answer(source, names.stride), tensor.strides, tensor.dimensions);
}

}  // namespace lrq

namespace pybind11::detail {

template <>
struct type_caster<lrq::Tensor> {
    PYBIND11_TYPE_CASTER(lrq::Tensor, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        const bool loaded = lrq::read_tensor(source, value) && !PyErr_Occurred();
        PyErr_Clear();
        return loaded;
    }
};

}  // namespace pybind11::detail
