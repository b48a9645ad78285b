// A whole transformer of one block, + x: group norm (as coefficients), proj_in, one or two
// attentions, a gated feed-forward layer, proj_out
//
// x, out: [batch, frames, pixels, channels] in fp32 or bf16; all weights are of pack_weights.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

// columns, depth: of the result, of a row that it takes.
#define VF_LINEAR_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, weights)             \
  OPTIONAL(const float*, bias)            \
  FIELD(int64_t, columns)                 \
  FIELD(int64_t, depth)
VF_ARGS(Linear, VF_LINEAR_FIELDS);

#define VF_LAYER_NORM_WEIGHTS_FIELDS(FIELD, OPTIONAL) \
  FIELD(const float*, weight)                         \
  FIELD(const float*, bias)                           \
  FIELD(float, eps)
VF_ARGS(LayerNormWeights, VF_LAYER_NORM_WEIGHTS_FIELDS);

// proj_in: to q, k and v, or to q alone where there is a context; kv: the context's [batch, kv_len,
// 2, heads, head_dim], or null; bias: [heads, frames, frames], or null.
#define VF_TRANSFORMER_ATTENTION_FIELDS(FIELD, OPTIONAL) \
  FIELD(LayerNormWeights, norm)                          \
  FIELD(Linear, proj_in)                                 \
  FIELD(Linear, proj_out)                                \
  OPTIONAL(const void*, kv)                              \
  OPTIONAL(int64_t, kv_len)                              \
  OPTIONAL(const float*, bias)
VF_ARGS(TransformerAttention, VF_TRANSFORMER_ATTENTION_FIELDS);
using TransformerAttentions = List<TransformerAttention, 2>;

// The feed-forward layer; without `out` its last product is multiplied into the proj_out that
// follows.
#define VF_FEED_FORWARD_FIELDS(FIELD, OPTIONAL) \
  FIELD(LayerNormWeights, norm)                 \
  FIELD(Linear, gate)                           \
  OPTIONAL(Linear, out)
VF_ARGS(FeedForward, VF_FEED_FORWARD_FIELDS);

// coefficients: of the group norm (group_norm_silu.h); h, qkv: room for all rows, for attention in
// space alone; time: attention among the frames of a pixel, else among the pixels of a frame.
#define VF_TRANSFORMER_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                        \
  FIELD(const float*, coefficients)            \
  OPTIONAL(void*, h)                           \
  OPTIONAL(void*, qkv)                         \
  FIELD(void*, out)                            \
  FIELD(int64_t, batch)                        \
  FIELD(int64_t, frames)                       \
  FIELD(int64_t, pixels)                       \
  FIELD(int64_t, channels)                     \
  FIELD(int64_t, inner)                        \
  FIELD(int64_t, heads)                        \
  FIELD(int64_t, head_dim)                     \
  FIELD(float, scale)                          \
  FIELD(bool, time)                            \
  FIELD(Linear, proj_in)                       \
  FIELD(TransformerAttentions, attentions)     \
  OPTIONAL(FeedForward, feed_forward)          \
  FIELD(Linear, proj_out)                      \
  FIELD(DType, dtype)
VF_ARGS(TransformerArgs, VF_TRANSFORMER_FIELDS);

}  // namespace vf
