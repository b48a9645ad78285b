// The Python class of a struct made by VF_ARGS (common/args.h): every field by keyword.
//
//     args = vfengine_native.GegluArgs(x=…, out=…, rows=2, width=8, dtype=0)
//     vfengine_native.geglu_cpu(args, threads)
//
// Addresses are integers, 0 or absent for none. A field that is missing, unknown or of another kind
// is a TypeError that names the struct and the field.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "common/args.h"
#include "common/dtype.h"
#include "common/noise.h"
#include "row_matmul.h"

namespace vf::bindings {

namespace py = pybind11;

// ---- a field's value from Python: read() says whether it is of its kind, expected() what that is

inline bool is_int(py::handle value) {
  return PyLong_Check(value.ptr()) && !PyBool_Check(value.ptr());
}

// An int in [0, last].
inline bool read_unsigned(py::handle value, uint64_t last, uint64_t& to) {
  if (!is_int(value)) return false;
  to = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return to <= last;
}

template <class T>
bool read(py::handle value, T*& to) {
  uint64_t address;
  if (!read_unsigned(value, UINTPTR_MAX, address)) return false;
  to = reinterpret_cast<T*>(static_cast<uintptr_t>(address));
  return true;
}
template <class T>
std::string expected(T* const&) {
  return "an address";
}

inline bool read(py::handle value, int64_t& to) {
  int overflow = 0;
  if (is_int(value)) to = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return is_int(value) && !overflow;
}
inline std::string expected(int64_t) { return "an int"; }

inline bool read(py::handle value, uint32_t& to) {
  uint64_t number;
  if (!read_unsigned(value, UINT32_MAX, number)) return false;
  to = uint32_t(number);
  return true;
}
inline std::string expected(uint32_t) { return "an int in [0, 2^32)"; }

inline bool read(py::handle value, float& to) {
  if (!PyFloat_Check(value.ptr()) && !is_int(value)) return false;
  to = float(PyFloat_AsDouble(value.ptr()));
  return true;
}
inline std::string expected(float) { return "a number"; }

inline bool read(py::handle value, bool& to) {
  to = value.ptr() == Py_True;
  return PyBool_Check(value.ptr());
}
inline std::string expected(bool) { return "a bool"; }

inline bool read(py::handle value, PhiloxKey& to) {
  uint64_t seed;
  if (!read_unsigned(value, UINT64_MAX, seed)) return false;
  to = {uint32_t(seed), uint32_t(seed >> 32)};
  return true;
}
inline std::string expected(const PhiloxKey&) { return "a seed in [0, 2^64)"; }

template <class Enum>
bool read_enum(py::handle value, Enum last, Enum& to) {
  uint64_t number;
  if (!read_unsigned(value, uint64_t(last), number)) return false;
  to = static_cast<Enum>(number);
  return true;
}
inline bool read(py::handle value, DType& to) { return read_enum(value, DType::words, to); }
inline std::string expected(DType) { return "the number of a dtype"; }
inline bool read(py::handle value, Epilogue& to) {
  return read_enum(value, Epilogue::quick_gelu, to);
}
inline std::string expected(Epilogue) { return "the number of an epilogue"; }

template <class Args>
auto read(py::handle value, Args& to) -> decltype(Args::kName, bool()) {
  if (!py::isinstance<Args>(value)) return false;
  to = value.cast<const Args&>();
  return true;
}
template <class Args>
auto expected(const Args&) -> decltype(Args::kName, std::string()) {
  return std::string("of ") + Args::kName;
}

template <class Args, int kMost>
bool read(py::handle values, List<Args, kMost>& to) {
  if (!PyTuple_Check(values.ptr()) && !PyList_Check(values.ptr())) return false;
  const size_t count = py::len(values);
  if (count < 1 || count > kMost) return false;
  for (py::handle value : values)
    if (!read(value, to.at[to.count++])) return false;
  return true;
}
template <class Args, int kMost>
std::string expected(const List<Args, kMost>&) {
  return "1 to " + std::to_string(kMost) + " " + expected(Args{});
}

// ---- the class
// -----------------------------------------------------------------------------------

template <class Args>
struct Field {
  py::str name;
  std::string kind;
  bool required;
  std::function<bool(Args&, py::handle)> set;  // false where the value is of another kind
};

template <class Args>
std::vector<Field<Args>> fields_of() {
  std::vector<Field<Args>> fields;
  Args::each_field([&](const char* name, auto member, bool required) {
    fields.push_back({py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)),
                      expected(Args{}.*member), required,
                      [=](Args& args, py::handle value) { return read(value, args.*member); }});
  });
  return fields;
}

template <class Args>
[[noreturn]] void refuse(py::handle name, const std::string& what) {
  throw py::type_error(std::string(Args::kName) + ": " + std::string(py::str(name)) + " " + what);
}

template <class Args>
Args make_args(const std::vector<Field<Args>>& fields, const py::kwargs& given) {
  Args args{};
  size_t taken = 0;
  for (const Field<Args>& field : fields) {
    const py::handle value = PyDict_GetItemWithError(given.ptr(), field.name.ptr());
    if (!value) {
      if (field.required) refuse<Args>(field.name, "is missing");
      continue;
    }
    if (!field.set(args, value)) {
      const std::string type = py::str(py::type::of(value).attr("__name__"));
      refuse<Args>(field.name,
                   "must be " + field.kind + ", got " + type + " " + std::string(py::repr(value)));
    }
    ++taken;
  }
  if (taken == given.size()) return args;
  for (const auto& [name, value] : given)
    if (std::none_of(fields.begin(), fields.end(),
                     [name = name](const Field<Args>& field) { return field.name.equal(name); }))
      refuse<Args>(name, "is no field of it");
  return args;
}

// The class, once however many ops take it. Its attributes: fields, {name: kind}, and those that
// are optional.
template <class Args>
void define_args(py::module_& m) {
  if (py::hasattr(m, Args::kName)) return;
  const auto fields = fields_of<Args>();
  py::class_<Args> args(m, Args::kName);
  args.def(py::init([=](const py::kwargs& given) { return make_args<Args>(fields, given); }));
  py::dict kinds;
  py::list optional;
  for (const Field<Args>& field : fields) {
    kinds[field.name] = field.kind;
    if (!field.required) optional.append(field.name);
  }
  args.attr("fields") = kinds;
  args.attr("optional") = py::tuple(optional);
}

}  // namespace vf::bindings
