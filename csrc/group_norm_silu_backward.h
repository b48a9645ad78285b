// The way back of group_norm_silu: y = SiLU(z), z = x^ w + b, with x^ = (x - mu) / sqrt(var + eps),
// w = weight (1 + scale), b = bias (1 + scale) + shift
//
//     dz      = dy SiLU'(z) = dy s (1 + z (1 - s)), s = 1 / (1 + e^-z); dy without silu
//     sums    = sum of dz, sum of dz x^, over the pixels of an image
//     dx      = (dz w - mean of dz w - x^ mean of dz w x^) / sqrt(var + eps), means over a group
//
// forward: what group_norm_silu was given, of num_frames 1 and without x2; its out is not read. dy,
// dx: as x.
// sums: fp32 [images, 2, channels], of which the gradients of all tables are made.
#pragma once
#include "group_norm_silu.h"

namespace vf {

#define VF_GROUP_NORM_SILU_BACKWARD_FIELDS(FIELD, OPTIONAL) \
  FIELD(GroupNormSiluArgs, forward)                         \
  FIELD(const void*, dy)                                    \
  FIELD(void*, dx)                                          \
  FIELD(float*, sums)
VF_ARGS(GroupNormSiluBackwardArgs, VF_GROUP_NORM_SILU_BACKWARD_FIELDS);

}  // namespace vf
