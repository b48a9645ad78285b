// y = x[:, :width] gelu(x[:, width:]) of every row
//
// x: [rows, 2 width], y: [rows, width]. The exact gelu, in fp32.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_GEGLU_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                  \
  FIELD(void*, out)                      \
  FIELD(int64_t, rows)                   \
  FIELD(int64_t, width)                  \
  FIELD(DType, dtype)
VF_ARGS(GegluArgs, VF_GEGLU_FIELDS);

}  // namespace vf
