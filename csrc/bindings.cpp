// The Python module vfengine_native: raw addresses, sizes and streams as integers.
//
// The kernels themselves check nothing: vfengine/ops has done it, or the short way below. They run
// without the GIL.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "common/isa.h"
#include "decomposed_noise.h"
#include "decomposed_step.h"
#include "remove_base.h"
#include "residual_step.h"

namespace py = pybind11;

VF_CPU_DECLARE(residual_step_cpu, const vf::FrameArgs& args, int64_t threads)
VF_CPU_DECLARE(decomposed_step_cpu, const vf::FrameArgs& args, int64_t threads)
VF_CPU_DECLARE(remove_base_cpu, const vf::FrameArgs& args, int64_t threads)
VF_CPU_DECLARE(decomposed_noise_cpu, const vf::NoiseArgs& args, int64_t threads)

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vf::PhiloxKey key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

// In the order that vfengine/ops/_frames.py gives them.
vf::FrameArgs frame_args(uintptr_t x, uintptr_t g, uintptr_t r, uintptr_t r_uncond, uintptr_t xi,
                         uintptr_t lam, uintptr_t coeffs, uintptr_t step, uintptr_t out,
                         int64_t batch, int64_t frames, int64_t pixels, int64_t num_steps,
                         float guidance_scale, bool draw, uint64_t base_seed,
                         uint64_t residual_seed, uint32_t first_sample, uint32_t first_frame,
                         int dtype) {
  vf::FrameArgs args;
  args.x = at<const void>(x);
  args.g = at<const void>(g);
  args.r = at<const void>(r);
  args.r_uncond = at<const void>(r_uncond);
  args.xi = at<const void>(xi);
  args.lam = at<const float>(lam);
  args.coeffs = at<const float>(coeffs);
  args.step = at<const int32_t>(step);
  args.out = at<void>(out);
  args.batch = batch;
  args.frames = frames;
  args.pixels = pixels;
  args.num_steps = num_steps;
  args.guidance_scale = guidance_scale;
  args.draw = draw;
  args.base_key = key_of(base_seed);
  args.residual_key = key_of(residual_seed);
  args.first_sample = first_sample;
  args.first_frame = first_frame;
  args.dtype = static_cast<vf::DType>(dtype);
  return args;
}

vf::NoiseArgs noise_args(uintptr_t out, uintptr_t lam, int64_t batch, int64_t frames,
                         int64_t pixels, bool base, uint64_t base_seed, uint64_t residual_seed,
                         uint32_t step, uint32_t first_sample, uint32_t first_frame, int dtype) {
  vf::NoiseArgs args;
  args.out = at<void>(out);
  args.lam = at<const float>(lam);
  args.batch = batch;
  args.frames = frames;
  args.pixels = pixels;
  args.base = base;
  args.base_key = key_of(base_seed);
  args.residual_key = key_of(residual_seed);
  args.step = step;
  args.first_sample = first_sample;
  args.first_frame = first_frame;
  args.dtype = static_cast<vf::DType>(dtype);
  return args;
}

// ---- the short way -----------------------------------------------------------------------------
//
// vfengine/ops/_frames.py checks arguments in Python, which takes longer than the kernel of a small
// clip. The same checks here, of plain CPU tensors alone, take a third. They only ever say yes to
// what Python would accept; where they do not, Python looks again and finds the words.

struct Names {  // interned once; torch's objects are compared by identity
  py::object tensor, dtypes[3], float32, int32, is_grad_enabled;
  py::str is_cpu{"is_cpu"}, dtype{"dtype"}, shape{"shape"}, is_contiguous{"is_contiguous"},
      is_neg{"is_neg"}, requires_grad{"requires_grad"}, data_ptr{"data_ptr"};

  Names() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    float32 = torch.attr("float32");
    int32 = torch.attr("int32");
    is_grad_enabled = torch.attr("is_grad_enabled");
    dtypes[0] = float32;
    dtypes[1] = torch.attr("float16");
    dtypes[2] = torch.attr("bfloat16");
    for (py::str* name :
         {&is_cpu, &dtype, &shape, &is_contiguous, &is_neg, &requires_grad, &data_ptr}) {
      PyObject* interned = name->release().ptr();
      PyUnicode_InternInPlace(&interned);
      *name = py::reinterpret_steal<py::str>(interned);
    }
  }
};

const Names& names() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> names;
  return names.call_once_and_store_result([] { return Names(); }).get_stored();
}

struct PlainTensor {
  uintptr_t address = 0;  // 0: absent
  int64_t shape[5] = {}, ndim = 0, elements = 0;
  py::object dtype;
};

bool is_true(py::handle tensor, const py::str& attribute) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), attribute.ptr())).ptr() ==
         Py_True;
}

