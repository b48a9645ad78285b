// The table of this instruction set's kernels, for cpu/isa.cpp.
#include "cpu/base/tiles.h"
#include "cpu/isa.h"

namespace vf::VF_ISA {

#define VF_DECLARE_OP(name, Args) void name##_cpu(const Args& args, int64_t threads);
VF_CPU_OPS(VF_DECLARE_OP)
#undef VF_DECLARE_OP
int64_t packed_words(int64_t columns, int64_t depth, bool geglu, DType dtype);
double bf16_gain();

#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = VF_TILES;
#endif

// A constant that needs no code: what the compiler made of it could not run on every machine.
extern const CpuKernels kCpuKernels;
#define VF_OP_ENTRY(name, Args) &name##_cpu,
const CpuKernels kCpuKernels = {VF_CPU_OPS(VF_OP_ENTRY) packed_words, &bf16_gain, kHasBf16,
                                VF_TILES != 0};

}  // namespace vf::VF_ISA
