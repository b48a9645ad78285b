#include "common/isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace vf {

namespace {

constexpr Isa kIsas[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::baseline};

Isa best() {
  for (Isa isa : kIsas)
    if (isa_supported(isa)) return isa;
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

bool isa_supported(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(VF_X86_64)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

void set_cpu_isa(const char* name) {
  for (Isa isa : kIsas) {
    if (std::string(name) != isa_name(isa)) continue;
    if (!isa_supported(isa))
      throw std::invalid_argument(std::string("this machine or build does not have ") + name);
    chosen().store(isa, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument(std::string("expected avx512_bf16, avx512, avx2 or baseline, got ") +
                              name);
}

}  // namespace vf