// Whether `tensor` is a torch.Tensor itself, on the CPU, contiguous, of one to five sizes, what its
// memory says, and not one that autograd follows; `plain` is then what it is.
bool read(py::handle tensor, bool grad_enabled, PlainTensor& plain) {
  const Names& n = names();
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) != n.tensor.ptr()) return false;
  if (!is_true(tensor, n.is_cpu)) return false;
  if (grad_enabled && is_true(tensor, n.requires_grad)) return false;
  const auto call = [&](const py::str& method) {
    return py::reinterpret_steal<py::object>(
        PyObject_CallMethodObjArgs(tensor.ptr(), method.ptr(), nullptr));
  };
  if (call(n.is_contiguous).ptr() != Py_True || call(n.is_neg).ptr() != Py_False) return false;
  const auto shape =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), n.shape.ptr()));
  if (!shape || !PyTuple_Check(shape.ptr())) return false;
  plain.ndim = PyTuple_GET_SIZE(shape.ptr());
  if (plain.ndim < 1 || plain.ndim > 5) return false;
  plain.elements = 1;
  for (int64_t i = 0; i < plain.ndim; ++i) {
    plain.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    plain.elements *= plain.shape[i];
  }
  plain.dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), n.dtype.ptr()));
  const py::object address = call(n.data_ptr);
  if (!address || !plain.dtype) return false;
  plain.address = PyLong_AsUnsignedLongLong(address.ptr());
  return plain.address != 0 && plain.elements > 0;
}

bool is_grad_enabled() { return names().is_grad_enabled().ptr() == Py_True; }

// The rule's tensors as a kernel takes them; false where any does not fit.
template <class Rule>
bool frames_fit(const py::handle tensors[9], vf::FrameArgs& args) {
  enum { kX, kG, kR, kUncond, kXi, kLam, kCoeffs, kStep, kOut };
  const Names& n = names();
  PlainTensor t[9];
  const bool in_place = tensors[kOut].is(tensors[kX]), grad_enabled = is_grad_enabled();
  for (int i = 0; i < (in_place ? kOut : kOut + 1); ++i)
    if (!tensors[i].is_none() && !read(tensors[i], grad_enabled, t[i])) return false;
  const PlainTensor& x = t[kX];
  if (in_place) t[kOut] = x;
  int dtype = 0;
  while (dtype < 3 && x.dtype.ptr() != n.dtypes[dtype].ptr()) ++dtype;
  if (dtype == 3 || x.ndim != 5 || Rule::kResidual != (t[kR].address != 0)) return false;

  const int64_t *s = x.shape, image[] = {s[0], s[2], s[3], s[4]};
  const auto is = [](const PlainTensor& t, const py::object& dtype, const int64_t* shape,
                     int64_t ndim) {
    return t.dtype.ptr() == dtype.ptr() && t.ndim == ndim &&
           std::equal(shape, shape + ndim, t.shape);
  };
  for (int i : {kR, kUncond, kXi, kOut})
    if (t[i].address && !is(t[i], x.dtype, s, 5)) return false;
  const int64_t one = 1, coeffs[] = {t[kCoeffs].shape[0], Rule::kColumns};
  if (!is(t[kG], x.dtype, image, 4) || !is(t[kLam], n.float32, s + 1, 1) ||
      !is(t[kCoeffs], n.float32, coeffs, Rule::kColumns > 1 ? 2 : 1) ||
      !is(t[kStep], n.int32, &one, 1))
    return false;

  const uintptr_t start = t[kOut].address, size = dtype == 0 ? 4 : 2;
  const uintptr_t end = start + x.elements * size;
  for (int i = 0; i < kOut; ++i) {
    const uintptr_t first = t[i].address, bytes = t[i].elements * (i < kLam ? size : 4);
    if (!first || (i == kX && first == start)) continue;
    if (first < end && start < first + bytes) return false;
  }

  args.x = at<const void>(x.address);
  args.g = at<const void>(t[kG].address);
  args.r = at<const void>(t[kR].address);
  args.r_uncond = at<const void>(t[kUncond].address);
  args.xi = at<const void>(t[kXi].address);
  args.lam = at<const float>(t[kLam].address);
  args.coeffs = at<const float>(t[kCoeffs].address);
  args.step = at<const int32_t>(t[kStep].address);
  args.out = at<void>(start);
  args.batch = s[0];
  args.frames = s[1];
  args.pixels = s[2] * s[3] * s[4];
  args.num_steps = t[kCoeffs].shape[0];
  args.dtype = static_cast<vf::DType>(dtype);
  return true;
}

bool is_number(py::handle number) {
  return PyFloat_Check(number.ptr()) || (PyLong_Check(number.ptr()) && !PyBool_Check(number.ptr()));
}

bool is_offset(py::handle number) {
  if (!PyLong_Check(number.ptr()) || PyBool_Check(number.ptr())) return false;
  const int64_t value = PyLong_AsLongLong(number.ptr());  // -1 where it does not fit
  return value >= 0 && value < int64_t(1) << 31;
}

bool is_text(py::handle text, const char* value) {
  return PyUnicode_Check(text.ptr()) && PyUnicode_CompareWithASCIIString(text.ptr(), value) == 0;
}

