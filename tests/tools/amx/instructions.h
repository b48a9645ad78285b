// Runs the instructions of AMX on a CPU that has none: each raises SIGILL, and the handler does
// what it says. So a test runs the very machine code that a CPU with AMX would.
//
// The handler follows Intel's manual, not csrc/cpu/base/tiles.h, and is stricter than a CPU: tiles
// that are not configured, and shapes that no kernel of ours asks for, end the process.
#pragma once
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx {

struct State {
  bool configured = false;
  unsigned char tiles[8][16][64];
};

inline State& state() {
  static thread_local State mine;
  return mine;
}

inline std::atomic<long> executed{0};

[[noreturn]] inline void refuse(const char* why, const unsigned char* at) {
  std::fprintf(stderr, "amx: %s, at bytes", why);
  for (int i = 0; i < 8; ++i) std::fprintf(stderr, " %02x", at[i]);
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

// A float whose denormals are 0.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float from_bf16(const unsigned char* p) {
  const uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

inline void multiply_add(State& s, int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {0, 0}, old;
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sums[half] = flushed(std::fma(from_bf16(&s.tiles[a][m][4 * k + 2 * half]),
                                        from_bf16(&s.tiles[b][k][4 * n + 2 * half]), sums[half]));
      std::memcpy(&old, &s.tiles[c][m][4 * n], 4);
      const float sum = flushed(flushed(old) + flushed(sums[0] + sums[1]));
      std::memcpy(&s.tiles[c][m][4 * n], &sum, 4);
    }
}

// One VEX-coded instruction of AMX: its fields, its operand in memory and its length.
struct Instruction {
  int prefix, opcode, reg, rm, vvvv;
  bool in_memory = false;
  uint64_t base = 0, index = 0;  // of the operand: base with its displacement, index * scale
  int length = 0;
};

inline Instruction decode(const unsigned char* at, const greg_t* registers) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84)
    refuse("an illegal instruction that is none of AMX's", at);
  const int x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
  Instruction out{};
  out.prefix = at[2] & 3;
  out.vvvv = ~at[2] >> 3 & 15;
  out.opcode = at[3];
  const int mod = at[4] >> 6;
  out.reg = at[4] >> 3 & 7;
  out.rm = at[4] & 7;
  const unsigned char* next = at + 5;
  if (mod != 3) {
    out.in_memory = true;
    int base = out.rm | b;
    bool has_base = true;
    if (out.rm == 4) {
      const unsigned char sib = *next++;
      const int index = (sib >> 3 & 7) | x;
      base = (sib & 7) | b;
      if (index != 4) out.index = uint64_t(registers[kOrder[index]]) << (sib >> 6);
      has_base = !((sib & 7) == 5 && mod == 0);
    } else if (out.rm == 5 && mod == 0) {
      refuse("an address relative to the instruction", at);
    }
    if (has_base) out.base = registers[kOrder[base]];
    int32_t displacement = 0;
    if (mod == 1) {
      displacement = static_cast<signed char>(*next++);
    } else if (mod == 2 || !has_base) {
      std::memcpy(&displacement, next, 4);
      next += 4;
    }
    out.base += displacement;
  }
  out.length = int(next - at);
  return out;
}

inline void configure(State& s, const unsigned char* from, const unsigned char* at) {
  if (from[0] != 1 || from[1]) refuse("another palette than 1, or a start row", at);
  for (int tile = 0; tile < 8; ++tile)
    if (from[16 + 2 * tile] != 64 || from[17 + 2 * tile] || from[48 + tile] != 16)
      refuse("a tile of another shape than 16 rows of 64 bytes", at);
  for (int i = 2; i < 16; ++i)
    if (from[i]) refuse("a reserved byte that is not 0", at);
  s.configured = true;
  std::memset(s.tiles, 0, sizeof s.tiles);
}

inline void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* at = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
  const Instruction i = decode(at, registers);
  State& s = state();
  enum { kNone = 0, kF3 = 2, kF2 = 3 };
  if (i.opcode == 0x49 && i.prefix == kNone && i.in_memory) {
    configure(s, reinterpret_cast<const unsigned char*>(i.base + i.index), at);
  } else if (!s.configured) {
    refuse("tiles that are not configured", at);
  } else if (i.opcode == 0x49 && i.prefix == kNone) {
    s.configured = false;  // tilerelease
  } else if (i.opcode == 0x49 && i.prefix == kF2 && !i.in_memory) {
    std::memset(s.tiles[i.reg], 0, sizeof s.tiles[i.reg]);
  } else if (i.opcode == 0x4b && i.in_memory && (i.prefix == kF2 || i.prefix == kF3)) {
    for (int row = 0; row < 16; ++row) {
      auto* place = reinterpret_cast<unsigned char*>(i.base + row * i.index);
      i.prefix == kF2 ? std::memcpy(s.tiles[i.reg][row], place, 64)
                      : std::memcpy(place, s.tiles[i.reg][row], 64);
    }
  } else if (i.opcode == 0x5c && i.prefix == kF3 && !i.in_memory) {
    if (i.reg == i.rm || i.reg == i.vvvv || i.rm == i.vvvv || i.vvvv > 7)
      refuse("tdpbf16ps of fewer than three tiles", at);
    multiply_add(s, i.reg, i.rm, i.vvvv);
  } else {
    refuse("an instruction of AMX that no kernel uses", at);
  }
  ++executed;
  registers[REG_RIP] += i.length;
}

inline void emulate() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace amx
