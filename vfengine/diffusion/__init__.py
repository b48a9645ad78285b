"""The mathematics of decomposed diffusion: noise, schedule, solvers, base paths."""
