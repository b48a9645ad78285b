// The counter of common/clock.h within a launch: read, and moved on once every block has read it.
#pragma once
#include "common/clock.h"
#include "common/cuda_launch.h"

namespace vf {

// For one thread of every block, which has read the counter: whether it was the last to do so.
// What it has to write then can wait, so that nobody waits for the ticket.
__device__ __forceinline__ bool last_to_read(const Clock& clock) {
  __threadfence();  // the counter is read before the ticket is taken
  const unsigned last = gridDim.x * gridDim.y * gridDim.z - 1;
  return atomicInc(clock.ticket, last) == last;  // which makes it 0 again
}

// For that thread.
__device__ __forceinline__ void move_on(const Clock& clock, int32_t step) {
  *clock.counter = step + 1;
  if (step < -1 || step + 1 >= clock.num_steps) return;
  const int64_t t = clock.timesteps[step + 1];
  for (int64_t sample = 0; sample < clock.samples; ++sample) clock.t[sample] = t;
}

}  // namespace vf
