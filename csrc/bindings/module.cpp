// The Python module vfengine_native: a class for what each op takes, and its kernels.
//
// The kernels themselves check nothing: vfengine/ops has done it, or the short way (fast_call.cpp).
// They run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "bindings/args.h"
#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;

namespace vf {

#if defined(VF_CUDA)
#define VF_DECLARE_OP(name, Args) void name##_cuda(const Args& args, int device, void* stream);
VF_CUDA_OPS(VF_DECLARE_OP)
#undef VF_DECLARE_OP
#endif

namespace bindings {

void define_fast_call(py::module_& m);  // fast_call.cpp
void define_program(py::module_& m);    // program.cpp

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

void define_ops(py::module_& m) {
  for (const auto& define : {define_args<Linear>, define_args<LayerNormWeights>,
                             define_args<TransformerAttention>, define_args<FeedForward>,
                             define_args<RowSource>, define_args<Clock>, define_args<BasePath>})
    define(m);
  py::dict args;  // {op: class of what it takes}
#define VF_DEFINE_OP(name, Args)                                                                  \
  define_args<Args>(m);                                                                           \
  args[#name] = m.attr(Args::kName);                                                              \
  m.def(                                                                                          \
      #name "_cpu", [](const Args& args, int64_t threads) { cpu_kernels().name(args, threads); }, \
      Release(), py::arg("args"), py::arg("threads"));
  VF_CPU_OPS(VF_DEFINE_OP)
#undef VF_DEFINE_OP
#if defined(VF_CUDA)
#define VF_DEFINE_OP(name, Args)                                    \
  define_args<Args>(m);                                             \
  args[#name] = m.attr(Args::kName);                                \
  m.def(                                                            \
      #name "_cuda",                                                \
      [](const Args& args, int device, uintptr_t stream) {          \
        name##_cuda(args, device, reinterpret_cast<void*>(stream)); \
      },                                                            \
      Release(), py::arg("args"), py::arg("device"), py::arg("stream"));
  VF_CUDA_OPS(VF_DEFINE_OP)
#undef VF_DEFINE_OP
#endif
  m.attr("args") = args;
  m.def(
      "packed_words",
      [](int64_t columns, int64_t depth, bool geglu, int dtype) {
        return cpu_kernels().packed_words(columns, depth, geglu, static_cast<DType>(dtype));
      },
      py::arg("columns"), py::arg("depth"), py::arg("geglu"), py::arg("dtype"),
      "Words that pack_weights_cpu writes");
  m.def(
      "group_norm_workspace",
      [](int64_t images, int64_t rows, int64_t channels, int64_t channels2, int64_t groups,
         int64_t num_frames) {
        GroupNormSiluArgs args{};
        args.images = images, args.rows = rows, args.channels = channels;
        args.channels2 = channels2, args.groups = groups, args.num_frames = num_frames;
        return cpu_kernels().group_norm_workspace(args);
      },
      py::arg("images"), py::arg("rows"), py::arg("channels"), py::arg("channels2"),
      py::arg("groups"), py::arg("num_frames"), "fp32 numbers of group_norm_silu_cpu's workspace");
}

void define_facts(py::module_& m) {
  m.attr("__version__") = VF_VERSION;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("STEP_BITS") = kStepBits;
  // A tenth of what os.environ.get costs, which shows beside the kernel of a small clip.
  m.def("environment", &std::getenv, py::arg("name"), "Value of a variable, or None");
  m.def("cpu_isa", &cpu_isa, "Instruction set in use");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Use another one");
  m.attr("cpu_isas") = py::tuple(py::cast(cpu_isas()));
  m.attr("refused_isa") = refused_isa();
  m.def(
      "bf16_gain", [] { return cpu_kernels().bf16_gain(); },
      "How many times as fast as fp32 it multiplies bf16 on this machine, measured once");
  m.def(
      "cpu_has_tiles", [] { return cpu_kernels().has_tiles; },
      "Whether the instruction set in use multiplies bf16 in a matrix unit's tiles");
  m.def(
      "cpu_has_bf16", [] { return cpu_kernels().has_bf16; },
      "Whether the instruction set in use multiplies bf16 in one instruction");
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
}

}  // namespace
}  // namespace bindings
}  // namespace vf

PYBIND11_MODULE(vfengine_native, m) {
  m.doc() = "Compiled kernels of vfengine; call them through vfengine.ops";
  vf::bindings::define_facts(m);
  vf::bindings::define_ops(m);
  vf::bindings::define_fast_call(m);
  vf::bindings::define_program(m);
}
