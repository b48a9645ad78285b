// Group and layer normalisation of rows, in fp32. Variances are of differences from a number near
// the mean, so that a large mean costs no digits.
#pragma once
#include <vector>

#include "cpu/base/math.h"
#include "group_norm_silu.h"

namespace vf::VF_ISA {

// ---- layer normalisation ------------------------------------------------------------------------

// A few rows at once: a row's sums and roots take longer to arrive than to compute.
constexpr int kNormRows = 4;

// body(c, n, run) for all columns of R rows; every kSumRun vectors what it adds to `run` goes to
// `sum`: long sums of fp32 lose digits.
constexpr int64_t kSumRun = 32;

template <int R, class Body>
VF_INLINE void sum_columns(int64_t channels, F32 (&sum)[R], const Body& body) {
  for (int64_t first = 0; first < channels; first += kSumRun * kLanes) {
    F32 run[R] = {};
    for_columns(std::min(kSumRun * kLanes, channels - first),
                [&](int64_t c, int n) { body(first + c, n, run); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] += run[r];
  }
}

// Mean and 1 / deviation of R rows.
template <class T, int R>
VF_INLINE void layer_norm_statistics(const T* x, int64_t channels, float eps, float (&mean)[R],
                                     float (&inverse)[R]) {
  F32 sum[R] = {}, squares[R] = {};
  sum_columns(channels, sum, [&](int64_t c, int n, F32(&run)[R]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) run[r] += load_columns(x + r * channels + c, n);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) mean[r] = sum_of(sum[r]) / float(channels);
  sum_columns(channels, squares, [&](int64_t c, int n, F32(&run)[R]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F32 d = load_columns(x + r * channels + c, n) - mean[r];
      if (n < kLanes) {  // nothing of the lanes beyond the end
        float lanes[kLanes];
        store(lanes, d);
        d = load_row(lanes, n);
      }
      run[r] += d * d;
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    inverse[r] = 1.0f / std::sqrt(sum_of(squares[r]) / float(channels) + eps);
  }
}

template <class T, int R>
static inline void layer_norm_block(const T* x, const float* weight, const float* bias, T* out,
                                    int64_t channels, float eps) {
  float mean[R], inverse[R];
  layer_norm_statistics(x, channels, eps, mean, inverse);
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
  explicit GroupNormShape(const GroupNormSiluArgs& a) {
    channels = a.channels + a.channels2;
    items = a.images / a.num_frames;
    item_rows = a.rows * a.num_frames;
    chunk_rows = std::min(std::max<int64_t>(32768 / channels, 8), item_rows);
    chunks = (item_rows + chunk_rows - 1) / chunk_rows;
  }
};

// Per channel of a chunk: a number k near its mean, the sum of x - k, and the sum of squares about
// the chunk's mean; k is the mean of the first rows, so that little cancels. A few rows at a time:
// long sums of fp32 lose digits.
constexpr int kMoments = 3;

template <class T, int V>
static inline void column_moments(const T* x, int64_t rows, int64_t stride, int n, float* out,
                                  int64_t out_stride) {
  constexpr int64_t kRows = sizeof(T) == 4 ? 8 : 32;
  F32 k[V] = {}, s[V] = {}, q[V] = {};
  const int64_t some = std::min(rows, kRows);
  for (int64_t r = 0; r < some; ++r)
    for (int i = 0; i < V; ++i) k[i] += load_columns(x + r * stride + i * kLanes, n);
  for (int i = 0; i < V; ++i) k[i] *= 1.0f / float(some);
  for (int64_t r = 0; r < rows;) {
    F32 sums[V] = {}, squares[V] = {};
    for (const int64_t last = std::min(rows, r + kRows); r < last; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const F32 d = load_columns(x + r * stride + i * kLanes, n) - k[i];
        sums[i] += d;
        squares[i] += d * d;
      }
    }
    for (int i = 0; i < V; ++i) s[i] += sums[i], q[i] += squares[i];
  }
  for (int i = 0; i < V; ++i) {
    const F32 at_mean = q[i] - s[i] * s[i] * (1.0f / float(rows));
    store_columns(out + i * kLanes, k[i], n);
    store_columns(out + out_stride + i * kLanes, s[i], n);
    store_columns(out + 2 * out_stride + i * kLanes, at_mean, n);
  }
}

// A chunk's moments: [kMoments, out_stride].
template <class T>
static inline void chunk_moments(const T* x, int64_t rows, int64_t channels, int64_t out_stride,
                                 float* out) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
    column_moments<T, 4>(x + c, rows, channels, kLanes, out + c, out_stride);
  for_columns(channels - c, [&](int64_t at, int n) {
    column_moments<T, 1>(x + c + at, rows, channels, n, out + c + at, out_stride);
  });
}

// mean and 1 / deviation of every group of an item, from its chunks' [chunks, kMoments, channels].
static inline void group_statistics(const GroupNormSiluArgs& a, const GroupNormShape& s,
                                    const float* moments, float* mean, float* inverse) {
  const int64_t width = s.channels / a.groups;
  const double count = double(width * s.item_rows);
  for (int64_t g = 0; g < a.groups; ++g) {
    double total = 0, squares = 0, average = 0;
    for (const bool centred : {false, true}) {
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        const double rows = double(std::min(s.chunk_rows, s.item_rows - chunk * s.chunk_rows));
        const float* m = moments + chunk * kMoments * s.channels;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          const double k = m[c], sum = m[s.channels + c];
          if (!centred) {
            total += rows * k + sum;
          } else {
            const double d = k + sum / rows - average;
            squares += m[2 * s.channels + c] + rows * d * d;
          }
        }
      }
      average = total / count;
    }
    mean[g] = float(average);
    inverse[g] = float(1.0 / std::sqrt(std::max(squares, 0.0) / count + a.eps));
  }
}

