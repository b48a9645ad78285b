// Which of the builds of csrc/cpu runs: the best the machine has, chosen when first asked.
#pragma once

namespace vf {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

Isa cpu_isa();
// For tests and benchmarks. Throws std::invalid_argument where this machine or build lacks it.
void set_cpu_isa(const char* name);

}  // namespace vf

// VF_CPU_DECLARE(type name(...)) declares a function once per instruction set; VF_CPU_CALL calls
// the chosen one.
#if defined(VF_X86_64)
#define VF_CPU_DECLARE(...)   \
  namespace vf::baseline {    \
  __VA_ARGS__;                \
  }                           \
  namespace vf::avx2 {        \
  __VA_ARGS__;                \
  }                           \
  namespace vf::avx512 {      \
  __VA_ARGS__;                \
  }                           \
  namespace vf::avx512_bf16 { \
  __VA_ARGS__;                \
  }
#define VF_CPU_CALL(name, ...)                                                \
  (vf::cpu_isa() == vf::Isa::avx512_bf16 ? vf::avx512_bf16::name(__VA_ARGS__) \
   : vf::cpu_isa() == vf::Isa::avx512    ? vf::avx512::name(__VA_ARGS__)      \
   : vf::cpu_isa() == vf::Isa::avx2      ? vf::avx2::name(__VA_ARGS__)        \
                                         : vf::baseline::name(__VA_ARGS__))
#else
#define VF_CPU_DECLARE(...) \
  namespace vf::baseline {  \
  __VA_ARGS__;              \
  }
#define VF_CPU_CALL(name, ...) vf::baseline::name(__VA_ARGS__)
#endif
