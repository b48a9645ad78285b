// The Python module vfengine_native: raw addresses, sizes and streams as integers.
//
// Nothing is checked here: vfengine/ops/<op>.py has done it. Every call releases the GIL.
#include <pybind11/pybind11.h>

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

// Positional and flat: a call with keywords, or an object in between, costs more than the kernel of
// a small clip.
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

  VF_OP(residual_step, &frame_args);
  VF_OP(decomposed_step, &frame_args);
  VF_OP(remove_base, &frame_args);
  VF_OP(decomposed_noise, &noise_args);
}
