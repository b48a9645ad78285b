// z'_i <- z_i - sqrt(lam_i) sqrt(1 - alphas_cumprod_t) b
//
// The rule of remove_base.h, run over a clip by cuda/frames.cuh.
#include "cuda/frames.cuh"
#include "remove_base.h"

namespace vf {

void remove_base_cuda(const FrameArgs& args, int device, void* stream) {
  run_frames<RemoveBase>(args, device, stream);
}

}  // namespace vf
