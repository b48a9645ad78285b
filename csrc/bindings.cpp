// The Python module vfengine_native: raw addresses, sizes and streams as integers.
//
// The kernels themselves check nothing: vfengine/ops has done it, or the short way below. They run
// without the GIL.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <utility>

#include "common/dlpack_exchange.h"
#include "common/isa.h"
#include "decomposed_noise.h"
#include "decomposed_step.h"
#include "group_norm_silu.h"
#include "remove_base.h"
#include "residual_step.h"
#include "temporal_attention.h"

namespace py = pybind11;

VF_CPU_DECLARE(void residual_step_cpu(const vf::FrameArgs& args, int64_t threads))
VF_CPU_DECLARE(void decomposed_step_cpu(const vf::FrameArgs& args, int64_t threads))
VF_CPU_DECLARE(void remove_base_cpu(const vf::FrameArgs& args, int64_t threads))
VF_CPU_DECLARE(void decomposed_noise_cpu(const vf::NoiseArgs& args, int64_t threads))

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vf::PhiloxKey key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

// In the order that vfengine/ops/_frame_ops.py gives them.
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

vf::GroupNormSiluArgs group_norm_silu_args(uintptr_t x, uintptr_t weight, uintptr_t bias,
                                           uintptr_t scale, uintptr_t shift, uintptr_t residual,
                                           uintptr_t out, int64_t images, int64_t rows,
                                           int64_t channels, int64_t groups, int64_t num_frames,
                                           float eps, bool silu, int dtype) {
  vf::GroupNormSiluArgs args;
  args.x = at<const void>(x);
  args.weight = at<const float>(weight);
  args.bias = at<const float>(bias);
  args.scale = at<const float>(scale);
  args.shift = at<const float>(shift);
  args.residual = at<const void>(residual);
  args.out = at<void>(out);
  args.images = images;
  args.rows = rows;
  args.channels = channels;
  args.groups = groups;
  args.num_frames = num_frames;
  args.eps = eps;
  args.silu = silu;
  args.dtype = static_cast<vf::DType>(dtype);
  return args;
}

// The same, with what CUDA alone takes.
vf::GroupNormSiluArgs group_norm_silu_cuda_args(uintptr_t x, uintptr_t weight, uintptr_t bias,
                                                uintptr_t scale, uintptr_t shift,
                                                uintptr_t residual, uintptr_t out, int64_t images,
                                                int64_t rows, int64_t channels, int64_t groups,
                                                int64_t num_frames, float eps, bool silu, int dtype,
                                                uintptr_t workspace, int64_t chunk_rows) {
  auto args = group_norm_silu_args(x, weight, bias, scale, shift, residual, out, images, rows,
                                   channels, groups, num_frames, eps, silu, dtype);
  args.workspace = at<float>(workspace);
  args.chunk_rows = chunk_rows;
  return args;
}

vf::TemporalAttentionArgs temporal_attention_args(uintptr_t qkv, uintptr_t bias, uintptr_t out,
                                                  int64_t batch, int64_t frames, int64_t pixels,
                                                  int64_t heads, int64_t head_dim, int dtype) {
  vf::TemporalAttentionArgs args;
  args.qkv = at<const void>(qkv);
  args.bias = at<const float>(bias);
  args.out = at<void>(out);
  args.batch = batch;
  args.frames = frames;
  args.pixels = pixels;
  args.heads = heads;
  args.head_dim = head_dim;
  args.dtype = static_cast<vf::DType>(dtype);
  return args;
}

// ---- the short way -----------------------------------------------------------------------------
//
// vfengine/ops/_frame_ops.py checks arguments in Python, which takes longer than the kernel of a small
// clip. The same checks here, of plain CPU tensors alone, take a tenth. They only ever say yes to
// what Python would accept; where they do not, Python looks again and finds the words. Where torch
// is too old to say what a tensor is (common/dlpack_exchange.h), they always say no.

struct Torch {
  py::object tensor, is_grad_enabled;
  py::str is_neg, requires_grad;
  int (*tensor_from_object)(void* object, vf::dlpack::Tensor* out) = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    is_grad_enabled = torch.attr("is_grad_enabled");
    is_neg = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("is_neg"));
    requires_grad = py::reinterpret_steal<py::str>(PyUnicode_InternFromString("requires_grad"));
    const py::object capsule = py::getattr(tensor, vf::dlpack::kAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), vf::dlpack::kCapsule)) return;
    const auto* api = static_cast<const vf::dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), vf::dlpack::kCapsule));
    if (api->major == vf::dlpack::kMajorVersion) tensor_from_object = api->tensor_from_object;
  }
};

const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> torch;
  return torch.call_once_and_store_result([] { return Torch(); }).get_stored();
}

// Whether `object` is a torch.Tensor itself, on the CPU, contiguous, not empty, what its memory
// says, and not one that autograd follows; `tensor` is then what it is.
bool read(py::handle object, bool grad_enabled, vf::dlpack::Tensor& tensor) {
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
  if (tensor.device_type != vf::dlpack::kCpu) return false;
  int64_t elements = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != elements) return false;
    elements *= tensor.shape[i];
  }
  return elements > 0;
}

uintptr_t address(const vf::dlpack::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
}

int64_t elements(const vf::dlpack::Tensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1},
                         std::multiplies<int64_t>());
}

