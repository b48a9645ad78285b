// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)
//
// The rule of residual_step.h, run over a clip by cuda/frames.cuh.
#include "cuda/frames.cuh"
#include "residual_step.h"

namespace vf {

void residual_step_cuda(const FrameArgs& args, int device, void* stream) {
  run_frames<ResidualStep>(args, device, stream);
}

}  // namespace vf
