#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

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
  std::string name, lacks;  // lacks: of this CPU, and what its kernel keeps from us
  const CpuKernels* kernels;
  bool emulated;
  bool supported() const { return lacks.empty(); }
};

constexpr const char* kEmulated = "amx_emulated";

// Linux gives a process its tiles only when asked (arch_prctl(2), ARCH_REQ_XCOMP_PERM). "" if it
// does.
std::string tiles_refused() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return "";
  return std::string(" the kernel's permission to use tiles (arch_prctl: ") + std::strerror(errno) +
         ")";
#else
  return " an operating system that is known to give tiles";
#endif
}

// Why this CPU has the features of an instruction set, and may yet not use it; or "".
std::string& refused() {
  static std::string why;
  return why;
}

#define VF_HAS(feature) , __builtin_cpu_supports(#feature) ? "" : " " #feature
#define VF_ISA_ROW(isa, ...) found(#isa, &isa::kCpuKernels, {"" __VA_ARGS__}),

Isa found(const char* name, const CpuKernels* kernels, const std::vector<const char*>& features) {
  Isa isa{name, "", kernels, std::string(name) == kEmulated};
  for (const char* feature : features) isa.lacks += feature;
  if (isa.supported() && kernels->has_tiles && !isa.emulated) {
    isa.lacks = tiles_refused();
    if (!isa.supported()) refused() = isa.name + " lacks" + isa.lacks;
  }
  return isa;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#include "isas.inc"
  };
  return all;
}
#undef VF_ISA_ROW
#undef VF_HAS

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{[] {
    const Isa* best = nullptr;
    for (const Isa& candidate : isas())
      if (candidate.supported() && !candidate.emulated) best = &candidate;
    return best;
  }()};
  return isa;
}

const Isa& current() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace

const CpuKernels& cpu_kernels() { return *current().kernels; }

const char* cpu_isa() { return current().name.c_str(); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported()) names.push_back(isa.name);
  return names;
}

std::string refused_isa() {
  isas();
  return refused();
}

void set_cpu_isa(const std::string& name) {
  std::string names, lacks;
  for (const Isa& isa : isas()) {
    if (name == isa.name && isa.supported()) return chosen().store(&isa, std::memory_order_relaxed);
    if (name == isa.name) lacks = ", which lacks" + isa.lacks;
    if (isa.supported()) names += (names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("this machine and build have the instruction sets " + names +
                              ", got " + name + lacks);
}

}  // namespace vf
