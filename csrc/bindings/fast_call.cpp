// The short way of the frame ops, for plain CPU tensors.
//
// vfengine/ops/_frame_ops.py checks arguments in Python, which takes longer than the kernel of a
// small clip. The same checks here take a tenth. They only ever say yes to what Python would
// accept; where they do not, Python looks again and finds the words. Where torch is too old to say
// what a tensor is (dlpack_exchange.h), they always say no. All of it is behind one function,
// fast_call(op, fields): nothing else needs to know of it.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/args.h"
#include "bindings/dlpack_exchange.h"
#include "cpu/isa.h"

namespace vf::bindings {

namespace {

// ---- tensors -----------------------------------------------------------------------------------

struct Torch {
  py::object tensor, is_grad_enabled;
  py::str is_neg, requires_grad;
  int (*tensor_from_object)(void* object, dlpack::Tensor* out) = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    is_grad_enabled = torch.attr("is_grad_enabled");
    is_neg = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("is_neg"));
    requires_grad = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("requires_grad"));
    const py::object capsule = py::getattr(tensor, dlpack::kAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return;
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    if (api->major == dlpack::kMajorVersion) tensor_from_object = api->tensor_from_object;
  }
};

const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> torch;
  return torch.call_once_and_store_result([] { return Torch(); }).get_stored();
}

// Whether `object` is a torch.Tensor itself, on the CPU, contiguous, not empty, what its memory
// says, and not one that autograd follows; `tensor` is then what it is.
bool read_tensor(py::handle object, bool grad_enabled, dlpack::Tensor& tensor) {
  const Torch& t = torch();
  if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != t.tensor.ptr()) return false;
  const auto is_false = [](PyObject* answer) {
    const bool no = answer == Py_False;
    Py_XDECREF(answer);
    return no;
  };
  if (grad_enabled && !is_false(PyObject_GetAttr(object.ptr(), t.requires_grad.ptr())))
    return false;
  if (!is_false(PyObject_CallMethodNoArgs(object.ptr(), t.is_neg.ptr()))) return false;
  if (t.tensor_from_object(object.ptr(), &tensor) != 0) return false;
  if (tensor.device_type != dlpack::kCpu) return false;
  int64_t elements = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != elements) return false;
    elements *= tensor.shape[i];
  }
  return elements > 0;
}

char* start_of(const dlpack::Tensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

int64_t bytes_of(const dlpack::Tensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1},
                         std::multiplies<int64_t>()) *
         (tensor.dtype.bits / 8);
}

// ---- one call ----------------------------------------------------------------------------------

// What a frame op may take, tensors first; out is the first argument of every call.
enum Place {
  kX,
  kG,
  kR,
  kUncond,
  kLam,
  kCoeffs,
  kStep,
  kOut,
  kTensors,
  kScale = kTensors,
  kBaseSeed,
  kResidualSeed,
  kSample,
  kFrame,
  kPlaces
};
constexpr const char* kNames[kPlaces] = {"x",
                                         "g",
                                         "r",
                                         "r_uncond",
                                         "lam",
                                         "coeffs",
                                         "step",
                                         "out",
                                         "guidance_scale",
                                         "base_seed",
                                         "residual_seed",
                                         "sample_offset",
                                         "frame_offset"};

struct FastCall {
  std::string name;
  int columns;
  bool residual;
  void (*CpuKernels::*kernel)(const FrameArgs& args, int64_t threads);
  int at[kPlaces];  // which argument of the call a field is, or -1
  Py_ssize_t count;
};

template <class Rule>
FastCall of_rule(void (*CpuKernels::*kernel)(const FrameArgs&, int64_t)) {
  return {Rule::kName, Rule::kColumns, Rule::kResidual, kernel, {}, 0};
}

// The tensors as a kernel takes them; false where any does not fit.
bool tensors_fit(const FastCall& call, PyObject* const given[kPlaces], FrameArgs& args) {
  using dlpack::DataType;
  constexpr DataType kDTypes[] = {// in the order of DType
                                  {dlpack::kFloat, 32, 1},
                                  {dlpack::kFloat, 16, 1},
                                  {dlpack::kBfloat, 16, 1}};
  constexpr DataType kInt32{dlpack::kInt, 32, 1};
  if (torch().tensor_from_object == nullptr) return false;

  const bool grad_enabled = torch().is_grad_enabled().ptr() == Py_True;
  dlpack::Tensor t[kTensors];
  bool there[kTensors];
  for (int i = 0; i < kTensors; ++i) {
    there[i] = given[i] != Py_None;
    if (there[i] && !read_tensor(given[i], grad_enabled, t[i])) return false;
  }
  for (int i : {kX, kG, kLam, kCoeffs, kStep, kOut})
    if (!there[i]) return false;
  if (there[kR] != call.residual) return false;

  const dlpack::Tensor& x = t[kX];
  int dtype = 0;
  while (dtype < 3 && !(x.dtype == kDTypes[dtype])) ++dtype;
  if (dtype == 3 || x.ndim != 5) return false;
  const int64_t *s = x.shape, image[] = {s[0], s[2], s[3], s[4]};
  const int64_t one = 1, row[] = {t[kCoeffs].ndim ? t[kCoeffs].shape[0] : 0, call.columns};
  const auto is = [&](int i, DataType kind, const int64_t* shape, int ndim) {
    return !there[i] ||
           (t[i].dtype == kind && t[i].ndim == ndim && std::equal(shape, shape + ndim, t[i].shape));
  };
  for (int i : {kR, kUncond, kOut})
    if (!is(i, x.dtype, s, 5)) return false;
  if (!is(kG, x.dtype, image, 4) || !is(kLam, kDTypes[0], s + 1, 1) ||
      !is(kCoeffs, kDTypes[0], row, call.columns > 1 ? 2 : 1) || !is(kStep, kInt32, &one, 1))
    return false;

  char *const start = start_of(t[kOut]), *const end = start + bytes_of(x);
  for (int i = 0; i < kOut; ++i) {
    if (!there[i] || (i == kX && start_of(x) == start)) continue;
    char* const first = start_of(t[i]);
    if (first < end && start < first + bytes_of(t[i])) return false;
  }

  const auto pointer = [&](int i) { return there[i] ? start_of(t[i]) : nullptr; };
  args.x = pointer(kX);
  args.g = pointer(kG);
  args.r = pointer(kR);
  args.r_uncond = pointer(kUncond);
  args.lam = reinterpret_cast<const float*>(pointer(kLam));
  args.coeffs = reinterpret_cast<const float*>(pointer(kCoeffs));
  args.step = reinterpret_cast<const int32_t*>(pointer(kStep));
  args.out = start;
  args.batch = s[0];
  args.frames = s[1];
  args.pixels = s[2] * s[3] * s[4];
  args.num_steps = row[0];
  args.dtype = static_cast<DType>(dtype);
  return true;
}

