// The weights of a 3x3 convolution, transformed and packed for csrc/winograd.h (`transformed`).
//
// weights: fp32 [rows, 3, 3, channels], the taps of a result beside each other; out: 16 times
// packed_words(columns, depth) words. Of the convolution itself columns = rows and depth =
// channels. `transposed`: of the one that takes gradients of its results to those of its pixels,
// whose taps run backwards, with columns = channels and depth = rows.
#pragma once
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"

namespace vf {

#define VF_WINOGRAD_WEIGHTS_FIELDS(FIELD, OPTIONAL) \
  FIELD(const float*, weights)                      \
  FIELD(void*, out)                                 \
  FIELD(int64_t, rows)                              \
  FIELD(int64_t, channels)                          \
  FIELD(bool, transposed)                           \
  FIELD(DType, dtype)
VF_ARGS(WinogradWeightsArgs, VF_WINOGRAD_WEIGHTS_FIELDS);

}  // namespace vf
