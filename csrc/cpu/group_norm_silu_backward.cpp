// The gradient of group_norm_silu: see group_norm_silu_backward.h.
//
// Rows are read three times: for the statistics, for the sums of du and du xhat, and for the
// result. An item that fits a core's cache is treated whole by one thread. Sums are of a chunk of
// an image's rows, then of its chunks: in an order that depends on the shape alone.
#include "group_norm_silu_backward.h"

#include "cpu/base/parallel.h"
#include "cpu/norm.h"

namespace vf::VF_ISA {

namespace {

// What u and the result are made of, [channels] each: u = (x - mean) factor + shift.
struct Terms {
  const float *mean, *factor, *shift, *first, *second;
};

// du of a vector, from x - mean.
template <class T, bool kSilu>
VF_INLINE F32 grad_before_silu(F32 grad, F32 centred, F32 factor, F32 shift) {
  if (!kSilu) return grad;
  const F32 u = centred * factor + shift;
  const F32 y = maximum(u, splat(-87.0f));  // as in silu
  const F32 s = reciprocal<T>(1.0f + exponential<T>(y * -kExponent<T>));
  return grad * s * (1.0f + u * (1.0f - s));
}

// The sums of du and of du (x - mean) of V vectors of channels.
template <class T, int V, bool kSilu>
void column_sums(const T* grad, const T* x, const Terms& k, int64_t rows, int64_t stride, int n,
                 float* plain, float* moment) {
  F32 mean[V], factor[V], shift[V], sum[V] = {}, product[V] = {};
  for (int i = 0; i < V; ++i) {
    mean[i] = load_columns(k.mean + i * kLanes, n);
    factor[i] = load_columns(k.factor + i * kLanes, n);
    shift[i] = load_columns(k.shift + i * kLanes, n);
  }
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const F32 centred = load_columns(x + r * stride + i * kLanes, n) - mean[i];
      const F32 g = load_columns(grad + r * stride + i * kLanes, n);
      const F32 du = grad_before_silu<T, kSilu>(g, centred, factor[i], shift[i]);
      sum[i] += du;
      product[i] += du * centred;
    }
  }
  for (int i = 0; i < V; ++i) {
    store_columns(plain + i * kLanes, sum[i], n);
    store_columns(moment + i * kLanes, product[i], n);
  }
}

template <class T, bool kSilu>
class Backward {
 public:
  explicit Backward(const GroupNormSiluBackwardArgs& a) : a_(a), norm_(norm_of(a)), s_(norm_) {
    chunk_rows_ = std::min(std::max<int64_t>(32768 / a.channels, 8), a.rows);
    chunks_ = (a.rows + chunk_rows_ - 1) / chunk_rows_;
    moments_.resize(s_.items * s_.chunks * kMoments * s_.channels);
    groups_.resize(s_.items * kGroupNumbers * a.groups);
    partial_.resize(a.images * chunks_ * 2 * a.channels);
  }

  void run(int64_t threads) {
    const int64_t tasks = a_.images * chunks_, moments = s_.items * s_.chunks;
    if (s_.item_rows * a_.channels * sizeof(T) <= 256 * 1024 && s_.items >= 2 * threads) {
      parallel_for(s_.items, threads, [&](int64_t item) {
        for (int64_t chunk = 0; chunk < s_.chunks; ++chunk) measure(item * s_.chunks + chunk);
        finish_statistics(item);
        const int64_t first = item * a_.num_frames * chunks_, count = a_.num_frames * chunks_;
        for (int64_t task = first; task < first + count; ++task) sum(task);
        finish_sums(item);
        for (int64_t task = first; task < first + count; ++task) apply(task);
      });
      return;
    }
    parallel_for(moments, threads, [&](int64_t task) { measure(task); });
    parallel_for(s_.items, threads, [&](int64_t item) { finish_statistics(item); });
    parallel_for(tasks, threads, [&](int64_t task) { sum(task); });
    parallel_for(s_.items, threads, [&](int64_t item) { finish_sums(item); });
    parallel_for(tasks, threads, [&](int64_t task) { apply(task); });
  }

 private:
  // Of a group: its mean, 1 / deviation, and the two means of w du and w du xhat.
  static constexpr int kGroupNumbers = 4;

  static GroupNormSiluArgs norm_of(const GroupNormSiluBackwardArgs& a) {
    GroupNormSiluArgs norm{};
    norm.x = a.x;
    norm.images = a.images;
    norm.rows = a.rows;
    norm.channels = a.channels;
    norm.groups = a.groups;
    norm.num_frames = a.num_frames;
    norm.eps = a.eps;
    return norm;
  }

  void measure(int64_t task) {
    const int64_t item = task / s_.chunks, row = task % s_.chunks * s_.chunk_rows;
    const int64_t rows = std::min(s_.chunk_rows, s_.item_rows - row);
    const T* x = static_cast<const T*>(a_.x) + (item * s_.item_rows + row) * a_.channels;
    chunk_moments(x, rows, a_.channels, a_.channels,
                  moments_.data() + task * kMoments * a_.channels);
  }

  float* group_of(int64_t item) { return groups_.data() + item * kGroupNumbers * a_.groups; }

  void finish_statistics(int64_t item) {
    float* group = group_of(item);
    group_statistics(norm_, s_, moments_.data() + item * s_.chunks * kMoments * a_.channels, group,
                     group + a_.groups);
  }

