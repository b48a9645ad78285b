// The builds of csrc/cpu, one per instruction set: the best that the machine has is in use.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops.h"

namespace vf {

// The kernels of one instruction set (cpu/kernels.cpp).
struct CpuKernels {
#define VF_DECLARE_OP(name, Args) void (*name)(const Args& args, int64_t threads);
  VF_CPU_OPS(VF_DECLARE_OP)
#undef VF_DECLARE_OP
  int64_t (*packed_words)(int64_t columns, int64_t depth, bool geglu, DType dtype);
  double (*bf16_gain)();  // measured once: rate of bf16 products over that of fp32
  bool has_bf16;          // whether one instruction multiplies and adds bf16
  bool has_tiles;         // whether a matrix unit does (cpu/base/tiles.h)
};

// Of the instruction set in use.
const CpuKernels& cpu_kernels();
const char* cpu_isa();

// Those that this machine and build have, the best last.
std::vector<std::string> cpu_isas();

// Why the best one that this CPU has is not in use, such as a kernel that keeps its tiles; or "".
std::string refused_isa();

// Throws std::invalid_argument for one that is not of cpu_isas(), and says what it lacks.
void set_cpu_isa(const std::string& name);

}  // namespace vf
