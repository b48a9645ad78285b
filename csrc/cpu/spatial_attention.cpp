// y_s = sum_t softmax_t(q_s . k_t scale) v_t, of every frame and head
//
// A task is a few blocks of queries of one head; cpu/attention.h has the arithmetic.
#include "spatial_attention.h"

#include "cpu/attention.h"
#include "cpu/base/parallel.h"

namespace vf::VF_ISA {

// Keys are packed once per task: their share falls with the queries of a task.
constexpr int kTaskQueries = 256;

template <class T>
static void spatial_attention(const SpatialAttentionArgs& a, int64_t threads) {
  const int64_t parts = (a.q_len + kTaskQueries - 1) / kTaskQueries;
  const int64_t shared = a.frames / a.kv_frames, width = a.heads * a.head_dim;
  parallel_for(a.frames * a.heads * parts, threads, [&](int64_t task) {
    const int64_t frame = task / (a.heads * parts), head = task / parts % a.heads;
    const int64_t column = head * a.head_dim, keys = frame / shared * a.k_len * a.kv_stride;
    Head<T> h{};
    h.q = static_cast<const T*>(a.q) + frame * a.q_len * a.q_stride + column;
    h.out = static_cast<T*>(a.out) + frame * a.q_len * width + column;
    h.q_stride = a.q_stride;
    h.out_stride = width;
    h.q_len = int(a.q_len);
    h.k_len = int(a.k_len);
    h.head_dim = int(a.head_dim);
    h.scale = logit_scale(a.scale, a.head_dim);
    set_keys(h, static_cast<const T*>(a.k) + keys + column,
             static_cast<const T*>(a.v) + keys + column, a.kv_stride);
    const AttentionScope<T> scope;
    const int first = int(task % parts) * kTaskQueries;
    attend_rows(h, first, std::min(first + kTaskQueries, h.q_len));
  });
}

void spatial_attention_cpu(const SpatialAttentionArgs& args, int64_t threads) {
  by_dtype(args.dtype, [&](auto kind) { spatial_attention<decltype(kind)>(args, threads); });
}

}  // namespace vf::VF_ISA
