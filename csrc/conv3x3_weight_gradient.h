// The gradient of the weights of a 3x3 convolution with padding 1 and stride 1, in Winograd's form
// F(2, 3): 16 products for 4 results in place of 36.
//
//   out[o, i, j, c] = sum over pixels (y, x) of grad[y, x, o] x[y + i - 1, x + j - 1, c]
//
// x: [items, height, width, channels], grad: [items, height, width, columns], fp32 or bf16; out:
// fp32 [columns, 3, 3, channels]. Sums in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_CONV3X3_WEIGHT_GRADIENT_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, grad)                                 \
  FIELD(const void*, x)                                    \
  FIELD(float*, out)                                       \
  FIELD(int64_t, items)                                    \
  FIELD(int64_t, height)                                   \
  FIELD(int64_t, width)                                    \
  FIELD(int64_t, channels)                                 \
  FIELD(int64_t, columns)                                  \
  FIELD(DType, dtype)
VF_ARGS(Conv3x3WeightGradientArgs, VF_CONV3X3_WEIGHT_GRADIENT_FIELDS);

}  // namespace vf
