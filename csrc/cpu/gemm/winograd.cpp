// Convolutions in Winograd's form F(2, 3).
//
// A task takes a block of tiles: it transforms their pixels, multiplies each of the 16 (1-D: 4)
// positions with its own weights, a panel of columns at a time, and transforms the sums back, all
// of it in L2. The transforms only add and subtract; in bf16 the transformed pixels are rounded
// once more than in a direct convolution.
#include "winograd.h"

#include <vector>

#include "cpu/base/parallel.h"
#include "cpu/gemm/gemm.h"

namespace vf::VF_ISA {

namespace {

VF_INLINE void transform_in(const F32 (&d)[4], F32 (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}

VF_INLINE void transform_out(const F32 (&m)[4], F32 (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

template <class T, bool Flat>
class Block {
 public:
  static constexpr int kAcross = Flat ? 1 : 4, kPositions = 4 * kAcross;

  Block(const WinogradArgs& a, int64_t most)
      : a_(a), rows_((a.height + 1) / 2), columns_(Flat ? a.width : (a.width + 1) / 2) {
    static thread_local std::vector<T> pixels;
    if (int64_t(pixels.size()) < kPositions * most * a.channels)
      pixels.resize(kPositions * most * a.channels);
    const Scratch<T> scratch = gemm_scratch<T>(kPositions * most, a.channels);
    pixels_ = pixels.data();
    sums_ = scratch.sums;
    zeros_ = scratch.zeros;
  }

  // Tiles [first, first + count), panels [panel, last_panel).
  void run(int64_t first, int64_t count, int64_t panel, int64_t last_panel) {
    for (int64_t i = 0; i < count; ++i) read(first + i, pixels_ + i * a_.channels, count);
    typename Gemm<T>::PanelSums sums(a_.columns, a_.channels, count, zeros_);
    const int64_t size = Gemm<T>::packed_words(sums.panels, a_.channels);
    const auto* weights = static_cast<const uint32_t*>(a_.weights);
    for (; panel < last_panel; ++panel) {
      const int vectors = sums.panels.vectors(panel);
      const int64_t column = sums.panels.first(panel) * kLanes;
      for (int position = 0; position < kPositions; ++position)
        sums(pixels_ + position * count * a_.channels, weights + position * size, panel,
             sums_ + position * count * vectors * kLanes);
      for (int64_t i = 0; i < count; ++i) write(first + i, i, count, column, vectors);
    }
  }

 private:
  struct Place {
    int64_t item, y, x;  // of the tile's first result
  };

  Place place(int64_t tile) const {
    const int64_t item = tile / (rows_ * columns_), rest = tile % (rows_ * columns_);
    return {item, rest / columns_ * 2, rest % columns_ * (Flat ? 1 : 2)};
  }

  // The tile's pixels, transformed, to position * count rows from `to` on.
  void read(int64_t tile, T* to, int64_t count) const {
    const Place p = place(tile);
    const T* rows[4][kAcross];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < kAcross; ++j) {
        const int64_t y = p.y + i - 1, x = Flat ? p.x : p.x + j - 1;
        const bool inside = y >= 0 && y < a_.height && x >= 0 && x < a_.width;
        rows[i][j] = inside ? static_cast<const T*>(a_.x) +
                                  ((p.item * a_.height + y) * a_.width + x) * a_.channels
                            : zeros_;
      }
    for_columns(a_.channels, [&](int64_t c, int n) {
      F32 half[4][kAcross];
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) {
        F32 d[4], t[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) d[i] = load_columns(rows[i][j] + c, n);
        transform_in(d, t);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) half[i][j] = t[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        F32 t[4];
        if constexpr (Flat) {
          t[0] = half[i][0];
        } else {
          transform_in(half[i], t);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kAcross; ++j)
          store_columns(to + (i * kAcross + j) * count * a_.channels + c, t[j], n);
      }
    });
  }

  // The tile's results for the columns of a panel.
  void write(int64_t tile, int64_t row, int64_t count, int64_t column, int vectors) const {
    constexpr int kResults = Flat ? 1 : 2;
    const Place p = place(tile);
    for (int v = 0; v < vectors; ++v) {
      const int64_t c = column + v * kLanes;
      const int n = columns_left(a_.columns, c);
      const auto sum = [&](int position) {
        return load<F32>(sums_ + ((position * count + row) * vectors + v) * kLanes);
      };
      F32 half[2][kAcross];
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) {
        F32 m[4], y[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) m[i] = sum(i * kAcross + j);
        transform_out(m, y);
        half[0][j] = y[0], half[1][j] = y[1];
      }
      for (int i = 0; i < 2; ++i) {
        F32 y[2];
        if constexpr (Flat) {
          y[0] = half[i][0];
        } else {
          transform_out(half[i], y);
        }
        for (int j = 0; j < kResults; ++j) {
          const int64_t py = p.y + i, px = p.x + j;
          if (py >= a_.height || px >= a_.width) continue;
          const int64_t at = (p.item * a_.height + py) * a_.width + px;
          if (a_.bias) {
            const float* bias = a_.bias;
            if (a_.bias_rows) bias += at / a_.bias_rows * a_.bias_stride;
            y[j] += load_columns(bias + c, n);
          }
          if (a_.residual)
            y[j] += load_columns(static_cast<const T*>(a_.residual) + at * a_.columns + c, n);
          store_columns(static_cast<T*>(a_.out) + at * a_.columns + c, y[j], n);
        }
      }
    }
  }

  const WinogradArgs& a_;
  int64_t rows_, columns_;  // of tiles in an item
  T* pixels_;               // [positions, count, channels]
  const T* zeros_;
  float* sums_;  // [positions, count, columns of the panel]
};

template <class T, bool Flat>
void winograd(const WinogradArgs& a, int64_t threads) {
  const int64_t positions = Flat ? 4 : 16;
  const int64_t tiles = a.items * ((a.height + 1) / 2) * (Flat ? a.width : (a.width + 1) / 2);
  const int64_t panels = typename Gemm<T>::Panels(a.columns, false).count;
  const int64_t bytes = positions * (a.channels * int64_t(sizeof(T)) + Gemm<T>::kColumns * 4);
  const int64_t most = std::clamp<int64_t>(640 * 1024 / bytes / 6 * 6, 12, 192);
  // The same number of blocks for every thread; few blocks are dealt out by panels as well.
  const int64_t shares = threads * ((tiles + most * threads - 1) / (most * threads));
  const int64_t count = std::min(most, ((tiles + shares - 1) / shares + 5) / 6 * 6);
  const int64_t blocks = (tiles + count - 1) / count;
  const int64_t groups = blocks >= threads ? 1 : std::min(panels, 2 * threads);
  parallel_for(blocks * groups, threads, [&](int64_t task) {
    Block<T, Flat> block(a, count);
    const int64_t first = task / groups * count, group = task % groups;
    block.run(first, std::min(count, tiles - first), group * panels / groups,
              (group + 1) * panels / groups);
  });
}

}  // namespace

void winograd_cpu(const WinogradArgs& args, int64_t threads) {
  by_product_dtype(args.dtype, [&](auto kind) {
    using T = decltype(kind);
    args.flat ? winograd<T, true>(args, threads) : winograd<T, false>(args, threads);
  });
}

}  // namespace vf::VF_ISA
