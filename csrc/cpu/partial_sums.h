// Sums of what chunks of rows leave: in the order of the chunks, in fp64, on any number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/base/parallel.h"

namespace vf::VF_ISA {

// out [size] = the sums of partial [chunks, size].
static inline void sum_partial(const float* partial, int64_t chunks, int64_t size, float* out,
                               int64_t threads) {
  constexpr int64_t kColumns = 64;
  parallel_for((size + kColumns - 1) / kColumns, threads, [&](int64_t task) {
    const int64_t first = task * kColumns, width = std::min(size - first, kColumns);
    double sums[kColumns] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t c = 0; c < width; ++c) sums[c] += partial[chunk * size + first + c];
    for (int64_t c = 0; c < width; ++c) out[first + c] = float(sums[c]);
  });
}

}  // namespace vf::VF_ISA
