// y_n = sum_m softmax_m(q_n . k_m / sqrt(D) + bias_nm) v_m, of every pixel and head
//
// qkv: [B, N, P, 3 H D], q, k and v in that order, heads contiguous inside; bias: [H, N, N];
// y: [B, N, P, H D]. Logits, softmax and sums in fp32.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace vf {

struct TemporalAttentionArgs {
  const void* qkv;
  const float* bias;  // null: none
  void* out;
  int64_t batch, frames, pixels, heads, head_dim;  // 1 to 128 frames; head_dim 8, 16, ..., 256
  DType dtype;                                     // of qkv and out
};

void temporal_attention_cuda(const TemporalAttentionArgs& args, int device, void* stream);

}  // namespace vf
