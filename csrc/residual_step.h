// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)
//
// The two-phase step of all frames (vfengine/sampling/api.py; VideoFusion, Algorithm 2), as a rule
// of common/frames.h: x = u, a row of coeffs is (c1, c2, sigma).
#pragma once
#include "common/frames.h"

namespace vf {

struct ResidualStep {
  static constexpr const char* kName = "residual_step";
  static constexpr int kColumns = 3;
  static constexpr bool kResidual = true, kGuidance = true, kBaseNoise = false, kPath = false;

  static VF_HOST_DEVICE float sigma(const float* row) { return row[2]; }
  static VF_HOST_DEVICE FrameWeights weights(const float* row, float lam) {
    const float own = sqrtf(1.0f - lam);
    return {row[0], sqrtf(lam), 0.0f, own * row[1], own * row[2]};
  }
};

}  // namespace vf
