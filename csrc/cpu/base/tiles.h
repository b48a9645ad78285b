// A matrix unit's tiles: eight registers of 16 rows of 64 bytes, and what is done with them.
//
// The vocabulary is that of Intel's AMX: configure, zero, load, store, multiply and add, release.
// It has two bodies. The instruction set `amx` has the instructions. `amx_emulated` does the same
// with plain C++, bit for bit, on any CPU: so tests run every kernel that is written in tiles.
//
//     TileScope scope;                       // from here to its end, tiles are this thread's
//     tile_zero<0>();                        // C [16, 16] of fp32
//     tile_load<1>(a, a_stride);             // A [16, 32] of bf16, rows a_stride bytes apart
//     tile_load<2>(b, b_stride);             // B [16, 16, 2] of bf16: pairs of A's columns
//     tile_multiply_add<0, 1, 2>();          // C += A B
//     tile_store<0>(c, c_stride);
//
// tile_multiply_add sums the 16 even products of an element in fp32 from first to last, then the
// odd ones, and adds both sums to C. It takes denormals for 0, and makes 0 of them (Intel's
// "Architecture Instruction Set Extensions Programming Reference", TDPBF16PS).
#pragma once
#include <type_traits>

#include "cpu/base/rows.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define VF_TILES 1
#elif defined(VF_EMULATED_TILES)
#define VF_TILES 1
#else
#define VF_TILES 0
#endif

namespace vf::VF_ISA {

constexpr int kTile = 16;       // rows of a tile, and 32-bit columns
constexpr int kTileDepth = 32;  // bf16 numbers of a row
constexpr int64_t kTileRowBytes = 64;

// Whether products of these rows are computed in tiles.
template <class T>
constexpr bool kInTiles = VF_TILES && std::is_same_v<T, BFloat16>;

struct NoTileScope {
  NoTileScope() {}
};

#if defined(VF_EMULATED_TILES)

struct TileRegisters {
  alignas(64) char at[8][kTile][kTileRowBytes];
};

static inline TileRegisters& tile_registers() {
  static thread_local TileRegisters registers;
  return registers;
}

using TileScope = NoTileScope;

template <int Tile>
static inline void tile_zero() {
  std::memset(tile_registers().at[Tile], 0, sizeof tile_registers().at[Tile]);
}

template <int Tile>
static inline void tile_load(const void* from, int64_t stride) {
  for (int row = 0; row < kTile; ++row)
    std::memcpy(tile_registers().at[Tile][row], static_cast<const char*>(from) + row * stride,
                kTileRowBytes);
}

template <int Tile>
static inline void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < kTile; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tile_registers().at[Tile][row],
                kTileRowBytes);
}

// x, or the 0 of its sign where x is denormal.
static inline float without_denormals(float x) {
  const uint32_t bits = float_to_bits(x);
  return bits & 0x7f800000u ? x : bits_to_float(bits & 0x80000000u);
}

template <int C, int A, int B>
static inline void tile_multiply_add() {
  TileRegisters& registers = tile_registers();
  float a[kTile][2][kTile],
      b[kTile][2][kTile];  // [row][even, odd][pair], [pair][even, odd][column]
  for (int row = 0; row < kTile; ++row)
    for (int column = 0; column < kTile; ++column)
      for (int half = 0; half < 2; ++half) {
        BFloat16 x, y;
        std::memcpy(&x, registers.at[A][row] + 4 * column + 2 * half, sizeof x);
        std::memcpy(&y, registers.at[B][row] + 4 * column + 2 * half, sizeof y);
        a[row][half][column] = without_denormals(bits_to_float(uint32_t(x.bits) << 16));
        b[row][half][column] = without_denormals(bits_to_float(uint32_t(y.bits) << 16));
      }
  for (int row = 0; row < kTile; ++row) {
    float sums[2][kTile] = {}, c[kTile];
    for (int pair = 0; pair < kTile; ++pair)
      for (int half = 0; half < 2; ++half)
        for (int column = 0; column < kTile; ++column)
          sums[half][column] =
              without_denormals(sums[half][column] + a[row][half][pair] * b[pair][half][column]);
    std::memcpy(c, registers.at[C][row], sizeof c);
    for (int column = 0; column < kTile; ++column)
      c[column] = without_denormals(without_denormals(c[column]) +
                                    without_denormals(sums[0][column] + sums[1][column]));
    std::memcpy(registers.at[C][row], c, sizeof c);
  }
}

#elif VF_TILES

// Tiles belong to the thread, and other libraries configure them for themselves: so no scope
// outlives the work that needs it.
class TileScope {
 public:
  TileScope() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof configuration == 64);
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = kTileRowBytes;
      configuration.rows[tile] = kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The compiler knows no tiles: `volatile` keeps the order of what follows, and "memory" that of
// stores before loads. (The headers' intrinsics take no template argument for a tile.)
template <int Tile>
VF_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile>
VF_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
VF_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

template <int C, int A, int B>
VF_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

using TileScope = NoTileScope;

#endif

// body(std::integral_constant<int, i>()) for i = 0 ... N - 1: tiles are named at compile time.
template <int N, int I = 0, class Body>
VF_INLINE void unrolled(const Body& body) {
  if constexpr (I < N) {
    body(std::integral_constant<int, I>());
    unrolled<N, I + 1>(body);
  }
}

}  // namespace vf::VF_ISA
