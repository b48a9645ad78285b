// How many times as fast as fp32 this core multiplies bf16, by measurement: CPUs that share an
// instruction differ by a factor of four in how fast it runs.
#include <algorithm>
#include <chrono>
#include <limits>

#include "cpu/base/tiles.h"

namespace vf::VF_ISA {

namespace {

constexpr int kRounds = 2000;

// Nanoseconds of one call of body, the best of a few: what else the machine does only adds.
template <class Body>
double nanoseconds(const Body& body) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 6; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

// Products a nanosecond of rows of T, from registers.
template <class T>
double rate_of_vectors() {
  constexpr int kSums = 12;  // so many are under way at once
  alignas(64) uint32_t words[kLanes] = {};
  F32 sums[kSums] = {};
  const double took = nanoseconds([&] {
    for (int i = 0; i < kRounds; ++i) {
      asm volatile("" ::"r"(words) : "memory");  // they may be others in each round
      const U32 x = load<U32>(words);
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) sums[s] = dot<T>(sums[s], x, x);
    }
    for (const F32& sum : sums) asm volatile("" ::"m"(sum));
  });
  return double(kRounds) * kSums * kLanes * kPerWord<T> / took;
}

#if VF_TILES
double rate_of_tiles() {
  const TileScope scope;
  unrolled<6>([](auto tile) { tile_zero<tile>(); });
  const double took = nanoseconds([] {
    for (int i = 0; i < kRounds / 10; ++i)
      unrolled<4>([](auto tile) { tile_multiply_add<tile, 4, 5>(); });
  });
  return double(kRounds / 10) * 4 * kTile * kTile * kTileDepth / took;
}
#endif

}  // namespace

double bf16_gain() {
  static const double gain = [] {
#if VF_TILES
    const double bf16 = rate_of_tiles();
#else
    const double bf16 = rate_of_vectors<BFloat16>();
#endif
    return bf16 / rate_of_vectors<float>();
  }();
  return gain;
}

}  // namespace vf::VF_ISA
