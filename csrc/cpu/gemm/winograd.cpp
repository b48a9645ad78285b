// Convolutions in Winograd's form F(2, 3).
//
// A task takes a block of tiles: it transforms their pixels, multiplies each of the 16 (1-D: 4)
// positions with its own weights, a panel of columns at a time, and transforms the sums back. The
// transforms only add and halve; in bf16 the transformed pixels are rounded once more than in a
// direct convolution.
//
// Transformed weights take 16/9 (1-D: 4/3) of the memory. So a task may be given the taps instead:
// it transforms a panel's share of a block of channels at a time, which then stays in L2 for all
// tiles, and goes on with the sums of the block before. At 128 tiles the transform costs about a
// twentieth of the products.
#include "winograd.h"

#include <stdexcept>
#include <vector>

#include "cpu/base/parallel.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/transforms.h"

namespace vf::VF_ISA {

namespace {

template <class T, bool Flat>
class Block {
 public:
  using Form = VectorGemm<T>;
  static constexpr int kAcross = Flat ? 1 : 4, kPositions = 4 * kAcross;
  static constexpr int kTapsAcross = Flat ? 1 : 3, kTaps = 3 * kTapsAcross;
  static constexpr int kNumbers = kPerWord<T>;
  // Words of a block of channels, whose transformed weights take half of L2.
  static constexpr int64_t kWords = 2048 / kPositions;

  Block(const WinogradArgs& a, int64_t most)
      : a_(a),
        panels_(a.columns, false),
        rows_((a.height + 1) / 2),
        columns_(Flat ? a.width : (a.width + 1) / 2),
        depth_(a.transformed ? a.channels : std::min(a.channels, kWords * kNumbers)) {
    static thread_local std::vector<T> pixels;
    static thread_local std::vector<uint32_t> weights;
    if (int64_t(pixels.size()) < kPositions * most * a.channels)
      pixels.resize(kPositions * most * a.channels);
    const int64_t words = kPositions * depth_ / kNumbers * Form::kColumns;
    if (!a.transformed && int64_t(weights.size()) < words) weights.resize(words);
    const Scratch<T> scratch = gemm_scratch<T>(kPositions * most, a.channels);
    pixels_ = pixels.data();
    transformed_ = weights.data();
    sums_ = scratch.sums;
    zeros_ = scratch.zeros;
  }

  // Tiles [first, first + count), panels [panel, last_panel).
  void run(int64_t first, int64_t count, int64_t panel, int64_t last_panel) {
    for (int64_t i = 0; i < count; ++i) read(first + i, i, count);
    typename Form::PanelSums multiply(a_.columns, count, zeros_);
    for (; panel < last_panel; ++panel) {
      const int vectors = panels_.vectors(panel);
      for (int64_t c = 0; c < a_.channels; c += depth_) {
        const int64_t depth = std::min(depth_, a_.channels - c);
        const T* x = pixels_ + kPositions * count * c;
        const auto [weights, stride] = weights_of(panel, c, depth);
        for (int position = 0; position < kPositions; ++position)
          multiply(x + position * count * depth, depth, weights + position * stride, panel, c == 0,
                   sums_ + position * count * vectors * kLanes);
      }
      for (int64_t i = 0; i < count; ++i)
        write(first + i, i, count, panels_.first(panel) * kLanes, vectors);
    }
  }

 private:
  struct PanelWeights {
    const uint32_t* first;  // of position 0
    int64_t stride;         // from position to position
  };

  // A panel's weights of channels [c, c + depth).
  PanelWeights weights_of(int64_t panel, int64_t c, int64_t depth) const {
    const int64_t lanes = panels_.vectors(panel) * kLanes, words = depth / kNumbers * lanes;
    const int64_t parts = a_.transformed ? 1 : kTaps;  // side by side in a panel
    const auto* given =
        static_cast<const uint32_t*>(a_.weights) +
        (panels_.first(panel) * kLanes * parts * a_.channels + c * lanes) / kNumbers;
    if (a_.transformed) return {given, Form::packed_words(panels_, a_.channels)};
    transform_weights(given, a_.channels / kNumbers * lanes, words);
    return {transformed_, words};
  }

