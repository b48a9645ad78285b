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

#if defined(VF_X86_64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

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
  switch (isa) {
#if defined(VF_AVX512_BF16)
    case Isa::avx512_bf16:
      return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(VF_AVX512)
    case Isa::avx512:
      return has_avx512();
#endif
#if defined(VF_AVX2)
    case Isa::avx2:
      return has_avx2();
#endif
    default:
      return isa == Isa::baseline;
  }
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
