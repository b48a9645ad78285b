// Which step is the next: a counter on the device, moved on by the launch that takes the step.
#pragma once
#include <cstdint>

#include "common/args.h"

namespace vf {

// counter: [1], steps done. ticket: [1], 0 between launches. timesteps: [num_steps]. t: [samples],
// every one timesteps[*counter]; the last step leaves it as it is.
#define VF_CLOCK_FIELDS(FIELD, OPTIONAL) \
  FIELD(int32_t*, counter)               \
  FIELD(uint32_t*, ticket)               \
  FIELD(const int64_t*, timesteps)       \
  FIELD(int64_t*, t)                     \
  FIELD(int64_t, num_steps)              \
  FIELD(int64_t, samples)
VF_ARGS(Clock, VF_CLOCK_FIELDS);

}  // namespace vf