// The rule's tensors as a kernel takes them; false where any does not fit.
template <class Rule>
bool frames_fit(const py::handle objects[9], vf::FrameArgs& args) {
  using vf::dlpack::DataType;
  enum { kX, kG, kR, kUncond, kXi, kLam, kCoeffs, kStep, kOut };
  constexpr DataType kDTypes[] = {// in the order of vf::DType
                                  {vf::dlpack::kFloat, 32, 1},
                                  {vf::dlpack::kFloat, 16, 1},
                                  {vf::dlpack::kBfloat, 16, 1}};
  constexpr DataType kInt32{vf::dlpack::kInt, 32, 1};
  if (torch().tensor_from_object == nullptr) return false;

  const bool grad_enabled = torch().is_grad_enabled().ptr() == Py_True;
  vf::dlpack::Tensor t[9];
  bool there[9];
  for (int i = 0; i < 9; ++i) {
    there[i] = !objects[i].is_none();
    if (there[i] && !read(objects[i], grad_enabled, t[i])) return false;
  }
  for (int i : {kX, kG, kLam, kCoeffs, kStep, kOut})
    if (!there[i]) return false;
  if (there[kR] != Rule::kResidual) return false;

  const vf::dlpack::Tensor& x = t[kX];
  int dtype = 0;
  while (dtype < 3 && !(x.dtype == kDTypes[dtype])) ++dtype;
  if (dtype == 3 || x.ndim != 5) return false;
  const int64_t *s = x.shape, image[] = {s[0], s[2], s[3], s[4]};
  const int64_t one = 1, row[] = {t[kCoeffs].ndim ? t[kCoeffs].shape[0] : 0, Rule::kColumns};
  const auto is = [&](int i, DataType kind, const int64_t* shape, int ndim) {
    return !there[i] ||
           (t[i].dtype == kind && t[i].ndim == ndim && std::equal(shape, shape + ndim, t[i].shape));
  };
  for (int i : {kR, kUncond, kXi, kOut})
    if (!is(i, x.dtype, s, 5)) return false;
  if (!is(kG, x.dtype, image, 4) || !is(kLam, kDTypes[0], s + 1, 1) ||
      !is(kCoeffs, kDTypes[0], row, Rule::kColumns > 1 ? 2 : 1) || !is(kStep, kInt32, &one, 1))
    return false;

  const uintptr_t start = address(t[kOut]), end = start + elements(x) * (x.dtype.bits / 8);
  for (int i = 0; i < kOut; ++i) {
    if (!there[i] || (i == kX && address(x) == start)) continue;
    const uintptr_t first = address(t[i]);
    if (first < end && start < first + elements(t[i]) * (t[i].dtype.bits / 8)) return false;
  }

  const auto pointer = [&](int i) { return there[i] ? at<const void>(address(t[i])) : nullptr; };
  args.x = pointer(kX);
  args.g = pointer(kG);
  args.r = pointer(kR);
  args.r_uncond = pointer(kUncond);
  args.xi = pointer(kXi);
  args.lam = at<const float>(address(t[kLam]));
  args.coeffs = at<const float>(address(t[kCoeffs]));
  args.step = at<const int32_t>(address(t[kStep]));
  args.out = at<void>(start);
  args.batch = s[0];
  args.frames = s[1];
  args.pixels = s[2] * s[3] * s[4];
  args.num_steps = row[0];
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

// name_cpu(*arguments of make, threads).
template <class Args, class... Arguments, class Cpu>
void define_cpu(py::module_& m, const std::string& name, Args (*make)(Arguments...), Cpu cpu) {
  m.def((name + "_cpu").c_str(),
        [=](Arguments... arguments, int64_t threads) { cpu(make(arguments...), threads); },
        py::call_guard<py::gil_scoped_release>());
}

// name_cuda(*arguments of make, device, stream), where the CUDA kernels are built.
template <class Args, class... Arguments, class Cuda>
void define_cuda(py::module_& m, const std::string& name, Args (*make)(Arguments...), Cuda cuda) {
  if constexpr (!std::is_same_v<Cuda, std::nullptr_t>)
    m.def((name + "_cuda").c_str(),
          [=](Arguments... arguments, int device, uintptr_t stream) {
            cuda(make(arguments...), device, at<void>(stream));
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace

#if defined(VF_CUDA)
#define VF_CUDA_OP(name) &vf::name##_cuda
#else
#define VF_CUDA_OP(name) nullptr
#endif

#define VF_CPU_OP(name, make) \
  define_cpu(m, #name, make,  \
             [](const auto& args, int64_t threads) { VF_CPU_CALL(name##_cpu, args, threads); })
#define VF_OP(name, make) \
  VF_CPU_OP(name, make);  \
  define_cuda(m, #name, make, VF_CUDA_OP(name))

void define_network(pybind11::module_& m);  // network_bindings.cpp

PYBIND11_MODULE(vfengine_native, m) {
  m.doc() = "Compiled kernels of vfengine; call them through vfengine.ops";
  m.attr("__version__") = VF_VERSION;

  // A tenth of what os.environ.get costs, which shows beside the kernel of a small clip.
  m.def("environment", &std::getenv, py::arg("name"), "Value of a variable, or None");
  m.def("cpu_isa", [] { return vf::isa_name(vf::cpu_isa()); }, "Instruction set in use");
  m.def("set_cpu_isa", &vf::set_cpu_isa, py::arg("name"), "Use another one (tests, benchmarks)");
  py::list isas;
  for (vf::Isa isa : {vf::Isa::baseline, vf::Isa::avx2, vf::Isa::avx512, vf::Isa::avx512_bf16})
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
  m.attr("cuda_emulated") = true;  // tests/tools/emulation: the CUDA source, run on the CPU
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
  define_network(m);
  define_cuda(m, "group_norm_silu", &group_norm_silu_cuda_args, VF_CUDA_OP(group_norm_silu));
  define_cuda(m, "temporal_attention", &temporal_attention_args, VF_CUDA_OP(temporal_attention));
}
