// y = SiLU(((x - mu) / sqrt(var + eps) weight + bias) (1 + scale) + shift)
//
// x: [images, rows, channels], rows of pixels (channels_last), and x2 or null, whose channels2
// channels follow those of x, in y and in everything below; weight, bias: [channels] or null, for 1
// and 0; scale, shift: both or neither, channels of one row for modulation_images images, one
// after another, 0 meaning 1; rows are modulation_stride numbers apart. mu, var: of the channels /
// groups channels of a group at the pixels of num_frames consecutive images, from centred squares
// in fp32. Without silu, SiLU is left out.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

// CPU alone: coefficients, where fp32 [images, 3, channels] are written (cpu/norm.h) and nothing
// else.
// workspace: fp32 scratch for statistics; on a CPU group_norm_workspace() numbers, needed in a
// program (cpu/base/parallel.h) and the kernel's own elsewhere.
// CUDA alone: chunk_rows, the least rows of one chunk (vfengine/ops/group_norm_silu.py).
#define VF_GROUP_NORM_SILU_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                            \
  OPTIONAL(const void*, x2)                        \
  OPTIONAL(const float*, weight)                   \
  OPTIONAL(const float*, bias)                     \
  OPTIONAL(const float*, scale)                    \
  OPTIONAL(const float*, shift)                    \
  OPTIONAL(int64_t, modulation_stride)             \
  OPTIONAL(int64_t, modulation_images)             \
  OPTIONAL(void*, out)                             \
  OPTIONAL(float*, coefficients)                   \
  OPTIONAL(float*, workspace)                      \
  FIELD(int64_t, images)                           \
  FIELD(int64_t, rows)                             \
  FIELD(int64_t, channels)                         \
  OPTIONAL(int64_t, channels2)                     \
  FIELD(int64_t, groups)                           \
  FIELD(int64_t, num_frames)                       \
  OPTIONAL(int64_t, chunk_rows)                    \
  FIELD(float, eps)                                \
  FIELD(bool, silu)                                \
  FIELD(DType, dtype)
VF_ARGS(GroupNormSiluArgs, VF_GROUP_NORM_SILU_FIELDS);

}  // namespace vf
