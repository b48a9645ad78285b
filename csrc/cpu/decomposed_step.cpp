// z_i <- c1 z_i + c2 (sqrt(lam_i) b + sqrt(1 - lam_i) r_i)
//        + sigma (sqrt(lam_i) xi_b + sqrt(1 - lam_i) xi_i)
//
// The rule of decomposed_step.h, run over a clip by cpu/frames.h.
#include "decomposed_step.h"

#include "cpu/frames.h"

namespace vf::VF_ISA {

void decomposed_step_cpu(const FrameArgs& args, int64_t threads) {
  run_frames<DecomposedStep>(args, threads);
}

}  // namespace vf::VF_ISA
