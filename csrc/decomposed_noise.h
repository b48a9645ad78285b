// b or r_i of N(0, I), straight from the counter
//
// Base noise, which all frames share, or each frame's residual noise; common/noise.h has the
// arithmetic and says where a number comes from.
#pragma once
#include "common/args.h"
#include "common/dtype.h"
#include "common/noise.h"

namespace vf {

// out: [batch, frames, pixels], of base noise one frame. dtype `words`: the random 32-bit words.
#define VF_DECOMPOSED_NOISE_FIELDS(FIELD, OPTIONAL) \
  FIELD(void*, out)                                 \
  FIELD(int64_t, batch)                             \
  FIELD(int64_t, frames)                            \
  FIELD(int64_t, pixels)                            \
  FIELD(bool, base)                                 \
  FIELD(PhiloxKey, seed)                            \
  FIELD(uint32_t, step)                             \
  FIELD(uint32_t, sample_offset)                    \
  FIELD(uint32_t, frame_offset)                     \
  FIELD(DType, dtype)
VF_ARGS(DecomposedNoiseArgs, VF_DECOMPOSED_NOISE_FIELDS);

}  // namespace vf
