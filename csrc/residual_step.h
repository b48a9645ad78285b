// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)
//
// The two-phase step of all frames (vfengine/sampling.py; VideoFusion, Algorithm 2), and what
// the CPU and the CUDA kernel share: the arguments and the arithmetic of one element.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

#if defined(__CUDACC__)
#define VF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VF_HOST_DEVICE inline
#endif

namespace vf {

struct ResidualStepArgs {
  const void* u;         // [B, N, P], P = C*H*W
  const void* r;         // [B, N, P]
  const void* r_uncond;  // [B, N, P] or null
  const void* xi;        // [B, N, P] or null; read only where sigma > 0
  const void* g;         // [B, P], shared by the N frames
  const float* lam;      // [N]
  const float* coeffs;   // [T, 3] = (c1, c2, sigma)
  const int32_t* step;   // [1], row of coeffs
  void* out;             // [B, N, P]; u itself, or memory that overlaps no input
  int64_t batch, frames, pixels, num_steps;
  float guidance_scale;
  DType dtype;  // of u, r, r_uncond, xi, g and out
};

// The factors of one frame at one step: out = u c1 + g from_base + r from_residual + xi from_noise.
struct ResidualStepFrame {
  float c1, from_base, from_residual, from_noise;
};

VF_HOST_DEVICE ResidualStepFrame residual_step_frame(const float* coeffs, float lam) {
  const float residual = sqrtf(1.0f - lam);
  return {coeffs[0], sqrtf(lam), residual * coeffs[1], residual * coeffs[2]};
}

// V: float, or a vector of floats.
template <class V>
VF_HOST_DEVICE V guided(V r, V r_uncond, float guidance_scale) {
  return r_uncond + guidance_scale * (r - r_uncond);
}

template <class V>
VF_HOST_DEVICE V residual_step(const ResidualStepFrame& frame, V u, V g, V r) {
  return frame.c1 * u + frame.from_base * g + frame.from_residual * r;
}

void residual_step_cuda(const ResidualStepArgs& args, int device, void* stream);

}  // namespace vf
