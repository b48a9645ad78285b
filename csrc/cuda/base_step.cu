// d_t = z - sqrt(1 - alphas_cumprod_t) b        states[step] <- d_t
// z <- c1 z + c2 b~ + sigma xi_b                states[step + 1] <- z
//
// A thread owns one group of pixels of an image: two or three reads and three writes of it. A step
// outside coeffs, or sigma > 0 without noise, makes z NaN; the first writes no states.
#include "base_step.h"
#include "cuda/clock.cuh"
#include "cuda/group.cuh"

namespace vf {

namespace {

template <bool kVector, bool kDraw>
__global__ void __launch_bounds__(kThreads, 3)
    base_step_kernel(const BaseStepArgs args, const PhiloxKeys keys) {
  wait_for_inputs();
  constexpr int kSize = Group<float>::kSize;
  VF_SHARED(int32_t, step_of_block, 1);
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  const int64_t count = args.pixels - i;
  bool last = false;
  if (threadIdx.x == 0) *step_of_block = *args.clock.counter;
  __syncthreads();
  if (threadIdx.x == 0) last = last_to_read(args.clock);
  const int32_t step = *step_of_block;
  const bool known = step >= 0 && step < args.clock.num_steps;
  float level = 0.0f, row[3] = {nanf(""), 0.0f, 0.0f};
  if (known) {
    level = args.noise_levels[step];
    for (int k = 0; k < DecomposedStep::kColumns; ++k)
      row[k] = args.coeffs[DecomposedStep::kColumns * int64_t(step) + k];
  }
  const bool noisy = DecomposedStep::sigma(row) != 0.0f;
  if (noisy && !kDraw) row[0] = nanf("");
  const FrameWeights removal = RemoveBase::weights(&level, 1.0f);
  const FrameWeights w = DecomposedStep::weights(row, 1.0f);

  for (int64_t image = blockIdx.y; image < args.batch && count > 0; image += gridDim.y) {
    const int64_t at = image * args.pixels + i;
    const Group<float> z = load_group<kVector>(args.z + at, count);
    const Group<float> b = load_group<kVector>(args.b + at, count);
    const Group<float> mixed = args.mixed ? load_group<kVector>(args.mixed + at, count) : b;
    float drawn[kSize];
    if constexpr (kDraw)
      if (noisy)
        draw_normals<kSize>({0, args.sample_offset + uint32_t(image),
                             stream_and_step(kBaseStream, uint32_t(step) + 1), keys},
                            i, drawn);
    Group<float> d, moved;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      d.at[k] = removal.x * z.at[k] + removal.base * b.at[k];
      // A frame's own estimate and noise, here of weight 0, are the base frame's.
      float sum = w.x * z.at[k] + w.base * mixed.at[k];
      sum += w.residual * mixed.at[k];
      if constexpr (kDraw)
        if (noisy) sum += w.base_noise * drawn[k];
      moved.at[k] = sum;
    }
    store_group<kVector>(args.z + at, moved, count);
    if (known) {
      float* states = args.states + step * (args.batch * args.pixels) + at;
      store_group<kVector>(states, d, count);
      store_group<kVector>(states + args.batch * args.pixels, moved, count);
    }
  }
  if (last) move_on(args.clock, step);
}

}  // namespace

void base_step_cuda(const BaseStepArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  constexpr int kSize = Group<float>::kSize;
  bool vectors = args.pixels % kSize == 0;
  for (const float* address : {static_cast<const float*>(args.z), args.b, args.mixed,
                               static_cast<const float*>(args.states)})
    vectors &= reinterpret_cast<uintptr_t>(address) % 16 == 0;
  const int64_t per_block = int64_t(kThreads) * kSize;
  const dim3 blocks(unsigned((args.pixels + per_block - 1) / per_block),
                    unsigned(std::min<int64_t>(args.batch, kMaxBlocks)));
  const auto launch = [&](auto kernel) {
    VF_LAUNCH(kernel, blocks, dim3(kThreads), stream, args, PhiloxKeys(args.seed));
  };
  if (vectors)
    args.draw ? launch(base_step_kernel<true, true>) : launch(base_step_kernel<true, false>);
  else
    args.draw ? launch(base_step_kernel<false, true>) : launch(base_step_kernel<false, false>);
  cuda_check(cudaGetLastError(), "base_step");
}

}  // namespace vf
