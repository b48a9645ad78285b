// The gradient of a 3x3 convolution's weights, in Winograd's form F(2, 3).
//
// That of the transformed taps is a product over all tiles, for each of the 16 positions: of the
// transformed pixels with the transformed gradients. A block of tiles is transformed at a time,
// into words of neighbouring tiles, and multiplied: channels in rows, columns in the lanes. In the
// end the sums are transformed back to taps. Tiles are added up in an order that depends on the
// shape alone. In bf16 pixels and gradients are rounded once more than in a direct convolution.
#include "conv3x3_weight_gradient.h"

#include <stdexcept>
#include <vector>

#include "cpu/base/parallel.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/transforms.h"

namespace vf::VF_ISA {

namespace {

constexpr int kPositions = 16;
constexpr int64_t kBlockWords = 128;  // of tiles: a panel of gradients then stays in L1 or L2

// sums [MR, NV vectors] += or, where it opens, = the products of MR channels, which are
// neighbouring words of `pixels`, and the gradients [words, NV vectors].
template <class T, int MR, int NV>
static __attribute__((noinline)) void multiply(const uint32_t* pixels, const uint32_t* gradients,
                                               int64_t words, bool opens, float* sums,
                                               int64_t stride) {
  F32 acc[MR][NV] = {};
  for (int64_t w = 0; w < words; ++w) {
    U32 y[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) y[v] = load<U32>(gradients + (w * NV + v) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
      const U32 b = broadcast(pixels + w * kLanes + r);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = dot<T>(acc[r][v], y[v], b);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) {
      float* to = sums + r * stride + v * kLanes;
      store(to, opens ? acc[r][v] : load<F32>(to) + acc[r][v]);
    }
}

template <class T, int NV>
static void multiply_rows(const uint32_t* pixels, int rows, const uint32_t* gradients,
                          int64_t words, bool opens, float* sums, int64_t stride) {
  int r = 0;
  const auto next = [&](auto count) {
    constexpr int MR = decltype(count)::value;
    for (; r + MR <= rows; r += MR)
      multiply<T, MR, NV>(pixels + r, gradients, words, opens, sums + r * stride, stride);
  };
  next(std::integral_constant<int, 6>());
  next(std::integral_constant<int, 4>());
  next(std::integral_constant<int, 2>());
  next(std::integral_constant<int, 1>());
}

template <class T>
class WeightGradient {
 public:
  static constexpr int kNumbers = kPerWord<T>;

  explicit WeightGradient(const Conv3x3WeightGradientArgs& a)
      : a_(a),
        rows_((a.height + 1) / 2),
        across_((a.width + 1) / 2),
        tiles_(a.items * rows_ * across_),
        panels_(a.columns, false),
        vectors_((a.channels + kLanes - 1) / kLanes),
        stride_(panels_.units * kLanes) {
    static thread_local std::vector<uint32_t> words;
    static thread_local std::vector<float> sums;
    const int64_t pixels = kPositions * vectors_ * kBlockWords * kLanes;
    const int64_t gradients = kPositions * kBlockWords * stride_;
    if (int64_t(words.size()) < pixels + gradients) words.resize(pixels + gradients);
    const int64_t all = kPositions * vectors_ * kLanes * stride_;
    if (int64_t(sums.size()) < all) sums.resize(all);
    pixels_ = words.data();
    gradients_ = pixels_ + pixels;
    sums_ = sums.data();
  }

  void run(int64_t threads) {
    constexpr int64_t kAtOnce = 4;  // words that a task transforms
    for (int64_t first = 0; first < tiles_; first += kBlockWords * kNumbers) {
      const int64_t words = std::min(kBlockWords, (tiles_ - first + kNumbers - 1) / kNumbers);
      parallel_for((words + kAtOnce - 1) / kAtOnce, threads, [&](int64_t task) {
        const T* zeros = gemm_scratch<T>(0, std::max(a_.channels, a_.columns)).zeros;
        for (int64_t w = task * kAtOnce; w < std::min(words, (task + 1) * kAtOnce); ++w) {
          read_pixels(first + w * kNumbers, w, zeros);
          read_gradients(first + w * kNumbers, w, zeros);
        }
      });
      parallel_for(kPositions * vectors_, threads,
                   [&](int64_t task) { add(task / vectors_, task % vectors_, words, first == 0); });
    }
    parallel_for(vectors_, threads, [&](int64_t vector) { finish(vector); });
  }

 private:
  // The rows of a tile's Size x Size neighbours in `from`, from (-Before, -Before) of its first
  // pixel on; `zeros` outside of the picture and beyond the last tile.
  template <int Size, int Before>
  void find(const void* from, int64_t width, int64_t tile, const T* zeros,
            const T* (&found)[Size][Size]) const {
    const int64_t item = tile / (rows_ * across_), rest = tile % (rows_ * across_);
    const int64_t top = rest / across_ * 2 - Before, left = rest % across_ * 2 - Before;
    for (int i = 0; i < Size; ++i)
      for (int j = 0; j < Size; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = tile < tiles_ && y >= 0 && y < a_.height && x >= 0 && x < a_.width;
        found[i][j] =
            inside ? static_cast<const T*>(from) + ((item * a_.height + y) * a_.width + x) * width
                   : zeros;
      }
  }

  // The transformed numbers of the word's tiles at n channels from c on, by `along` of a dimension.
  template <int Size, class Along>
  VF_INLINE void transform(const T* (&rows)[kNumbers][Size][Size], int64_t c, int n,
                           const Along& along, U32 (&out)[kPositions]) {
    F32 all[kNumbers][4][4];
#pragma GCC unroll 2
    for (int number = 0; number < kNumbers; ++number) {
      F32 half[4][Size];
#pragma GCC unroll 4
      for (int j = 0; j < Size; ++j) {
        F32 d[Size], t[4];
#pragma GCC unroll 4
        for (int i = 0; i < Size; ++i) d[i] = load_columns(rows[number][i][j] + c, n);
        along(d, t);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) half[i][j] = t[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) along(half[i], all[number][i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        out[i * 4 + j] = words_of<T>(all[0][i][j], all[kNumbers - 1][i][j]);
  }

  void read_pixels(int64_t tile, int64_t word, const T* zeros) const {
    const T* rows[kNumbers][4][4];
    for (int k = 0; k < kNumbers; ++k) find<4, 1>(a_.x, a_.channels, tile + k, zeros, rows[k]);
    const auto along = [](const F32(&d)[4], F32(&t)[4]) { transform_in(d, t); };
    for_columns(a_.channels, [&](int64_t c, int n) {
      U32 out[kPositions];
      transform<4>(rows, c, n, along, out);
      uint32_t* to = pixels_ + (c / kLanes * kBlockWords + word) * kLanes;
      for (int p = 0; p < kPositions; ++p) store(to + p * vectors_ * kBlockWords * kLanes, out[p]);
    });
  }

  void read_gradients(int64_t tile, int64_t word, const T* zeros) const {
    const T* rows[kNumbers][2][2];
    for (int k = 0; k < kNumbers; ++k) find<2, 0>(a_.grad, a_.columns, tile + k, zeros, rows[k]);
    const auto along = [](const F32(&y)[2], F32(&m)[4]) { transform_results(y, m); };
    const int64_t step = kBlockWords * stride_, columns = a_.columns;
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      const int64_t vectors = panels_.vectors(panel), first = panels_.first(panel) * kLanes;
      uint32_t* const to = gradients_ + first * kBlockWords + word * vectors * kLanes;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = first + v * kLanes;
        U32 out[kPositions];
        transform<2>(rows, c, columns_left(columns, c), along, out);
        for (int p = 0; p < kPositions; ++p) store(to + v * kLanes + p * step, out[p]);
      }
    }
  }

  // The products of a position for the channels of a vector.
  void add(int64_t position, int64_t vector, int64_t words, bool opens) const {
    const uint32_t* pixels = pixels_ + (position * vectors_ + vector) * kBlockWords * kLanes;
    const int rows = columns_left(a_.channels, vector * kLanes);
    float* sums = sums_of(position, vector);
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      const int64_t column = panels_.first(panel) * kLanes;
      const uint32_t* gradients = gradients_ + (position * stride_ + column) * kBlockWords;
      switch (panels_.vectors(panel)) {
        case 1:
          multiply_rows<T, 1>(pixels, rows, gradients, words, opens, sums + column, stride_);
          break;
        case 2:
          multiply_rows<T, 2>(pixels, rows, gradients, words, opens, sums + column, stride_);
          break;
#if defined(__AVX512F__)
        case 3:
          multiply_rows<T, 3>(pixels, rows, gradients, words, opens, sums + column, stride_);
          break;
        case 4:
          multiply_rows<T, 4>(pixels, rows, gradients, words, opens, sums + column, stride_);
          break;
#endif
      }
    }
  }

  // [channels of the vector, columns] of a position.
  float* sums_of(int64_t position, int64_t vector) const {
    return sums_ + (position * vectors_ + vector) * kLanes * stride_;
  }

  // A vector's channels to taps; in out they are neighbours, and here columns are: blocks are
  // turned.
  void finish(int64_t vector) const {
    alignas(64) float taps[9][kLanes][kLanes];  // [tap, channel, column]
    const int channels = columns_left(a_.channels, vector * kLanes);
    for (int64_t column = 0; column < a_.columns; column += kLanes) {
      for (int r = 0; r < channels; ++r) {
        F32 half[3][4];
        for (int j = 0; j < 4; ++j) {
          F32 t[4], g[3];
          for (int i = 0; i < 4; ++i)
            t[i] = load<F32>(sums_of(i * 4 + j, vector) + r * stride_ + column);
          transform_to_taps(t, g);
          for (int i = 0; i < 3; ++i) half[i][j] = g[i];
        }
        for (int i = 0; i < 3; ++i) {
          F32 g[3];
          transform_to_taps(half[i], g);
          for (int j = 0; j < 3; ++j) store(taps[i * 3 + j][r], g[j]);
        }
      }
      const int columns = columns_left(a_.columns, column);
      for (int tap = 0; tap < 9; ++tap) {
        U32 block[16];  // of columns
        load_columns_of_words(reinterpret_cast<const char*>(taps[tap]), 4 * kLanes, channels,
                              kLanes, block);
        for (int o = 0; o < columns; ++o)
          store_columns(a_.out + ((column + o) * 9 + tap) * a_.channels + vector * kLanes,
                        reinterpret_cast<F32>(block[o]), channels);
      }
    }
  }

  const Conv3x3WeightGradientArgs& a_;
  const int64_t rows_, across_, tiles_;  // of tiles: in an item, across it, and in all
  const Panels panels_;
  const int64_t vectors_, stride_;  // of channels; columns, filled up to vectors
  uint32_t* pixels_;                // [positions, vectors, words of tiles, lanes]
  uint32_t* gradients_;             // [positions][panels][words of tiles, columns of the panel]
  float* sums_;                     // [positions, channels, columns]
};

}  // namespace

void conv3x3_weight_gradient_cpu(const Conv3x3WeightGradientArgs& args, int64_t threads) {
  by_product_dtype(args.dtype, [&](auto kind) {
    using T = decltype(kind);
    if constexpr (kInTiles<T>) {  // a direct product in tiles is faster
      throw std::invalid_argument(
          "conv3x3_weight_gradient: expected fp32 beside a matrix unit, got bf16");
    } else {
      WeightGradient<T>(args).run(threads);
    }
  });
}

}  // namespace vf::VF_ISA
