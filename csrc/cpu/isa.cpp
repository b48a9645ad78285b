#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

// isas.inc: VF_ISA_ROW(name, VF_HAS(feature) ...) of every instruction set that was built, the best
// last (CMakeLists.txt).
#define VF_ISA_ROW(isa, ...)           \
  namespace vf::isa {                  \
  extern const CpuKernels kCpuKernels; \
  }
#include "isas.inc"
#undef VF_ISA_ROW

namespace vf {

namespace {

struct Isa {
  const char* name;
  bool supported;
  const CpuKernels* kernels;
};

#define VF_HAS(feature) &&__builtin_cpu_supports(#feature)
#define VF_ISA_ROW(isa, ...) {#isa, true __VA_ARGS__, &isa::kCpuKernels},
const Isa kIsas[] = {
#include "isas.inc"
};
#undef VF_ISA_ROW
#undef VF_HAS

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{[] {
    const Isa* best = nullptr;
    for (const Isa& candidate : kIsas)
      if (candidate.supported) best = &candidate;
    return best;
  }()};
  return isa;
}

const Isa& current() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace

const CpuKernels& cpu_kernels() { return *current().kernels; }

const char* cpu_isa() { return current().name; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported) names.push_back(isa.name);
  return names;
}

void set_cpu_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.supported) continue;
    if (name == isa.name) return chosen().store(&isa, std::memory_order_relaxed);
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("this machine and build have the instruction sets " + names +
                              ", got " + name);
}

}  // namespace vf
