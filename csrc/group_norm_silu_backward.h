// The gradient of y = SiLU(u), u = (xhat weight + bias) (1 + scale) + shift, xhat = (x - mu) / dev
//
//   du = grad SiLU'(u)      SiLU'(u) = s (1 + u (1 - s)), s = 1 / (1 + e^-u)
//   grad_x = (w du - mean(w du) - xhat mean(w du xhat)) / dev      w = weight (1 + scale)
//
// dev = sqrt(var + eps); the means are those of a group, as mu and var are (group_norm_silu.h).
// sums: [2, images, channels], of du, and of du xhat, at an image's pixels: what the gradients of
// weight, bias, scale and shift are made of. grad, x, grad_x: [images, rows, channels]; scale,
// shift: [images, channels], both or neither. Without silu, du = grad.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_GROUP_NORM_SILU_BACKWARD_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, grad)                                  \
  FIELD(const void*, x)                                     \
  OPTIONAL(const float*, weight)                            \
  OPTIONAL(const float*, bias)                              \
  OPTIONAL(const float*, scale)                             \
  OPTIONAL(const float*, shift)                             \
  FIELD(void*, out)                                         \
  FIELD(float*, sums)                                       \
  FIELD(int64_t, images)                                    \
  FIELD(int64_t, rows)                                      \
  FIELD(int64_t, channels)                                  \
  FIELD(int64_t, groups)                                    \
  FIELD(int64_t, num_frames)                                \
  FIELD(float, eps)                                         \
  FIELD(bool, silu)                                         \
  FIELD(DType, dtype)
VF_ARGS(GroupNormSiluBackwardArgs, VF_GROUP_NORM_SILU_BACKWARD_FIELDS);

}  // namespace vf
