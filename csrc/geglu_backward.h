// The gradient of y = a gelu(b), [a | b] = x[:, :width | width:], of every row
//
//   grad_a = grad gelu(b)      grad_b = grad a gelu'(b)      gelu'(b) = Phi(b) + b phi(b)
//
// grad: [rows, width]; x, out (grad_x): [rows, 2 width]. In fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_GEGLU_BACKWARD_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, grad)                        \
  FIELD(const void*, x)                           \
  FIELD(void*, out)                               \
  FIELD(int64_t, rows)                            \
  FIELD(int64_t, width)                           \
  FIELD(DType, dtype)
VF_ARGS(GegluBackwardArgs, VF_GEGLU_BACKWARD_FIELDS);

}  // namespace vf
