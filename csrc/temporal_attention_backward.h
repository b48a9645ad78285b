// The gradients of y = P v, P = softmax(q k^T scale + bias), of every pixel and head
//
//   grad_v = P^T grad      S = P (grad v^T - sum_m(P grad v^T))      grad_bias = sum(S)
//   grad_q = S k scale     grad_k = S^T q scale
//
// grad: [batch, frames, pixels, heads, head_dim]; qkv, out (grad_qkv): [batch, frames, pixels, 3,
// heads, head_dim]; bias, grad_bias (a sum over pixels and clips): [heads, frames, frames], both or
// neither; 1 to 128 frames; scale = 1 / sqrt(head_dim). Everything in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_TEMPORAL_ATTENTION_BACKWARD_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, grad)                                     \
  FIELD(const void*, qkv)                                      \
  OPTIONAL(const float*, bias)                                 \
  FIELD(void*, out)                                            \
  OPTIONAL(float*, grad_bias)                                  \
  FIELD(int64_t, batch)                                        \
  FIELD(int64_t, frames)                                       \
  FIELD(int64_t, pixels)                                       \
  FIELD(int64_t, heads)                                        \
  FIELD(int64_t, head_dim)                                     \
  FIELD(DType, dtype)
VF_ARGS(TemporalAttentionBackwardArgs, VF_TEMPORAL_ATTENTION_BACKWARD_FIELDS);

}  // namespace vf
