// Weights of 3x3 convolutions for Winograd's form: in training they are others at every step.
#include "winograd_weights.h"

#include <stdexcept>

#include "cpu/base/parallel.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/transforms.h"

namespace vf::VF_ISA {

namespace {

constexpr int kPositions = 16;

// The transformed taps of n neighbouring channels; taps lie `stride` numbers apart.
VF_INLINE void transform(const float* taps, int64_t stride, bool backwards, int n,
                         F32 (&out)[kPositions]) {
  F32 half[4][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    F32 g[3], t[4];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const int tap = i * 3 + j;
      g[i] = load_columns(taps + (backwards ? 8 - tap : tap) * stride, n);
    }
    transform_taps(g, t);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) half[i][j] = t[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    F32 t[4];
    transform_taps(half[i], t);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[i * 4 + j] = t[j];
  }
}

// One vector of columns of a panel: words of the depth lie `step` words apart, positions `size`.
template <class T>
struct Column {
  static constexpr int kNumbers = kPerWord<T>;
  const WinogradWeightsArgs& a;
  uint32_t* out;
  int64_t step, size;

  // Columns are neighbouring channels, and words hold neighbouring rows.
  void transposed(int64_t column) const {
    const int n = columns_left(a.channels, column);
    for (int64_t k = 0; k < a.rows / kNumbers; ++k) {
      F32 t[kNumbers][kPositions];
      for (int i = 0; i < kNumbers; ++i)
        transform(a.weights + (k * kNumbers + i) * 9 * a.channels + column, a.channels, true, n,
                  t[i]);
      for (int p = 0; p < kPositions; ++p)
        store(out + p * size + k * step, words_of<T>(t[0][p], t[kNumbers - 1][p]));
    }
  }

  // Columns are rows, and words hold neighbouring channels: a block of words is turned.
  void as_it_is(int64_t column) const {
    const int64_t words = a.channels / kNumbers;
    alignas(64) T numbers[kPositions][kLanes][kLanes * kNumbers];
    for (int64_t first = 0; first < words; first += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kNumbers; ++i) {
          const int64_t c = first * kNumbers + i * kLanes;
          const int n = column + lane < a.rows ? columns_left(a.channels, c) : 0;
          F32 t[kPositions] = {};
          if (n)
            transform(a.weights + (column + lane) * 9 * a.channels + c, a.channels, false, n, t);
          for (int p = 0; p < kPositions; ++p) store_row(numbers[p][lane] + i * kLanes, t[p]);
        }
      }
      const int count = int(std::min<int64_t>(kLanes, words - first));
      for (int p = 0; p < kPositions; ++p) {
        U32 block[16];
        load_columns_of_words(reinterpret_cast<const char*>(numbers[p]), 4 * kLanes, kLanes, kLanes,
                              block);
        for (int w = 0; w < count; ++w) store(out + p * size + (first + w) * step, block[w]);
      }
    }
  }
};

template <class T>
void winograd_weights(const WinogradWeightsArgs& a, int64_t threads) {
  const int64_t columns = a.transposed ? a.channels : a.rows;
  const int64_t depth = (a.transposed ? a.rows : a.channels) / kPerWord<T>;
  const Panels panels(columns, false);
  parallel_for(panels.count, threads, [&](int64_t panel) {
    const int64_t first = panels.first(panel), vectors = panels.vectors(panel);
    for (int64_t v = 0; v < vectors; ++v) {
      uint32_t* to = static_cast<uint32_t*>(a.out) + (first * depth + v) * kLanes;
      const Column<T> column{a, to, vectors * kLanes, panels.words(depth)};
      a.transposed ? column.transposed((first + v) * kLanes)
                   : column.as_it_is((first + v) * kLanes);
    }
  });
}

}  // namespace

void winograd_weights_cpu(const WinogradWeightsArgs& args, int64_t threads) {
  by_product_dtype(args.dtype, [&](auto kind) {
    using T = decltype(kind);
    if constexpr (kInTiles<T>) {
      throw std::invalid_argument("winograd_weights: expected fp32 beside a matrix unit, got bf16");
    } else {
      winograd_weights<T>(args, threads);
    }
  });
}

}  // namespace vf::VF_ISA