  // w = weight (1 + scale) of a channel of an image.
  float gain(int64_t image, int64_t c) const {
    const float w = a_.weight ? a_.weight[c] : 1.0f;
    return a_.scale ? w * (1.0f + a_.scale[image * a_.channels + c]) : w;
  }

  // The terms of an image's channels, in memory of 5 channels numbers.
  Terms terms(int64_t image, std::vector<float>& memory) {
    const int64_t channels = a_.channels, width = channels / a_.groups;
    memory.resize(5 * channels);
    float* at = memory.data();
    const float* group = group_of(image / a_.num_frames);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t g = c / width;
      const float inverse = group[a_.groups + g], b = a_.bias ? a_.bias[c] : 0.0f;
      at[c] = group[g];
      at[channels + c] = gain(image, c) * inverse;
      at[2 * channels + c] =
          a_.scale ? b * (1.0f + a_.scale[image * channels + c]) + a_.shift[image * channels + c]
                   : b;
      at[3 * channels + c] = inverse * group[2 * a_.groups + g];
      at[4 * channels + c] = inverse * inverse * group[3 * a_.groups + g];
    }
    return {at, at + channels, at + 2 * channels, at + 3 * channels, at + 4 * channels};
  }

  struct Part {
    int64_t image, rows, at;  // at: of its first number
  };

  Part part(int64_t task) const {
    const int64_t image = task / chunks_, row = task % chunks_ * chunk_rows_;
    return {image, std::min(chunk_rows_, a_.rows - row), (image * a_.rows + row) * a_.channels};
  }

  void sum(int64_t task) {
    static thread_local std::vector<float> memory;
    const Part p = part(task);
    const Terms k = terms(p.image, memory);
    const T *grad = static_cast<const T*>(a_.grad) + p.at, *x = static_cast<const T*>(a_.x) + p.at;
    float *plain = partial_.data() + task * 2 * a_.channels, *moment = plain + a_.channels;
    const auto columns = [&](auto vectors, int64_t c, int n) {
      constexpr int V = decltype(vectors)::value;
      const Terms here{k.mean + c, k.factor + c, k.shift + c, nullptr, nullptr};
      column_sums<T, V, kSilu>(grad + c, x + c, here, p.rows, a_.channels, n, plain + c,
                               moment + c);
    };
    int64_t c = 0;
    for (; c + 4 * kLanes <= a_.channels; c += 4 * kLanes)
      columns(std::integral_constant<int, 4>(), c, kLanes);
    for_columns(a_.channels - c,
                [&](int64_t at, int n) { columns(std::integral_constant<int, 1>(), c + at, n); });
  }

  // The sums of an item's images, and of its groups what the result takes away.
  void finish_sums(int64_t item) {
    const int64_t channels = a_.channels, width = channels / a_.groups;
    float* group = group_of(item);
    const double count = double(width * s_.item_rows);
    for (int64_t g = 0; g < a_.groups; ++g) {
      const float inverse = group[a_.groups + g];
      double first = 0, second = 0;
      for (int64_t image = item * a_.num_frames; image < (item + 1) * a_.num_frames; ++image)
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          double plain = 0, moment = 0;
          for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            const float* from = partial_.data() + (image * chunks_ + chunk) * 2 * channels;
            plain += from[c];
            moment += from[channels + c];
          }
          moment *= inverse;
          a_.sums[image * channels + c] = float(plain);
          a_.sums[(a_.images + image) * channels + c] = float(moment);
          first += gain(image, c) * plain;
          second += gain(image, c) * moment;
        }
      group[2 * a_.groups + g] = float(first / count);
      group[3 * a_.groups + g] = float(second / count);
    }
  }

  void apply(int64_t task) {
    static thread_local std::vector<float> memory;
    const Part p = part(task);
    const Terms k = terms(p.image, memory);
    const T *grad = static_cast<const T*>(a_.grad) + p.at, *x = static_cast<const T*>(a_.x) + p.at;
    T* out = static_cast<T*>(a_.out) + p.at;
    for (int64_t r = 0; r < p.rows; ++r)
      for_columns(a_.channels, [&](int64_t c, int n) {
        const int64_t at = r * a_.channels + c;
        const F32 centred = load_columns(x + at, n) - load_columns(k.mean + c, n);
        const F32 factor = load_columns(k.factor + c, n);
        const F32 du = grad_before_silu<T, kSilu>(load_columns(grad + at, n), centred, factor,
                                                  load_columns(k.shift + c, n));
        store_columns(
            out + at,
            du * factor - load_columns(k.first + c, n) - centred * load_columns(k.second + c, n),
            n);
      });
  }

  const GroupNormSiluBackwardArgs& a_;
  const GroupNormSiluArgs norm_;
  const GroupNormShape s_;
  int64_t chunk_rows_, chunks_;  // of an image
  std::vector<float> moments_;   // [items, chunks of the item, kMoments, channels]
  std::vector<float> groups_;    // [items, kGroupNumbers, groups]
  std::vector<float> partial_;   // [images, chunks, 2, channels]
};

}  // namespace

void group_norm_silu_backward_cpu(const GroupNormSiluBackwardArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) {
    using T = decltype(kind);
    args.silu ? Backward<T, true>(args).run(threads) : Backward<T, false>(args).run(threads);
  });
}

}  // namespace vf::VF_ISA