bool numbers_fit(const FastCall& call, PyObject* const given[kPlaces], FrameArgs& args) {
  if (call.at[kScale] >= 0 && !read(given[kScale], args.guidance_scale)) return false;
  for (auto [place, seed] :
       {std::pair(kBaseSeed, &args.base_seed), std::pair(kResidualSeed, &args.residual_seed)}) {
    if (given[place] == Py_None) continue;
    if (!read(given[place], *seed)) return false;
    args.draw = true;
  }
  for (auto [place, offset] :
       {std::pair(kSample, &args.sample_offset), std::pair(kFrame, &args.frame_offset)})
    if (call.at[place] >= 0 && (!read(given[place], *offset) || *offset >> 31)) return false;
  return true;
}

bool is_text(PyObject* text, const char* value) {
  return PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, value) == 0;
}

bool means_cpu(PyObject* backend) {
  if (is_text(backend, "cpu")) return true;
  const char* environment = std::getenv("VFENGINE_KERNEL_BACKEND");
  return is_text(backend, "auto") && (!environment || !*environment);
}

constexpr char kCapsule[] = "vfengine_native.fast_call";
constexpr int kFirst = 3;  // arguments before the op's own: out, backend, threads

PyObject* make_call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto& call = *static_cast<FastCall*>(PyCapsule_GetPointer(self, kCapsule));
  if (count != call.count)
    return PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", call.name.c_str(),
                        call.count, count);
  try {
    PyObject* given[kPlaces];
    for (int i = 0; i < kPlaces; ++i) given[i] = call.at[i] < 0 ? Py_None : arguments[call.at[i]];
    FrameArgs args{};
    int64_t threads;
    if (!means_cpu(arguments[1]) || !read(arguments[2], threads) ||
        !numbers_fit(call, given, args) || !tensors_fit(call, given, args)) {
      PyErr_Clear();
      Py_RETURN_FALSE;
    }
    const py::gil_scoped_release release;
    (cpu_kernels().*call.kernel)(args, threads);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_TRUE;
}

PyMethodDef kMakeCall = {"fast_call",
                         reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&make_call)),
                         METH_FASTCALL, nullptr};

py::object fast_call(const std::string& op, const std::vector<std::string>& fields) {
  const FastCall rules[] = {of_rule<ResidualStep>(&CpuKernels::residual_step),
                            of_rule<DecomposedStep>(&CpuKernels::decomposed_step),
                            of_rule<RemoveBase>(&CpuKernels::remove_base)};
  const auto* rule = std::find_if(std::begin(rules), std::end(rules),
                                  [&](const FastCall& known) { return known.name == op; });
  if (rule == std::end(rules)) throw py::value_error("fast_call: " + op + " is no frame op");
  auto call = std::make_unique<FastCall>(*rule);
  std::fill(std::begin(call->at), std::end(call->at), -1);
  call->at[kOut] = 0;
  call->count = kFirst + Py_ssize_t(fields.size());
  for (size_t i = 0; i < fields.size(); ++i) {
    const auto* name = std::find(std::begin(kNames), std::end(kNames), fields[i]);
    if (name == std::end(kNames)) throw py::value_error(op + ": there is no field " + fields[i]);
    call->at[name - kNames] = kFirst + int(i);
  }
  const py::capsule self(call.release(), kCapsule, [](PyObject* capsule) {
    delete static_cast<FastCall*>(PyCapsule_GetPointer(capsule, kCapsule));
  });
  return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&kMakeCall, self.ptr(), nullptr));
}

}  // namespace

void define_fast_call(py::module_& m) {
  m.def("fast_call", &fast_call, py::arg("op"), py::arg("fields"),
        "call(out, backend, threads, *fields): runs the CPU kernel of a frame op and returns True, "
        "or does nothing and returns False");
}

}  // namespace vf::bindings
