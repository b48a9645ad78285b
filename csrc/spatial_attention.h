// y_s = sum_t softmax_t(q_s . k_t scale) v_t, of every frame and head
//
// q, y: [frames, q_len, heads, head_dim], k, v: [kv_frames, k_len, heads, head_dim], kv_frames
// dividing frames; strides are those of rows of q, and of k and v, in numbers. scale 0:
// 1 / sqrt(head_dim). Logits, softmax and sums in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

// Of a CPU's attention kernels: 8, 16, ..., 512. Those of a GPU take up to 256.
constexpr int kMaxHeadDim = 512;

#define VF_SPATIAL_ATTENTION_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, q)                              \
  FIELD(const void*, k)                              \
  FIELD(const void*, v)                              \
  FIELD(void*, out)                                  \
  FIELD(int64_t, frames)                             \
  FIELD(int64_t, q_len)                              \
  FIELD(int64_t, k_len)                              \
  FIELD(int64_t, heads)                              \
  FIELD(int64_t, head_dim)                           \
  FIELD(int64_t, q_stride)                           \
  FIELD(int64_t, kv_stride)                          \
  FIELD(int64_t, kv_frames)                          \
  OPTIONAL(float, scale)                             \
  FIELD(DType, dtype)
VF_ARGS(SpatialAttentionArgs, VF_SPATIAL_ATTENTION_FIELDS);

}  // namespace vf
