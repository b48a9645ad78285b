// The counter of common/clock.h within a launch: read, and moved on once every block has read it.
#pragma once
#include "common/clock.h"
#include "common/cuda_launch.h"

namespace vf {

// For one thread of every block, behind a barrier to which it has brought the counter: whether it
// was the last to do so. The value has come by then, so a device needs no fence before the ticket;
// the sanitizers, who look at one thread at a time, do. What is to be written can wait until the
// block ends, so that nobody waits for the ticket.
__device__ __forceinline__ bool last_to_read(const Clock& clock) {
#if !defined(__CUDA_ARCH__)
  __threadfence();
#endif
  const unsigned last = gridDim.x * gridDim.y * gridDim.z - 1;
  return atomicInc(clock.ticket, last) == last;  // which makes it 0 again
}

// For that thread.
__device__ __forceinline__ void move_on(const Clock& clock, int32_t step) {
  *clock.counter = step + 1;
  if (step < -1 || step + 1 >= clock.num_steps) return;
  const int64_t t = clock.timesteps[step + 1];
#pragma unroll 1
  for (int64_t sample = 0; sample < clock.samples; ++sample) clock.t[sample] = t;
}

}  // namespace vf
