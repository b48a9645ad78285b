// y = SiLU(((x - mu) / sqrt(var + eps) weight + bias) (1 + scale) + shift)
//
// Rows are read twice, once for the statistics: an item that fits a core's cache is treated whole
// by one thread, so that the second time comes from there. cpu/norm.h has the arithmetic.
#include "group_norm_silu.h"

#include "cpu/base/parallel.h"
#include "cpu/norm.h"

namespace vf::VF_ISA {

// Of fp32 numbers: [items, chunks, kMoments, channels] and [items, 2, groups].
static int64_t workspace_size(const GroupNormSiluArgs& a) {
  const GroupNormShape s(a);
  return s.items * (s.chunks * kMoments * s.channels + 2 * a.groups);
}

template <class T>
static void group_norm_silu(const GroupNormSiluArgs& a, int64_t threads) {
  const GroupNormShape s(a);
  const T *x = static_cast<const T*>(a.x), *x2 = static_cast<const T*>(a.x2);
  T* out = static_cast<T*>(a.out);
  const int64_t size = kMoments * s.channels;  // of a chunk's moments
  std::vector<float> own(a.workspace ? 0 : workspace_size(a));
  float* const moments = a.workspace ? a.workspace : own.data();
  float* const groups = moments + s.items * s.chunks * size;
  const auto sum = [&](int64_t item, int64_t chunk) {
    const int64_t row = chunk * s.chunk_rows, rows = std::min(s.chunk_rows, s.item_rows - row);
    const int64_t at = item * s.item_rows + row;
    float* to = moments + (item * s.chunks + chunk) * size;
    chunk_moments(x + at * a.channels, rows, a.channels, s.channels, to);
    if (x2) chunk_moments(x2 + at * a.channels2, rows, a.channels2, s.channels, to + a.channels);
  };
  const auto finish = [&](int64_t item) {
    float* to = groups + item * a.groups * 2;
    group_statistics(a, s, moments + item * s.chunks * size, to, to + a.groups);
  };
  const auto apply = [&](int64_t item, int64_t chunk) {
    std::vector<float> memory(3 * s.channels);
    const float* group = groups + item * a.groups * 2;
    const int64_t last = std::min((chunk + 1) * s.chunk_rows, s.item_rows);
    for (int64_t row = chunk * s.chunk_rows; row < last;) {
      const int64_t image = row / a.rows, rows = std::min(last, (image + 1) * a.rows) - row;
      const Coefficients k = group_coefficients<T>(a, s, item * a.num_frames + image, group,
                                                   group + a.groups, memory.data());
      const int64_t at = item * s.item_rows + row;
      const auto part = [&](const T* from, int64_t channels, int64_t c) {
        const auto scaled = a.silu ? scale_rows<T, true> : scale_rows<T, false>;
        scaled(from + at * channels, k.from(c), out + at * s.channels + c, rows, channels,
               s.channels);
      };
      part(x, a.channels, 0);
      if (x2) part(x2, a.channels2, a.channels);
      row += rows;
    }
  };

  const int64_t tasks = s.items * s.chunks;
  if (a.coefficients) {
    parallel_for(tasks, threads, [&](int64_t task) { sum(task / s.chunks, task % s.chunks); });
    parallel_for(s.items, threads, [&](int64_t item) {
      finish(item);
      const float* group = groups + item * a.groups * 2;
      for (int64_t image = item * a.num_frames; image < (item + 1) * a.num_frames; ++image) {
        group_coefficients<T>(a, s, image, group, group + a.groups,
                              a.coefficients + image * 3 * s.channels);
      }
    });
    return;
  }
  if (s.item_rows * s.channels * sizeof(T) <= 512 * 1024 && s.items >= 2 * threads) {
    parallel_for(s.items, threads, [&](int64_t item) {
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) sum(item, chunk);
      finish(item);
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) apply(item, chunk);
    });
    return;
  }
  parallel_for(tasks, threads, [&](int64_t task) { sum(task / s.chunks, task % s.chunks); });
  parallel_for(s.items, threads, finish);
  parallel_for(tasks, threads, [&](int64_t task) { apply(task / s.chunks, task % s.chunks); });
}

void group_norm_silu_cpu(const GroupNormSiluArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { group_norm_silu<decltype(kind)>(args, threads); });
}

int64_t group_norm_workspace(const GroupNormSiluArgs& args) { return workspace_size(args); }

}  // namespace vf::VF_ISA
