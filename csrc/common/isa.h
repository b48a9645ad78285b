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

// VF_CPU_DECLARE(type name(...)) declares a function once per instruction set that was built
// (VF_AVX2, ... of CMakeLists.txt); VF_CPU_CALL calls the chosen one.
#define VF_CPU_DECLARE(...)              \
  VF_IN_NAMESPACE(baseline, __VA_ARGS__) \
  VF_DECLARE_AVX2(__VA_ARGS__) VF_DECLARE_AVX512(__VA_ARGS__) VF_DECLARE_AVX512_BF16(__VA_ARGS__)
#define VF_CPU_CALL(name, ...)                                              \
  (VF_CALL_AVX512_BF16(name, __VA_ARGS__) VF_CALL_AVX512(name, __VA_ARGS__) \
       VF_CALL_AVX2(name, __VA_ARGS__) vf::baseline::name(__VA_ARGS__))

#define VF_IN_NAMESPACE(isa, ...) \
  namespace vf::isa {             \
  __VA_ARGS__;                    \
  }
#define VF_CALL_IF(isa, name, ...) vf::cpu_isa() == vf::Isa::isa ? vf::isa::name(__VA_ARGS__):

#if defined(VF_AVX2)
#define VF_DECLARE_AVX2(...) VF_IN_NAMESPACE(avx2, __VA_ARGS__)
#define VF_CALL_AVX2(name, ...) VF_CALL_IF(avx2, name, __VA_ARGS__)
#else
#define VF_DECLARE_AVX2(...)
#define VF_CALL_AVX2(name, ...)
#endif

#if defined(VF_AVX512)
#define VF_DECLARE_AVX512(...) VF_IN_NAMESPACE(avx512, __VA_ARGS__)
#define VF_CALL_AVX512(name, ...) VF_CALL_IF(avx512, name, __VA_ARGS__)
#else
#define VF_DECLARE_AVX512(...)
#define VF_CALL_AVX512(name, ...)
#endif

#if defined(VF_AVX512_BF16)
#define VF_DECLARE_AVX512_BF16(...) VF_IN_NAMESPACE(avx512_bf16, __VA_ARGS__)
#define VF_CALL_AVX512_BF16(name, ...) VF_CALL_IF(avx512_bf16, name, __VA_ARGS__)
#else
#define VF_DECLARE_AVX512_BF16(...)
#define VF_CALL_AVX512_BF16(name, ...)
#endif