// What a channel's numbers are multiplied with and get: (x - centre) scale + shift. For 16-bit rows
// the centre is 0, and a part of the shift: fp32 has digits enough for them.
struct Coefficients {
  const float *scale, *shift, *centre;
  Coefficients from(int64_t channel) const {
    return {scale + channel, shift + channel, centre + channel};
  }
};

// out = [silu]((x - centre) scale + shift) of rows; x is a part of the channels.
template <class T, bool kSilu>
static inline void scale_rows(const T* x, const Coefficients& k, T* out, int64_t rows,
                              int64_t channels, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for_columns(channels, [&](int64_t c, int n) {
      F32 y = load_columns(x + r * channels + c, n);
      if (sizeof(T) == 4) y -= load_columns(k.centre + c, n);
      y = y * load_columns(k.scale + c, n) + load_columns(k.shift + c, n);
      if (kSilu) y = silu<T>(y);
      store_columns(out + r * out_stride + c, y, n);
    });
}

// One image's coefficients, which the norm, its weights and the modulation make: [3, channels].
template <class T>
static inline Coefficients group_coefficients(const GroupNormSiluArgs& a, const GroupNormShape& s,
                                              int64_t image, const float* mean,
                                              const float* inverse, float* out) {
  float *scale = out, *shift = out + s.channels, *centre = out + 2 * s.channels;
  const int64_t width = s.channels / a.groups;
  const int64_t row = image / std::max<int64_t>(1, a.modulation_images) * a.modulation_stride;
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      float w = inverse[g] * (a.weight ? a.weight[c] : 1.0f);
      float b = a.bias ? a.bias[c] : 0.0f;
      if (a.scale) {
        const float m = 1.0f + a.scale[row + c];
        w *= m;
        b = b * m + a.shift[row + c];
      }
      const bool centred = sizeof(T) == 4;
      scale[c] = w;
      shift[c] = centred ? b : b - mean[g] * w;
      centre[c] = centred ? mean[g] : 0.0f;
    }
  return {scale, shift, centre};
}

}  // namespace vf::VF_ISA
