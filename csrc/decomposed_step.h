// z_i <- c1 z_i + c2 (sqrt(lam_i) b + sqrt(1 - lam_i) r_i)
//        + sigma (sqrt(lam_i) xi_b + sqrt(1 - lam_i) xi_i)
//
// The interleaved step of all frames, base frame included (VideoFusion, Algorithms 1 and 2: combine
// and update), as a rule of common/frames.h: x = z, g = b, a row of coeffs is (c1, c2, sigma).
#pragma once
#include "common/frames.h"

namespace vf {

struct DecomposedStep {
  static constexpr const char* kName = "decomposed_step";
  static constexpr int kColumns = 3;
  static constexpr bool kResidual = true, kGuidance = false, kBaseNoise = true, kPath = false;

  static VF_HOST_DEVICE float sigma(const float* row) { return row[2]; }
  static VF_HOST_DEVICE FrameWeights weights(const float* row, float lam) {
    const float shared = sqrtf(lam), own = sqrtf(1.0f - lam);
    return {row[0], shared * row[1], shared * row[2], own * row[1], own * row[2]};
  }
};

}  // namespace vf
