// Program: a list of kernel calls, run with one call and on one team of threads.
//
//     program = vfengine_native.Program([("row_matmul", args), ...])
//     program.run(threads)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/team.h"

namespace vf::bindings {

namespace py = pybind11;

namespace {

using Call = std::function<void(const CpuKernels& kernels, int64_t threads)>;

Call bind_call(const std::string& op, py::handle args) {
#define VF_BIND_CALL(name, Args)                                                           \
  if (op == #name)                                                                         \
    return [args = args.cast<const Args&>()](const CpuKernels& kernels, int64_t threads) { \
      kernels.name(args, threads);                                                         \
    };
  VF_CPU_OPS(VF_BIND_CALL)
#undef VF_BIND_CALL
  throw std::invalid_argument("a program expects native ops, got " + op);
}

class Program {
 public:
  explicit Program(const std::vector<std::pair<std::string, py::object>>& calls) {
    for (const auto& [op, args] : calls) calls_.push_back(bind_call(op, args));
  }

  void run(int64_t threads) const {
    const auto walk = [this, threads, &kernels = cpu_kernels()] {
      for (const Call& call : calls_) call(kernels, threads);
    };
    if (threads <= 1) return walk();
    run_team(threads, [](const void* it) { (*static_cast<const decltype(walk)*>(it))(); }, &walk);
  }

 private:
  std::vector<Call> calls_;
};

}  // namespace

void define_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<const std::vector<std::pair<std::string, py::object>>&>(), py::arg("calls"))
      .def("run", &Program::run, py::call_guard<py::gil_scoped_release>(), py::arg("threads"));
}

}  // namespace vf::bindings
