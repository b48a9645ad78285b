// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)
//
// The rule of residual_step.h, run over a clip by cpu/frames.h.
#include "residual_step.h"

#include "cpu/frames.h"

namespace vf::VF_ISA {

void residual_step_cpu(const FrameArgs& args, int64_t threads) {
  run_frames<ResidualStep>(args, threads);
}

}  // namespace vf::VF_ISA
