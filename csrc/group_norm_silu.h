// y = SiLU(((x - mu) / sqrt(var + eps) weight + bias) (1 + scale) + shift) + residual
//
// x, residual, y: [B, P, C], rows of pixels (channels_last); weight, bias: [C]; scale, shift: [B,
// C]. mu, var: of the C / G channels of a group at the P pixels of num_frames consecutive images,
// from centred squares in fp32.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace vf {

struct GroupNormSiluArgs {
  const void* x;
  const float* weight;  // null: 1
  const float* bias;    // null: 0
  const float* scale;   // null, with shift: 0
  const float* shift;
  const void* residual;  // null: none
  void* out;             // overlaps no input
  int64_t images, rows, channels, groups, num_frames;
  float eps;
  bool silu;
  DType dtype;  // of x, residual and out
  // CUDA alone: fp32 scratch and the rows of one chunk (vfengine/ops/group_norm_silu.py).
  float* workspace = nullptr;
  int64_t chunk_rows = 0;
};

void group_norm_silu_cuda(const GroupNormSiluArgs& args, int device, void* stream);

}  // namespace vf
