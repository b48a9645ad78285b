// What one core's instructions multiply, bare: the ceilings of bench_tiles.py.
//
// Each loop multiplies as the kernels of csrc/cpu do, 6 rows by 4 vectors or 2 tiles by 2, of which
// every operand is loaded from L1 in each round; "no loads": from registers. Results are not used.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

alignas(64) char memory[2][64 * 1024];  // of a thread; zeros

#define ALWAYS static inline __attribute__((always_inline))

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16,avx512vnni,fma")

// Calls dot(acc, weights, row) of 6 x 4 sums for 256 words of the depth.
template <class V, class Load, class Dot>
ALWAYS void six_by_four(const char* x, long rounds, const Load& load, const Dot& dot) {
  V acc[6][4] = {};
  for (long round = 0; round < rounds; ++round)
    for (int k = 0; k < 64; ++k) {
      asm volatile("" ::: "memory");
      const auto w0 = load(x + k * 256), w1 = load(x + k * 256 + 64), w2 = load(x + k * 256 + 128),
                 w3 = load(x + k * 256 + 192);
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) {
        int word;
        std::memcpy(&word, x + 32768 + r * 1024 + k * 4, 4);
        const __m512i row = _mm512_set1_epi32(word);
        dot(acc[r][0], w0, row);
        dot(acc[r][1], w1, row);
        dot(acc[r][2], w2, row);
        dot(acc[r][3], w3, row);
      }
    }
#pragma GCC unroll 6
  for (int r = 0; r < 6; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) asm volatile("" ::"v"(acc[r][v]));
}

ALWAYS __m512i load_words(const char* p) { return _mm512_load_si512(p); }

void bf16_dot(const char* x, long rounds) {
  six_by_four<__m512>(x, rounds, load_words,
                      [](__m512& acc, __m512i w, __m512i row) __attribute__((always_inline)) {
                        acc = _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)row);
                      });
}

void int8_dot(const char* x, long rounds) {
  six_by_four<__m512i>(x, rounds, load_words,
                       [](__m512i& acc, __m512i w, __m512i row) __attribute__((always_inline)) {
                         acc = _mm512_dpbusd_epi32(acc, row, w);
                       });
}

void fp32_fma(const char* x, long rounds) {
  six_by_four<__m512>(x, rounds, load_words,
                      [](__m512& acc, __m512i w, __m512i row) __attribute__((always_inline)) {
                        acc = _mm512_fmadd_ps((__m512)w, (__m512)row, acc);
                      });
}

// bf16 in memory, products in fp32: both halves of a word are widened when it is loaded.
struct Halves {
  __m512 even, odd;
};

ALWAYS Halves widen(__m512i words) {
  return {(__m512)_mm512_slli_epi32(words, 16),
          (__m512)_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u)))};
}

void bf16_widened(const char* x, long rounds) {
  six_by_four<__m512>(
      x, rounds, [](const char* p) __attribute__((always_inline)) { return widen(load_words(p)); },
      [](__m512& acc, const Halves& w, __m512i row) __attribute__((always_inline)) {
        const Halves r = widen(row);
        acc = _mm512_fmadd_ps(w.even, r.even, acc);
        acc = _mm512_fmadd_ps(w.odd, r.odd, acc);
      });
}

#pragma GCC pop_options

// 2 x 2 tiles of sums: in each step 2 tiles of rows and 2 of weights are loaded for 4 products.
#define TILE_LOOP(Name, Product, Loads)                                                            \
  void Name(const char* x, long rounds) {                                                          \
    alignas(64) unsigned char shapes[64] = {1};                                                    \
    for (int tile = 0; tile < 8; ++tile) shapes[16 + 2 * tile] = 64, shapes[48 + tile] = 16;       \
    asm volatile("ldtilecfg %0" ::"m"(shapes));                                                    \
    for (long round = 0; round < rounds; ++round)                                                  \
      for (int k = 0; k < 8; ++k) {                                                                \
        const char* at = x + k * 4096;                                                             \
        if (Loads)                                                                                 \
          asm volatile(                                                                            \
              "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd 1024(%0,%1,1), %%tmm5\n\t"                 \
              "tileloadd 2048(%0,%1,1), %%tmm6\n\ttileloadd 3072(%0,%1,1), %%tmm7" ::"r"(at),      \
              "r"(64L)                                                                             \
              : "memory");                                                                         \
        asm volatile(Product " %tmm4, %tmm6, %tmm0\n\t" Product " %tmm5, %tmm6, %tmm1\n\t" Product \
                             " %tmm4, %tmm7, %tmm2\n\t" Product " %tmm5, %tmm7, %tmm3");           \
      }                                                                                            \
    asm volatile("tilerelease");                                                                   \
  }

TILE_LOOP(bf16_tiles, "tdpbf16ps", true)
TILE_LOOP(bf16_tiles_bare, "tdpbf16ps", false)
TILE_LOOP(int8_tiles, "tdpbssd", true)

bool has_tiles() {
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, 0x1023L, 18L) == 0;
}

struct Loop {
  const char* name;
  void (*run)(const char*, long);
  bool (*can_run)();
  double products;  // of a round
};

constexpr double kWords = 64.0 * 6 * 4 * 16, kTiles = 8.0 * 4 * 16 * 16;

const Loop kLoops[] = {
    {"fp32", fp32_fma, [] { return bool(__builtin_cpu_supports("avx512f")); }, kWords},
    {"bf16, widened to fp32", bf16_widened, [] { return bool(__builtin_cpu_supports("avx512bw")); },
     2 * kWords},
    {"bf16, AVX512_BF16", bf16_dot, [] { return bool(__builtin_cpu_supports("avx512bf16")); },
     2 * kWords},
    {"int8, AVX512_VNNI", int8_dot, [] { return bool(__builtin_cpu_supports("avx512vnni")); },
     4 * kWords},
    {"bf16, AMX", bf16_tiles, has_tiles, 32 * kTiles},
    {"bf16, AMX, no loads", bf16_tiles_bare, has_tiles, 32 * kTiles},
    {"int8, AMX", int8_tiles, has_tiles, 64 * kTiles},
};
constexpr int kCount = sizeof kLoops / sizeof kLoops[0];

}  // namespace

extern "C" int loop_count() { return kCount; }
extern "C" const char* loop_name(int loop) { return kLoops[loop].name; }
extern "C" int loop_can_run(int loop) { return kLoops[loop].can_run(); }

// Products of `rounds` rounds of a loop on so many threads; the caller takes the time.
extern "C" double run_loop(int loop, int threads, long rounds) {
#pragma omp parallel for num_threads(threads)
  for (int i = 0; i < threads; ++i) kLoops[loop].run(memory[i % 2], rounds);
  return kLoops[loop].products * rounds * threads;
}
