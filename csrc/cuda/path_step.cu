// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)      g = d_p - c1 d_t
// u_m <- d_p
//
// The rule of path_step.h, run over a clip by cuda/frames.cuh.
#include "cuda/frames.cuh"
#include "path_step.h"

namespace vf {

void path_step_cuda(const PathStepArgs& args, int device, void* stream) {
  run_frames<PathStep>(args.clip, device, stream, args.path, args.clock);
}

}  // namespace vf
