// spatial_attention and temporal_attention (network.h), a task a few blocks of queries of one head.
#include <vector>

#include "cpu/attention.h"
#include "cpu/parallel.h"
#include "network.h"

namespace vf::VF_ISA {

// v is packed once per task: its share falls with the queries of a task.
constexpr int kTaskQueries = 256;

template <class T>
static void spatial_attention(const RowSpatialAttentionArgs& a, int64_t threads) {
  const int64_t parts = (a.q_len + kTaskQueries - 1) / kTaskQueries;
  const int64_t shared = a.frames / a.kv_frames;
  parallel_for(a.frames * a.heads * parts, threads, [&](int64_t task) {
    const int64_t frame = task / (a.heads * parts), head = task / parts % a.heads;
    const int64_t column = head * a.head_dim, keys = frame / shared * a.k_len * a.kv_stride;
    Head<T> h{};
    h.q = static_cast<const T*>(a.q) + frame * a.q_len * a.q_stride + column;
    h.k = static_cast<const T*>(a.k) + keys + column;
    h.out = static_cast<T*>(a.out) + frame * a.q_len * a.out_stride + column;
    h.q_stride = a.q_stride;
    h.k_stride = a.kv_stride;
    h.out_stride = a.out_stride;
    h.q_len = int(a.q_len);
    h.k_len = int(a.k_len);
    h.head_dim = int(a.head_dim);
    h.scale = a.scale;
    set_values(h, static_cast<const T*>(a.v) + keys + column, a.kv_stride,
               values_scratch((a.k_len + 1) / 2 * a.head_dim));
    const int first = int(task % parts) * kTaskQueries;
    attend_rows(h, first, std::min(first + kTaskQueries, h.q_len));
  });
}

template <class T>
static void temporal_attention(const RowTemporalAttentionArgs& a, int64_t threads) {
  const int n = int(a.frames);
  const int64_t channels = a.heads * a.head_dim;
  std::vector<float> bias(a.bias ? a.heads * n * bias_stride(n) : 0);
  for (int64_t head = 0; a.bias && head < a.heads; ++head)
    transposed_bias<T>(a.bias + head * n * n, n, n, bias.data() + head * n * bias_stride(n));

  // A pixel's rows are copied together first: frames often lie a multiple of the cache's ways
  // apart.
  constexpr int64_t kPixels = 8;
  const int64_t blocks = (a.pixels + kPixels - 1) / kPixels, width = 3 * channels;
  parallel_for(a.batch * blocks, threads, [&](int64_t task) {
    const int64_t b = task / blocks, last = std::min(a.pixels, (task % blocks + 1) * kPixels);
    static thread_local std::vector<T> gathered;
    if (int64_t(gathered.size()) < n * width) gathered.resize(n * width);
    Head<T> h{};
    h.q_stride = h.k_stride = width;
    h.out_stride = a.pixels * channels;
    h.q_len = h.k_len = n;
    h.head_dim = int(a.head_dim);
    h.scale = a.scale;
    h.bias_stride = bias_stride(n);
    uint32_t* values = values_scratch((n + 1) / 2 * a.head_dim);
    for (int64_t pixel = task % blocks * kPixels; pixel < last; ++pixel) {
      const int64_t row = b * n * a.pixels + pixel;
      for (int frame = 0; frame < n; ++frame)
        std::memcpy(gathered.data() + frame * width,
                    static_cast<const T*>(a.qkv) + (row + frame * a.pixels) * width,
                    width * sizeof(T));
      for (int64_t head = 0; head < a.heads; ++head) {
        h.q = gathered.data() + head * a.head_dim;
        h.k = h.q + channels;
        h.out = static_cast<T*>(a.out) + row * channels + head * a.head_dim;
        if (a.bias) h.bias = bias.data() + head * n * bias_stride(n);
        set_values(h, h.k + channels, width, values);
        attend_rows(h, 0, n);
      }
    }
  });
}

void spatial_attention_cpu(const RowSpatialAttentionArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { spatial_attention<decltype(kind)>(args, threads); });
}

void temporal_attention_cpu(const RowTemporalAttentionArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { temporal_attention<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
