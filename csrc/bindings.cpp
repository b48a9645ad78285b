// The Python module vfengine_native: raw addresses, sizes and streams as integers.
//
// Nothing is checked here: vfengine/ops/<op>.py has done it. Every call releases the GIL.
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "residual_step.h"

namespace py = pybind11;
using namespace pybind11::literals;

VF_CPU_DECLARE(residual_step_cpu, const vf::ResidualStepArgs& args, int64_t threads)

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vf::ResidualStepArgs residual_step_args(uintptr_t u, uintptr_t r, uintptr_t r_uncond, uintptr_t xi,
                                        uintptr_t g, uintptr_t lam, uintptr_t coeffs,
                                        uintptr_t step, uintptr_t out, int64_t batch,
                                        int64_t frames, int64_t pixels, int64_t num_steps,
                                        float guidance_scale, int dtype) {
  return {at<const void>(u),
          at<const void>(r),
          at<const void>(r_uncond),
          at<const void>(xi),
          at<const void>(g),
          at<const float>(lam),
          at<const float>(coeffs),
          at<const int32_t>(step),
          at<void>(out),
          batch,
          frames,
          pixels,
          num_steps,
          guidance_scale,
          static_cast<vf::DType>(dtype)};
}

}  // namespace

PYBIND11_MODULE(vfengine_native, m) {
  m.doc() = "Compiled kernels of vfengine; call them through vfengine.ops";
  m.attr("__version__") = VF_VERSION;

  m.def("cpu_isa", [] { return vf::isa_name(vf::cpu_isa()); }, "Instruction set in use");
  m.def("set_cpu_isa", &vf::set_cpu_isa, "name"_a, "Use another one (tests and benchmarks)");
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

  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<vf::ResidualStepArgs>(m, "ResidualStepArgs")
      .def(py::init(&residual_step_args), "u"_a, "r"_a, "r_uncond"_a, "xi"_a, "g"_a, "lam"_a,
           "coeffs"_a, "step"_a, "out"_a, "batch"_a, "frames"_a, "pixels"_a, "num_steps"_a,
           "guidance_scale"_a, "dtype"_a);
  m.def(
      "residual_step_cpu",
      [](const vf::ResidualStepArgs& args, int64_t threads) {
        VF_CPU_CALL(residual_step_cpu, args, threads);
      },
      "args"_a, "threads"_a, Release());
#if defined(VF_CUDA)
  m.def(
      "residual_step_cuda",
      [](const vf::ResidualStepArgs& args, int device, uintptr_t stream) {
        vf::residual_step_cuda(args, device, at<void>(stream));
      },
      "args"_a, "device"_a, "stream"_a, Release());
#endif
}