  // So many words of every tap, which lie `tap` words apart, to `transformed_`.
  void transform_weights(const uint32_t* from, int64_t tap, int64_t words) const {
    for (int64_t at = 0; at < words; at += kLanes) {
      F32 half[kNumbers][4][kTapsAcross];
#pragma GCC unroll 3
      for (int j = 0; j < kTapsAcross; ++j) {
        F32 g[kNumbers][3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          F32 numbers[kNumbers];
          numbers_of<T>(load<U32>(from + (i * kTapsAcross + j) * tap + at), numbers);
#pragma GCC unroll 2
          for (int n = 0; n < kNumbers; ++n) g[n][i] = numbers[n];
        }
#pragma GCC unroll 2
        for (int n = 0; n < kNumbers; ++n) {
          F32 t[4];
          transform_taps(g[n], t);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) half[n][i][j] = t[i];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        F32 t[kNumbers][4];
#pragma GCC unroll 2
        for (int n = 0; n < kNumbers; ++n) {
          if constexpr (Flat) {
            t[n][0] = half[n][i][0];
          } else {
            transform_taps(half[n][i], t[n]);
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < kAcross; ++j)
          store(transformed_ + (i * kAcross + j) * words + at,
                words_of<T>(t[0][j], t[kNumbers - 1][j]));
      }
    }
  }

  struct Place {
    int64_t item, y, x;  // of the tile's first result
  };

  Place place(int64_t tile) const {
    const int64_t item = tile / (rows_ * columns_), rest = tile % (rows_ * columns_);
    return {item, rest / columns_ * 2, rest % columns_ * (Flat ? 1 : 2)};
  }

  // The tile's pixels, transformed, to row `row` of `pixels_`.
  void read(int64_t tile, int64_t row, int64_t count) const {
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
      const int64_t first = c / depth_ * depth_, depth = std::min(depth_, a_.channels - first);
      T* to = pixels_ + kPositions * count * first + row * depth + (c - first);
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
          store_columns(to + (i * kAcross + j) * count * depth, t[j], n);
      }
    });
  }

  // The tile's results for the columns of a panel. What a store could change is read before.
  void write(int64_t tile, int64_t row, int64_t count, int64_t column, int vectors) const {
    constexpr int kResults = Flat ? 1 : 2;
    const Place p = place(tile);
    T* out[2][kResults];
    const T* residual[2][kResults] = {};
    const float* bias[2][kResults] = {};
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < kResults; ++j) {
        const int64_t py = p.y + i, px = p.x + j;
        const bool inside = py < a_.height && px < a_.width;
        const int64_t at = (p.item * a_.height + py) * a_.width + px;
        out[i][j] = inside ? static_cast<T*>(a_.out) + at * a_.columns + column : nullptr;
        if (a_.residual)
          residual[i][j] = static_cast<const T*>(a_.residual) + at * a_.columns + column;
        if (a_.bias)
          bias[i][j] = a_.bias + column + (a_.bias_rows ? at / a_.bias_rows * a_.bias_stride : 0);
      }
    const float* sums = sums_ + row * vectors * kLanes;
    const int64_t step = count * vectors * kLanes, columns = a_.columns;
    for (int v = 0; v < vectors; ++v, sums += kLanes) {
      const int n = columns_left(columns, column + v * kLanes);
      F32 half[2][kAcross];
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) {
        F32 m[4], y[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) m[i] = load<F32>(sums + (i * kAcross + j) * step);
        transform_out(m, y);
        half[0][j] = y[0], half[1][j] = y[1];
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        F32 y[2];
        if constexpr (Flat) {
          y[0] = half[i][0];
        } else {
          transform_out(half[i], y);
        }
#pragma GCC unroll 2
        for (int j = 0; j < kResults; ++j) {
          if (!out[i][j]) continue;
          if (bias[i][j]) y[j] += load_columns(bias[i][j] + v * kLanes, n);
          if (residual[i][j]) y[j] += load_columns(residual[i][j] + v * kLanes, n);
          store_columns(out[i][j] + v * kLanes, y[j], n);
        }
      }
    }
  }

  const WinogradArgs& a_;
  const typename Form::Panels panels_;
  const int64_t rows_, columns_;  // of tiles in an item
  const int64_t depth_;           // channels of a block
  T* pixels_;                     // [blocks of channels, positions, count, channels of the block]
  uint32_t* transformed_;         // [positions, words of the block, columns of the panel]
  const T* zeros_;
  float* sums_;  // [positions, count, columns of the panel]
};

template <class T, bool Flat>
void winograd(const WinogradArgs& a, int64_t threads) {
  const int64_t tiles = a.items * ((a.height + 1) / 2) * (Flat ? a.width : (a.width + 1) / 2);
  const int64_t panels = typename VectorGemm<T>::Panels(a.columns, false).count;
  const int64_t most = a.transformed ? 132 : 192;
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
    if constexpr (kInTiles<T>) {  // whose weights have another order, and a direct product is
                                  // faster
      throw std::invalid_argument("winograd: expected fp32 beside a matrix unit, got bf16");
    } else {
      args.flat ? winograd<T, true>(args, threads) : winograd<T, false>(args, threads);
    }
  });
}

}  // namespace vf::VF_ISA
