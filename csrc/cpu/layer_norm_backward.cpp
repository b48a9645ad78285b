// The gradients of a layer norm of rows: see layer_norm_backward.h.
//
// A task is a chunk of rows, whose size depends on the shape alone; it leaves its part of the sums
// over rows, which a second walk adds up in the order of the chunks.
#include "layer_norm_backward.h"

#include "cpu/base/parallel.h"
#include "cpu/norm.h"
#include "cpu/partial_sums.h"

namespace vf::VF_ISA {

// out of R rows; what they add to the tables is added to `tables` [2, channels].
template <class T, int R>
static inline void layer_norm_backward_block(const T* grad, const T* x, const float* weight, T* out,
                                             float* tables, int64_t channels, float eps) {
  float mean[R], inverse[R], plain[R], moment[R];
  layer_norm_statistics(x, channels, eps, mean, inverse);
  const auto normalised = [&](int r, int64_t c, int n) {
    return (load_columns(x + r * channels + c, n) - mean[r]) * inverse[r];
  };
  F32 sums[2 * R] = {};
  sum_columns(channels, sums, [&](int64_t c, int n, F32(&run)[2 * R]) {
    const F32 w = weight ? load_columns(weight + c, n) : splat(1.0f);
    F32 of_weight = load_columns(tables + c, n), of_bias = load_columns(tables + channels + c, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {  // the gradient is 0 in lanes beyond the end
      const F32 g = load_columns(grad + r * channels + c, n), xhat = normalised(r, c, n);
      of_weight += g * xhat;
      of_bias += g;
      run[r] += g * w;
      run[R + r] += g * w * xhat;
    }
    store_columns(tables + c, of_weight, n);
    store_columns(tables + channels + c, of_bias, n);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    plain[r] = sum_of(sums[r]) / float(channels);
    moment[r] = sum_of(sums[R + r]) / float(channels);
  }
  for_columns(channels, [&](int64_t c, int n) {
    const F32 w = weight ? load_columns(weight + c, n) : splat(1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F32 g = load_columns(grad + r * channels + c, n) * w;
      store_columns(out + r * channels + c,
                    (g - plain[r] - normalised(r, c, n) * moment[r]) * inverse[r], n);
    }
  });
}

template <class T>
static void layer_norm_backward(const LayerNormBackwardArgs& a, int64_t threads) {
  const T *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const int64_t block = std::clamp<int64_t>(16384 / a.channels, 2 * kNormRows, 128);
  const int64_t chunks = (a.rows + block - 1) / block, size = 2 * a.channels;
  std::vector<float> partial(chunks * size);
  parallel_for(chunks, threads, [&](int64_t task) {
    const int64_t last = std::min(a.rows, (task + 1) * block);
    float* tables = partial.data() + task * size;
    const auto rows = [&](auto count, int64_t r) {
      layer_norm_backward_block<T, decltype(count)::value>(
          grad + r * a.channels, x + r * a.channels, a.weight, out + r * a.channels, tables,
          a.channels, a.eps);
    };
    int64_t r = task * block;
    for (; r + kNormRows <= last; r += kNormRows) rows(std::integral_constant<int, kNormRows>(), r);
    for (; r < last; ++r) rows(std::integral_constant<int, 1>(), r);
  });
  sum_partial(partial.data(), chunks, size, a.tables, threads);
}

void layer_norm_backward_cpu(const LayerNormBackwardArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { layer_norm_backward<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
