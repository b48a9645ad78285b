// z'_i <- z_i - sqrt(lam_i) sqrt(1 - alphas_cumprod_t) b
//
// The rule of remove_base.h, run over a clip by cpu/frames.h.
#include "remove_base.h"

#include "cpu/frames.h"

namespace vf::VF_ISA {

void remove_base_cpu(const FrameArgs& args, int64_t threads) {
  run_frames<RemoveBase>(args, threads);
}

}  // namespace vf::VF_ISA
