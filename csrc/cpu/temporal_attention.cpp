// y_n = sum_m softmax_m(q_n . k_m scale + bias_nm) v_m, of every pixel and head
//
// A task is a few pixels; cpu/attention.h has the arithmetic.
#include "temporal_attention.h"

#include "cpu/attention.h"
#include "cpu/base/parallel.h"

namespace vf::VF_ISA {

template <class T>
static void temporal_attention(const TemporalAttentionArgs& a, int64_t threads) {
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
    h.q_stride = width;
    h.out_stride = a.pixels * channels;
    h.q_len = h.k_len = n;
    h.head_dim = int(a.head_dim);
    h.scale = logit_scale(a.scale, a.head_dim);
    h.bias_stride = bias_stride(n);
    const AttentionScope<T> scope;
    for (int64_t pixel = task % blocks * kPixels; pixel < last; ++pixel) {
      const int64_t row = b * n * a.pixels + pixel;
      for (int frame = 0; frame < n; ++frame)
        std::memcpy(gathered.data() + frame * width,
                    static_cast<const T*>(a.qkv) + (row + frame * a.pixels) * width,
                    width * sizeof(T));
      for (int64_t head = 0; head < a.heads; ++head) {
        h.q = gathered.data() + head * a.head_dim;
        h.out = static_cast<T*>(a.out) + row * channels + head * a.head_dim;
        if (a.bias) h.bias = bias.data() + head * n * bias_stride(n);
        set_keys(h, h.q + channels, h.q + 2 * channels, width);
        attend_rows(h, 0, n);
      }
    }
  });
}

void temporal_attention_cpu(const TemporalAttentionArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { temporal_attention<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