// name_plain(backend, x, g, r, r_uncond, xi, lam, coeffs, step, out, guidance_scale, seeds,
// sample_offset, frame_offset, threads): runs the CPU kernel and returns True, or does nothing and
// returns False. seeds: (base, residual) or None.
template <class Rule, class Cpu>
void define_plain(py::module_& m, Cpu cpu) {
  m.def((std::string(Rule::kName) + "_plain").c_str(),
        [=](py::handle backend, py::handle x, py::handle g, py::handle r, py::handle r_uncond,
            py::handle xi, py::handle lam, py::handle coeffs, py::handle step, py::handle out,
            py::handle guidance_scale, py::handle seeds, py::handle sample_offset,
            py::handle frame_offset, int64_t threads) {
          const char* environment = std::getenv("VFENGINE_KERNEL_BACKEND");
          const bool unset = !environment || !*environment;
          if (!is_text(backend, "cpu") && !(is_text(backend, "auto") && unset)) return false;
          const py::handle tensors[] = {x, g, r, r_uncond, xi, lam, coeffs, step, out};
          const bool numbers =
              is_number(guidance_scale) && is_offset(sample_offset) && is_offset(frame_offset);
          vf::FrameArgs args;
          if (!numbers || !frames_fit<Rule>(tensors, args)) {
            PyErr_Clear();
            return false;
          }
          args.guidance_scale = guidance_scale.cast<float>();
          args.draw = !seeds.is_none();
          const auto [base, residual] = args.draw ? seeds.cast<std::pair<uint64_t, uint64_t>>()
                                                  : std::pair<uint64_t, uint64_t>{};
          args.base_key = key_of(base);
          args.residual_key = key_of(residual);
          args.first_sample = sample_offset.cast<uint32_t>();
          args.first_frame = frame_offset.cast<uint32_t>();
          const py::gil_scoped_release release;
          cpu(args, threads);
          return true;
        });
}

// name_cpu(*arguments of make, threads) and name_cuda(*arguments of make, device, stream).
template <class Args, class... Arguments, class Cpu, class Cuda>
void define(py::module_& m, const std::string& name, Args (*make)(Arguments...), Cpu cpu,
            Cuda cuda) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def((name + "_cpu").c_str(),
        [=](Arguments... arguments, int64_t threads) { cpu(make(arguments...), threads); },
        Release());
  if constexpr (!std::is_same_v<Cuda, std::nullptr_t>)
    m.def((name + "_cuda").c_str(),
          [=](Arguments... arguments, int device, uintptr_t stream) {
            cuda(make(arguments...), device, at<void>(stream));
          },
          Release());
}

}  // namespace

#if defined(VF_CUDA)
#define VF_CUDA_OP(name) &vf::name##_cuda
#else
#define VF_CUDA_OP(name) nullptr
#endif

#define VF_OP(name, make)                                                                \
  define(                                                                                \
      m, #name, make,                                                                    \
      [](const auto& args, int64_t threads) { VF_CPU_CALL(name##_cpu, args, threads); }, \
      VF_CUDA_OP(name))

PYBIND11_MODULE(vfengine_native, m) {
  m.doc() = "Compiled kernels of vfengine; call them through vfengine.ops";
  m.attr("__version__") = VF_VERSION;

  // A tenth of what os.environ.get costs, which shows beside the kernel of a small clip.
  m.def("environment", &std::getenv, py::arg("name"), "Value of a variable, or None");
  m.def("cpu_isa", [] { return vf::isa_name(vf::cpu_isa()); }, "Instruction set in use");
  m.def("set_cpu_isa", &vf::set_cpu_isa, py::arg("name"), "Use another one (tests, benchmarks)");
  py::list isas;
  for (vf::Isa isa : {vf::Isa::baseline, vf::Isa::avx2, vf::Isa::avx512})
    if (vf::isa_supported(isa)) isas.append(vf::isa_name(isa));
  m.attr("cpu_isas") = py::tuple(isas);
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

#if defined(VF_CUDA)
  m.attr("cuda_built") = true;
  m.attr("cuda_architectures") = VF_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_architectures") = "";
#endif
#if defined(VF_CUDA_EMULATED)
  m.attr("cuda_emulated") = true;  // tests/emulation: the CUDA source, run on the CPU
#else
  m.attr("cuda_emulated") = false;
#endif

#define VF_PLAIN(name, Rule) \
  define_plain<vf::Rule>(    \
      m, [](const auto& args, int64_t threads) { VF_CPU_CALL(name##_cpu, args, threads); })
  VF_PLAIN(residual_step, ResidualStep);
  VF_PLAIN(decomposed_step, DecomposedStep);
  VF_PLAIN(remove_base, RemoveBase);

  VF_OP(residual_step, &frame_args);
  VF_OP(decomposed_step, &frame_args);
  VF_OP(remove_base, &frame_args);
  VF_OP(decomposed_noise, &noise_args);
}
