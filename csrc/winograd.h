// A convolution of 3 (temporal, 1-D) or 3x3 taps with padding 1 and stride 1 in Winograd's form
// F(2, 3) (Lavin and Gray 2016, arXiv 1509.09308): 4 products for 2 results, or 16 for 4, in place
// of 6 and 36.
//
// x, residual and out: [items, height, width, channels or columns]; 1-D runs along height. Rows in
// fp32 or bf16, sums in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

// weights: of pack_weights, [columns, taps * channels], as for a direct product; `transformed`: 4
// or 16 of pack_weights, one after another: transformed taps; bias: as of row_matmul; flat: 1-D.
#define VF_WINOGRAD_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                     \
  FIELD(const void*, weights)               \
  OPTIONAL(const float*, bias)              \
  OPTIONAL(int64_t, bias_rows)              \
  OPTIONAL(int64_t, bias_stride)            \
  OPTIONAL(const void*, residual)           \
  FIELD(void*, out)                         \
  FIELD(int64_t, items)                     \
  FIELD(int64_t, height)                    \
  FIELD(int64_t, width)                     \
  FIELD(int64_t, channels)                  \
  FIELD(int64_t, columns)                   \
  FIELD(bool, flat)                         \
  OPTIONAL(bool, transformed)               \
  FIELD(DType, dtype)
VF_ARGS(WinogradArgs, VF_WINOGRAD_FIELDS);

}  // namespace vf
