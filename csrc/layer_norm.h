// y = (x - mu) / sqrt(var + eps) weight + bias of every row
//
// x, y: [rows, channels]; weight, bias: [channels] or null, for 1 and 0. Statistics in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_LAYER_NORM_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                       \
  OPTIONAL(const float*, weight)              \
  OPTIONAL(const float*, bias)                \
  FIELD(void*, out)                           \
  FIELD(int64_t, rows)                        \
  FIELD(int64_t, channels)                    \
  FIELD(float, eps)                           \
  FIELD(DType, dtype)
VF_ARGS(LayerNormArgs, VF_LAYER_NORM_FIELDS);

}  // namespace vf
