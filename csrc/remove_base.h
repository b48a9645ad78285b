// z'_i <- z_i - sqrt(lam_i) sqrt(1 - alphas_cumprod_t) b
//
// The residual network's input (VideoFusion, Algorithm 2), as a rule of common/frames.h: x = z,
// g = b, a row of coeffs is (sqrt(1 - alphas_cumprod_t)). One read and one write of the clip.
#pragma once
#include "common/frames.h"

namespace vf {

struct RemoveBase {
  static constexpr const char* kName = "remove_base";
  static constexpr int kColumns = 1;
  static constexpr bool kResidual = false, kGuidance = false, kBaseNoise = false, kPath = false;

  static VF_HOST_DEVICE float sigma(const float*) { return 0.0f; }
  static VF_HOST_DEVICE FrameWeights weights(const float* row, float lam) {
    return {1.0f, -(sqrtf(lam) * row[0]), 0.0f, 0.0f, 0.0f};
  }
};

}  // namespace vf
