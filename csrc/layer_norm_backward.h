// The gradients of y = xhat weight + bias, xhat = (x - mu) / dev, dev = sqrt(var + eps), of every
// row
//
//   grad_x = (w - mean(w) - xhat mean(w xhat)) / dev      w = grad weight, means over a row
//   grad_weight = sum(grad xhat), grad_bias = sum(grad)   sums over all rows
//
// grad, x, out (grad_x): [rows, channels]; weight: [channels] or null, for 1; tables: [2,
// channels], grad_weight and grad_bias. Everything in fp32; the tables are sums of chunks of rows.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_LAYER_NORM_BACKWARD_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, grad)                             \
  FIELD(const void*, x)                                \
  OPTIONAL(const float*, weight)                       \
  FIELD(void*, out)                                    \
  FIELD(float*, tables)                                \
  FIELD(int64_t, rows)                                 \
  FIELD(int64_t, channels)                             \
  FIELD(float, eps)                                    \
  FIELD(DType, dtype)
VF_ARGS(LayerNormBackwardArgs, VF_LAYER_NORM_BACKWARD_FIELDS);

}  // namespace vf
