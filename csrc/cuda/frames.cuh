// Runs a rule of common/frames.h over a clip.
//
// A thread owns one group of pixels: it reads g and draws base noise there once and walks over a
// run of frames; runs are as long as they can be while the grid still fills the GPU. The clip moves
// through memory once: one read each of x, r and r_uncond, one write of out, 16 bytes an
// instruction where every address and P allow it. Noise drawn here costs no traffic.
//
// step, coeffs and lam are read on the device, so a captured launch can be replayed for every step.
// The device cannot raise: a step outside coeffs, lam outside [0, 1], or sigma > 0 without noise
// writes NaN.
#pragma once
#include "common/frames.h"
#include "cuda/group.cuh"

namespace vf {

// Blocks that must fit a processor at a time bound the registers (64 and 80), of which sm_100 and
// sm_120 would be given twice as many. The main path, whole vectors and no drawing, is the first.
constexpr int blocks_per_processor(bool vectors, bool drawing) {
  return vectors && !drawing ? 4 : 3;
}

// out may be x: the host refuses any other overlap.
template <class Rule, class T, bool kVector, bool kDraw>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kVector, kDraw))
    frames_kernel(const FrameArgs args, int run) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= args.pixels) return;
  const int64_t count = args.pixels - i;

  const int32_t step = *args.step;
  float row[3] = {nanf(""), 0.0f, 0.0f};
  if (step >= 0 && step < args.num_steps)
    for (int k = 0; k < Rule::kColumns; ++k)
      row[k] = args.coeffs[Rule::kColumns * int64_t(step) + k];
  const bool noisy = Rule::sigma(row) != 0.0f;
  if (noisy && !kDraw) row[0] = nanf("");

  const int64_t runs = (args.frames + run - 1) / run;
  for (int64_t tile = blockIdx.y; tile < args.batch * runs; tile += gridDim.y) {
    const int64_t clip = tile / runs, first = tile % runs * run;
    const int64_t last = first + run < args.frames ? first + run : args.frames;
    const uint32_t sample = args.sample_offset + uint32_t(clip);
    const Group<T> g =
        load_group<kVector>(static_cast<const T*>(args.g) + clip * args.pixels + i, count);
    float base_noise[kSize], drawn[kSize];
    if constexpr (kDraw && Rule::kBaseNoise)
      if (noisy)
        draw_normals<kSize>(
            {0, sample, stream_and_step(kBaseStream, uint32_t(step) + 1), args.base_seed}, i,
            base_noise);
    for (int64_t n = first; n < last; ++n) {
      const int64_t at = (clip * args.frames + n) * args.pixels + i;
      const auto load = [&](const void* from) {
        return load_group<kVector>(static_cast<const T*>(from) + at, count);
      };
      const float lam = args.lam[n];
      const FrameWeights w = Rule::weights(row, lam >= 0.0f && lam <= 1.0f ? lam : nanf(""));
      const Group<T> x = load(args.x);
      Group<T> r, r_uncond, out;
      if constexpr (Rule::kResidual) {
        r = load(args.r);
        if constexpr (Rule::kGuidance)
          if (args.r_uncond) r_uncond = load(args.r_uncond);
      }
      if constexpr (kDraw)
        if (noisy)
          draw_normals<kSize>(
              {args.frame_offset + uint32_t(n), sample,
               stream_and_step(kResidualStream, uint32_t(step) + 1), args.residual_seed},
              i, drawn);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        float sum = w.x * to_float(x.at[k]) + w.base * to_float(g.at[k]);
        if constexpr (Rule::kResidual) {
          float estimate = to_float(r.at[k]);
          if constexpr (Rule::kGuidance)
            if (args.r_uncond)
              estimate = guided(estimate, to_float(r_uncond.at[k]), args.guidance_scale);
          sum += w.residual * estimate;
          if constexpr (kDraw)
            if (noisy) {
              if constexpr (Rule::kBaseNoise) sum += w.base_noise * base_noise[k];
              sum += w.noise * drawn[k];
            }
        }
        from_float(out.at[k], sum);
      }
      store_group<kVector>(static_cast<T*>(args.out) + at, out, count);
    }
  }
}

template <class T>
bool vectors_fit(const FrameArgs& args) {
  for (const void* address :
       {args.x, args.r, args.r_uncond, args.g, static_cast<const void*>(args.out)})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  return args.pixels % Group<T>::kSize == 0;
}

template <class Rule, class T, bool kDraw>
void launch_frames(const FrameArgs& args, int device, void* stream) {
  const FrameGrid grid = frame_grid(args.batch, args.frames, args.pixels, Group<T>::kSize, device);
  if (vectors_fit<T>(args))
    VF_LAUNCH((frames_kernel<Rule, T, true, kDraw>), grid.blocks, dim3(kThreads), stream, args,
              grid.run);
  else
    VF_LAUNCH((frames_kernel<Rule, T, false, kDraw>), grid.blocks, dim3(kThreads), stream, args,
              grid.run);
  cuda_check(cudaGetLastError(), Rule::kName);
}

template <class Rule, class T>
void choose_noise(const FrameArgs& args, int device, void* stream) {
  if constexpr (Rule::kResidual)
    if (args.draw) return launch_frames<Rule, T, true>(args, device, stream);
  launch_frames<Rule, T, false>(args, device, stream);
}

template <class Rule>
void run_frames(const FrameArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (args.dtype == DType::f32)
    choose_noise<Rule, float>(args, device, stream);
  else if (args.dtype == DType::f16)
    choose_noise<Rule, __half>(args, device, stream);
  else
    choose_noise<Rule, __nv_bfloat16>(args, device, stream);
}

}  // namespace vf
