"""The counter of a sampling loop within a launch                             csrc/cuda/clock.cuh"""

import triton
import triton.language as tl


@triton.jit
def move_on(counter_ptr, ticket_ptr, timesteps_ptr, t_ptr, step, num_steps, samples):
    """Count the step that this launch has read, once every program has read it; a program's end."""
    tl.debug_barrier()  # all threads have read the counter before one takes the ticket
    last = tl.num_programs(0) * tl.num_programs(1) - 1
    if tl.atomic_add(ticket_ptr, 1) == last:
        tl.store(ticket_ptr, 0)
        tl.store(counter_ptr, step + 1)
        there = (step >= -1) & (step + 1 < num_steps)
        t = tl.load(timesteps_ptr + step + 1, mask=there, other=0)
        for sample in range(samples):
            tl.store(t_ptr + sample, t, mask=there)
