// z_i <- c1 z_i + c2 (sqrt(lam_i) b + sqrt(1 - lam_i) r_i)
//        + sigma (sqrt(lam_i) xi_b + sqrt(1 - lam_i) xi_i)
//
// The rule of decomposed_step.h, run over a clip by cuda/frames.cuh.
#include "cuda/frames.cuh"
#include "decomposed_step.h"

namespace vf {

void decomposed_step_cuda(const FrameArgs& args, int device, void* stream) {
  run_frames<DecomposedStep>(args, device, stream);
}

}  // namespace vf
