// The way back of group_norm_silu: formula in group_norm_silu_backward.h
//
// A task is an image. Its rows are read three times, for the statistics, the sums and dx: but for
// the first time they come from a core's cache.
#include "group_norm_silu_backward.h"

#include "cpu/base/math.h"
#include "cpu/base/parallel.h"
#include "cpu/norm.h"

namespace vf::VF_ISA {

// Per channel, [channels] each: x^ = (x - mean) inverse and z = x^ weight + bias; the group's
// means of dz w and of dz w x^.
struct BackwardTables {
  float *mean, *inverse, *weight, *bias, *average, *slope;
  BackwardTables(std::vector<float>& memory, int64_t channels) {
    memory.resize(6 * channels);
    float** const tables[] = {&mean, &inverse, &weight, &bias, &average, &slope};
    for (int64_t i = 0; i < 6; ++i) *tables[i] = memory.data() + i * channels;
  }
};

static inline void set_weights(const GroupNormSiluArgs& a, int64_t image, const BackwardTables& t) {
  const int64_t row = image / std::max<int64_t>(1, a.modulation_images) * a.modulation_stride;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float m = a.scale ? 1.0f + a.scale[row + c] : 1.0f;
    t.weight[c] = (a.weight ? a.weight[c] : 1.0f) * m;
    t.bias[c] = (a.bias ? a.bias[c] : 0.0f) * m + (a.shift ? a.shift[row + c] : 0.0f);
  }
}

template <class T, bool kSilu>
VF_INLINE F32 grad_z(F32 dy, F32 z) {
  if constexpr (!kSilu) return dy;
  const F32 y = maximum(z, splat(-87.0f));  // as in silu
  const F32 s = reciprocal<T>(1.0f + exponential<T>(y * -kExponent<T>));
  return dy * s * (1.0f + z * (1.0f - s));
}

// sums [2, stride] of V vectors of columns from c on, over an image's rows.
template <class T, bool kSilu, int V>
static inline void column_sums(const T* x, const T* dy, int64_t rows, int64_t stride, int64_t c,
                               int n, const BackwardTables& t, float* sums) {
  constexpr int64_t kRun = 32;  // rows: long sums of fp32 lose digits
  F32 mean[V], inverse[V], weight[V], bias[V], total[V] = {}, with_x[V] = {};
  for (int i = 0; i < V; ++i) {
    const int64_t at = c + i * kLanes;
    mean[i] = load_columns(t.mean + at, n), inverse[i] = load_columns(t.inverse + at, n);
    weight[i] = load_columns(t.weight + at, n), bias[i] = load_columns(t.bias + at, n);
  }
  for (int64_t r = 0; r < rows;) {
    F32 run[V] = {}, run_with_x[V] = {};
    for (const int64_t last = std::min(rows, r + kRun); r < last; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        const int64_t at = r * stride + c + i * kLanes;
        const F32 normed = (load_columns(x + at, n) - mean[i]) * inverse[i];
        const F32 dz = grad_z<T, kSilu>(load_columns(dy + at, n), normed * weight[i] + bias[i]);
        run[i] += dz;
        run_with_x[i] += dz * normed;
      }
    }
    for (int i = 0; i < V; ++i) total[i] += run[i], with_x[i] += run_with_x[i];
  }
  for (int i = 0; i < V; ++i) {
    store_columns(sums + c + i * kLanes, total[i], n);
    store_columns(sums + stride + c + i * kLanes, with_x[i], n);
  }
}

template <class T, bool kSilu>
static inline void image_sums(const T* x, const T* dy, int64_t rows, int64_t channels,
                              const BackwardTables& t, float* sums) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
    column_sums<T, kSilu, 2>(x, dy, rows, channels, c, kLanes, t, sums);
  for_columns(channels - c, [&](int64_t at, int n) {
    column_sums<T, kSilu, 1>(x, dy, rows, channels, c + at, n, t, sums);
  });
}

template <class T, bool kSilu>
static inline void image_grad(const T* x, const T* dy, int64_t rows, int64_t channels,
                              const BackwardTables& t, T* dx) {
  for (int64_t r = 0; r < rows; ++r)
    for_columns(channels, [&](int64_t c, int n) {
      const int64_t at = r * channels + c;
      const F32 inverse = load_columns(t.inverse + c, n), weight = load_columns(t.weight + c, n);
      const F32 normed = (load_columns(x + at, n) - load_columns(t.mean + c, n)) * inverse;
      const F32 z = normed * weight + load_columns(t.bias + c, n);
      const F32 dz = grad_z<T, kSilu>(load_columns(dy + at, n), z);
      const F32 mean = load_columns(t.average + c, n) + normed * load_columns(t.slope + c, n);
      store_columns(dx + at, (dz * weight - mean) * inverse, n);
    });
}

template <class T, bool kSilu>
static void backward_image(const GroupNormSiluBackwardArgs& args, int64_t image) {
  const GroupNormSiluArgs& a = args.forward;
  const GroupNormShape s(a);
  const int64_t channels = a.channels, width = channels / a.groups, size = kMoments * channels;
  const int64_t first = image * a.rows * channels;
  const T* x = static_cast<const T*>(a.x) + first;
  const T* dy = static_cast<const T*>(args.dy) + first;
  T* dx = static_cast<T*>(args.dx) + first;
  float* sums = args.sums + image * 2 * channels;

  std::vector<float> moments(s.chunks * size), groups(2 * a.groups), memory;
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const int64_t row = chunk * s.chunk_rows, rows = std::min(s.chunk_rows, a.rows - row);
    chunk_moments(x + row * channels, rows, channels, channels, &moments[chunk * size]);
  }
  group_statistics(a, s, moments.data(), groups.data(), groups.data() + a.groups);
  const BackwardTables t(memory, channels);
  set_weights(a, image, t);
  for (int64_t c = 0; c < channels; ++c) {
    t.mean[c] = groups[c / width];
    t.inverse[c] = groups[a.groups + c / width];
  }
  image_sums<T, kSilu>(x, dy, a.rows, channels, t, sums);

  std::vector<double> means(2 * a.groups);
  for (int64_t c = 0; c < channels; ++c) {
    means[c / width] += double(t.weight[c]) * sums[c];
    means[a.groups + c / width] += double(t.weight[c]) * sums[channels + c];
  }
  const double count = double(width * a.rows);
  for (int64_t c = 0; c < channels; ++c) {
    t.average[c] = float(means[c / width] / count);
    t.slope[c] = float(means[a.groups + c / width] / count);
  }
  image_grad<T, kSilu>(x, dy, a.rows, channels, t, dx);
}

void group_norm_silu_backward_cpu(const GroupNormSiluBackwardArgs& args, int64_t threads) {
  const GroupNormSiluArgs& a = args.forward;
  by_dtype(a.dtype, [&](auto kind) {
    using T = decltype(kind);
    parallel_for(a.images, threads, [&](int64_t image) {
      a.silu ? backward_image<T, true>(args, image) : backward_image<T, false>(args, image);
    });
  });
}

}  // namespace vf::VF_ISA
