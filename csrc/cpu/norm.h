// Group and layer normalisation of rows, in fp32. Variances are of differences from a number near
// the mean, so that a large mean costs no digits.
#pragma once
#include <vector>

#include "cpu/rows.h"
#include "network.h"

namespace vf::VF_ISA {

// ---- layer normalisation ------------------------------------------------------------------------

// A few rows at once: a row's sums and roots take longer to arrive than to compute.
constexpr int kNormRows = 4;

template <class T, int R>
static inline void layer_norm_block(const T* x, const float* weight, const float* bias, T* out,
                                    int64_t channels, float eps) {
  float mean[R], inverse[R];
  F32 sum[R] = {}, squares[R] = {};
  for_columns(channels, [&](int64_t c, int n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] += load_columns(x + r * channels + c, n);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) mean[r] = sum_of(sum[r]) / float(channels);
  for_columns(channels, [&](int64_t c, int n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F32 d = load_columns(x + r * channels + c, n) - mean[r];
      squares[r] += d * d;
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float total = sum_of(squares[r]);
    if (const int64_t rest = channels % kLanes)  // lanes beyond the end held 0 - mean
      total -= float(kLanes - rest) * mean[r] * mean[r];
    inverse[r] = 1.0f / std::sqrt(std::max(total, 0.0f) / float(channels) + eps);
  }
  for_columns(channels, [&](int64_t c, int n) {
    const F32 w = weight ? load_columns(weight + c, n) : splat(1.0f);
    const F32 b = bias ? load_columns(bias + c, n) : F32{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F32 y = (load_columns(x + r * channels + c, n) - mean[r]) * inverse[r];
      store_columns(out + r * channels + c, y * w + b, n);
    }
  });
}

template <class T>
static inline void layer_norm_rows(const T* x, const float* weight, const float* bias, T* out,
                                   int64_t rows, int64_t channels, float eps) {
  int64_t r = 0;
  for (; r + kNormRows <= rows; r += kNormRows)
    layer_norm_block<T, kNormRows>(x + r * channels, weight, bias, out + r * channels, channels,
                                   eps);
  for (; r < rows; ++r)
    layer_norm_block<T, 1>(x + r * channels, weight, bias, out + r * channels, channels, eps);
}

// ---- group normalisation ------------------------------------------------------------------------

// An item is the rows whose statistics are shared; it is cut into chunks whose size depends on the
// shape alone, so that sums come out the same on any number of threads.
struct GroupNormShape {
  int64_t channels, items, item_rows, chunk_rows, chunks;
  explicit GroupNormShape(const GroupNormArgs& a) {
    channels = a.channels + a.channels2;
    items = a.images / a.num_frames;
    item_rows = a.rows * a.num_frames;
    chunk_rows = std::clamp<int64_t>(32768 / channels, 8, item_rows);
    chunks = (item_rows + chunk_rows - 1) / chunk_rows;
  }
};

// Sums of x - first and of its square over a chunk, per channel; first: the item's first row.
template <class T>
static inline void chunk_sums(const T* x, const T* first, int64_t rows, int64_t channels,
                              int64_t out_stride, float* sums) {
  float* squares = sums + out_stride;
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
    F32 s[4] = {}, q[4] = {}, k[4];
    for (int i = 0; i < 4; ++i) k[i] = load_row(first + c + i * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const F32 d = load_row(x + r * channels + c + i * kLanes) - k[i];
        s[i] += d;
        q[i] += d * d;
      }
    }
    for (int i = 0; i < 4; ++i) {
      store(sums + c + i * kLanes, s[i]);
      store(squares + c + i * kLanes, q[i]);
    }
  }
  for_columns(channels - c, [&](int64_t at, int n) {
    F32 s = {}, q = {};
    const F32 k = load_columns(first + c + at, n);
    for (int64_t r = 0; r < rows; ++r) {
      const F32 d = load_columns(x + r * channels + c + at, n) - k;
      s += d;
      q += d * d;
    }
    store_columns(sums + c + at, s, n);
    store_columns(squares + c + at, q, n);
  });
}

// out = [silu](x scale + shift) [+ residual] of rows; x is a part of the channels.
template <class T, bool kSilu>
static inline void scale_rows(const T* x, const float* scale, const float* shift, const T* residual,
                              T* out, int64_t rows, int64_t channels, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for_columns(channels, [&](int64_t c, int n) {
      F32 y = load_columns(x + r * channels + c, n) * load_columns(scale + c, n) +
              load_columns(shift + c, n);
      if (kSilu) y = silu<T>(y);
      if (residual) y += load_columns(residual + r * out_stride + c, n);
      store_columns(out + r * out_stride + c, y, n);
    });
}

// mean and 1 / deviation of every group, from all chunks' sums [chunks, 2, channels].
template <class T>
static inline void group_statistics(const GroupNormArgs& a, const GroupNormShape& s,
                                    const float* sums, const T* first, const T* first2, float* mean,
                                    float* inverse) {
  const int64_t width = s.channels / a.groups;
  std::vector<double> at(width), squares(width);
  for (int64_t g = 0; g < a.groups; ++g) {
    double total = 0;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = g * width + i;
      double sum = 0, square = 0;
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        sum += sums[(2 * chunk) * s.channels + c];
        square += sums[(2 * chunk + 1) * s.channels + c];
      }
      const T* p = c < a.channels ? first + c : first2 + (c - a.channels);
      T one[kLanes] = {};
      one[0] = *p;
      at[i] = load_row(one)[0] + sum / double(s.item_rows);
      squares[i] = square - sum * sum / double(s.item_rows);
      total += at[i];
    }
    const double average = total / double(width);
    double square = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double d = at[i] - average;
      square += squares[i] + d * d * double(s.item_rows);
    }
    mean[g] = float(average);
    inverse[g] =
        float(1.0 / std::sqrt(std::max(square, 0.0) / double(width * s.item_rows) + a.eps));
  }
}

// One image's scale and shift per channel: what the norm, its weights and the modulation make.
static inline void group_coefficients(const GroupNormArgs& a, const GroupNormShape& s,
                                      int64_t image, const float* mean, const float* inverse,
                                      float* scale, float* shift) {
  const int64_t width = s.channels / a.groups;
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      float w = inverse[g] * (a.weight ? a.weight[c] : 1.0f);
      float b = (a.bias ? a.bias[c] : 0.0f) - mean[g] * w;
      if (a.scale) {
        const float m = 1.0f + a.scale[image * a.modulation_stride + c];
        w *= m;
        b = b * m + a.shift[image * a.modulation_stride + c];
      }
      scale[c] = w;
      shift[c] = b;
    }
}

}  // namespace vf::VF_ISA
