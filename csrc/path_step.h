// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)      g = d_p - c1 d_t
// u_m <- d_p
//
// The residual step along a base path (vfengine/sampling/two_phase.py): the rule of
// residual_step.h, with d_t and d_p from the rows `step` and `step + 1` of the path. It counts its
// step itself.
#pragma once
#include "common/clock.h"
#include "common/frames.h"
#include "residual_step.h"

namespace vf {

// states: [num_steps + 1, path_batch, pixels], path_batch 1 or the clips'; null: no path, g = 0 and
// no frame m. c1: [num_steps]; null: g = 0.
#define VF_BASE_PATH_FIELDS(FIELD, OPTIONAL) \
  OPTIONAL(const float*, states)             \
  OPTIONAL(const double*, c1)                \
  OPTIONAL(int64_t, path_batch)              \
  OPTIONAL(int64_t, base_frame)
VF_ARGS(BasePath, VF_BASE_PATH_FIELDS);

// Of `clip`, step is clock.counter, and g is not read.
#define VF_PATH_STEP_FIELDS(FIELD, OPTIONAL) \
  FIELD(FrameArgs, clip)                     \
  FIELD(BasePath, path)                      \
  FIELD(Clock, clock)
VF_ARGS(PathStepArgs, VF_PATH_STEP_FIELDS);

struct PathStep : ResidualStep {
  static constexpr const char* kName = "path_step";
  static constexpr bool kGuidance = false, kPath = true;
};

}  // namespace vf
