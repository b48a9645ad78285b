// y_n = sum_m softmax_m(q_n . k_m scale + bias_nm) v_m, of every pixel and head
//
// qkv: [batch, frames, pixels, 3, heads, head_dim], q, k and v in that order; bias: [heads, frames,
// frames] or null; y: [batch, frames, pixels, heads, head_dim]; 1 to 128 frames. scale 0:
// 1 / sqrt(head_dim). Logits, softmax and sums in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_TEMPORAL_ATTENTION_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, qkv)                             \
  OPTIONAL(const float*, bias)                        \
  FIELD(void*, out)                                   \
  FIELD(int64_t, batch)                               \
  FIELD(int64_t, frames)                              \
  FIELD(int64_t, pixels)                              \
  FIELD(int64_t, heads)                               \
  FIELD(int64_t, head_dim)                            \
  OPTIONAL(float, scale)                              \
  FIELD(DType, dtype)
VF_ARGS(TemporalAttentionArgs, VF_TEMPORAL_ATTENTION_FIELDS);

}  // namespace vf
