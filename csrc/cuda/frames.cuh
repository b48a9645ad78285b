// Runs a rule of common/frames.h over a clip.
//
// A thread owns one group of pixels: it reads g and draws base noise there once and walks over a
// run of frames; runs are as long as they can be while the grid still fills the GPU. The clip moves
// through memory once: one read each of x, r and r_uncond, one write of out, 16 bytes an
// instruction where every address and P allow it. Noise drawn here costs no traffic.
//
// A block computes the weights of its run once. The first frame is on its way meanwhile, and each
// further one while the frame before it is written.
//
// step, coeffs and lam are read on the device, so a captured launch can be replayed for every step.
// The device cannot raise: a step outside coeffs, lam outside [0, 1], or sigma > 0 without noise
// writes NaN.
//
// A rule with kPath (path_step.h) computes g of two rows of the base path, writes the base frame as
// it is there, and moves the clock on.
#pragma once
#include "common/frames.h"
#include "cuda/clock.cuh"
#include "cuda/group.cuh"
#include "path_step.h"

namespace vf {

// Blocks that must fit a processor at a time bound the registers: 64 for whole vectors, the main
// path, 80 with drawing, 128 where elements move one by one.
constexpr int blocks_per_processor(bool vectors, bool drawing) {
  return !vectors ? 2 : drawing ? 3 : 4;
}

struct FrameKeys {
  PhiloxKeys base, residual;
};

// What is read of one frame, as words until it is used: elements of 16 bits that outlive a turn of
// the loop would take a register each.
struct FrameInputs {
  uint4 x, r, r_uncond;
};

// d_t and d_p of a path, as the clip's g = d_p - c1 d_t and base frame d_p. g is a small
// difference, hence in double; step is of the table.
template <bool kVector, class T>
__device__ __forceinline__ void read_path(const BasePath& path, const FrameArgs& args, int64_t clip,
                                          int32_t step, int64_t i, uint4& g, uint4& frame) {
  constexpr int kSize = Group<T>::kSize, kPart = Group<float>::kSize;
  const int64_t sample = path.path_batch == 1 ? 0 : clip;
  const float* d_t = path.states + (step * path.path_batch + sample) * args.pixels + i;
  const float* d_p = d_t + path.path_batch * args.pixels;
  const double c1 = path.c1 ? path.c1[step] : 0.0;
  Group<T> terms, base;
#pragma unroll
  for (int part = 0; part < kSize; part += kPart) {
    const int64_t count = args.pixels - i - part;
    const Group<float> to = load_group<kVector>(d_p + part, count);
    Group<float> from{};
    if (path.c1) from = load_group<kVector>(d_t + part, count);
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      from_float(base.at[part + k], to.at[k]);
      const float term = path.c1 ? float(double(to.at[k]) - c1 * double(from.at[k])) : 0.0f;
      from_float(terms.at[part + k], term);
    }
  }
  g = words_of(terms), frame = words_of(base);
}

// out may be x: the host refuses any other overlap.
template <class Rule, class T, bool kVector, bool kDraw>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kVector, kDraw))
    frames_kernel(const FrameArgs args, const BasePath path, const Clock clock,
                  const FrameKeys keys, int run) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize;
  constexpr bool kAhead = kVector && !kDraw;  // other kernels have no registers to spare
  VF_SHARED(int32_t, step_of_block, 1);
  VF_SHARED(FrameWeights, weights, kMaxRun);
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  const int64_t count = args.pixels - i;  // of elements from i on; none where it is not positive
  int32_t step = threadIdx.x == 0 ? *args.step : 0;
  bool unread = Rule::kPath && threadIdx.x == 0, last = false;

  // One turn of both loops, unless there are more clips or frames than a grid has blocks.
  for (int64_t first = int64_t(blockIdx.z) * run; first < args.frames;
       first += int64_t(gridDim.z) * run) {
    const int frames = args.frames - first < run ? int(args.frames - first) : run;
    for (int64_t clip = blockIdx.y; clip < args.batch; clip += gridDim.y) {
      int64_t at = (clip * args.frames + first) * args.pixels + i;
      const auto load = [&](int64_t from) {
        const auto group = [&](const void* clips) {
          return words_of(load_group<kVector>(static_cast<const T*>(clips) + from, count));
        };
        FrameInputs inputs;
        inputs.x = group(args.x);
        if constexpr (Rule::kResidual) inputs.r = group(args.r);
        if constexpr (Rule::kGuidance)
          if (args.r_uncond) inputs.r_uncond = group(args.r_uncond);
        return inputs;
      };
      FrameInputs next;
      uint4 g{}, base_frame{};
      if (count > 0) {
        if constexpr (kAhead) next = load(at);
        if constexpr (!Rule::kPath)
          g = words_of(
              load_group<kVector>(static_cast<const T*>(args.g) + clip * args.pixels + i, count));
      }

      if (threadIdx.x == 0) *step_of_block = step;
      __syncthreads();
      step = *step_of_block;
      const bool known = step >= 0 && step < args.num_steps;
      float row[3] = {nanf(""), 0.0f, 0.0f};
      if (known)
        for (int k = 0; k < Rule::kColumns; ++k)
          row[k] = args.coeffs[Rule::kColumns * int64_t(step) + k];
      const float lam = int(threadIdx.x) < frames ? args.lam[first + threadIdx.x] : 0.0f;
      const bool on_path = Rule::kPath && known && path.states;
      if (on_path && count > 0) read_path<kVector, T>(path, args, clip, step, i, g, base_frame);
      const bool noisy = Rule::sigma(row) != 0.0f;
      if (noisy && !kDraw) row[0] = nanf("");
      if (int(threadIdx.x) < frames)
        weights[threadIdx.x] = Rule::weights(row, lam >= 0.0f && lam <= 1.0f ? lam : nanf(""));
      __syncthreads();
      if (unread) last = last_to_read(clock);
      unread = false;
      if (count <= 0) continue;

      const uint32_t sample = args.sample_offset + uint32_t(clip);
      float base_noise[kSize], drawn[kNormals];
      if constexpr (kDraw && Rule::kBaseNoise)
        if (noisy)
          draw_normals<kSize>(
              {0, sample, stream_and_step(kBaseStream, uint32_t(step) + 1), keys.base}, i,
              base_noise);
#pragma unroll 1
      for (int n = 0; n < frames; ++n, at += args.pixels) {
        const FrameInputs now = kAhead ? next : load(at);
        if (kAhead && n + 1 < frames) next = load(at + args.pixels);
        const FrameWeights w = weights[n];
        const Floats<T> x = floats_of<T>(now.x), r = floats_of<T>(now.r);
        const Floats<T> r_uncond = floats_of<T>(now.r_uncond), shared = floats_of<T>(g);
        Group<T> out;
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if constexpr (kDraw)
            if (noisy && k % kNormals == 0)
              draw_normals<kNormals>(
                  {args.frame_offset + uint32_t(first + n), sample,
                   stream_and_step(kResidualStream, uint32_t(step) + 1), keys.residual},
                  i + k, drawn);
          float sum = w.x * x.at[k] + w.base * shared.at[k];
          if constexpr (Rule::kResidual) {
            float estimate = r.at[k];
            if constexpr (Rule::kGuidance)
              if (args.r_uncond) estimate = guided(estimate, r_uncond.at[k], args.guidance_scale);
            sum += w.residual * estimate;
            if constexpr (kDraw)
              if (noisy) {
                if constexpr (Rule::kBaseNoise) sum += w.base_noise * base_noise[k];
                sum += w.noise * drawn[k % kNormals];
              }
          }
          from_float(out.at[k], sum);
        }
        if (on_path && first + n == path.base_frame) out = group_of<T>(base_frame);
        store_group<kVector>(static_cast<T*>(args.out) + at, out, count);
      }
    }
  }
  if (last) move_on(clock, step);
}

template <class T>
bool vectors_fit(const FrameArgs& args, const BasePath& path) {
  for (const void* address :
       {args.x, args.r, args.r_uncond, args.g, static_cast<const void*>(path.states),
        static_cast<const void*>(args.out)})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  return args.pixels % Group<T>::kSize == 0;
}

template <class Rule, class T, bool kDraw>
void launch_frames(const FrameArgs& args, const BasePath& path, const Clock& clock, int device,
                   void* stream) {
  const FrameGrid grid = frame_grid(args.batch, args.frames, args.pixels, Group<T>::kSize, device);
  const FrameKeys keys{args.base_seed, args.residual_seed};
  if (vectors_fit<T>(args, path))
    VF_LAUNCH((frames_kernel<Rule, T, true, kDraw>), grid.blocks, dim3(kThreads), stream, args,
              path, clock, keys, grid.run);
  else
    VF_LAUNCH((frames_kernel<Rule, T, false, kDraw>), grid.blocks, dim3(kThreads), stream, args,
              path, clock, keys, grid.run);
  cuda_check(cudaGetLastError(), Rule::kName);
}

// path and clock: of a rule with kPath, and empty for others.
template <class Rule>
void run_frames(const FrameArgs& args, int device, void* stream, const BasePath& path = {},
                const Clock& clock = {}) {
  const DeviceGuard guard(device);
  const auto launch = [&](auto element) {
    using T = decltype(element);
    if constexpr (Rule::kResidual)
      if (args.draw) return launch_frames<Rule, T, true>(args, path, clock, device, stream);
    launch_frames<Rule, T, false>(args, path, clock, device, stream);
  };
  if (args.dtype == DType::f32)
    launch(float{});
  else if (args.dtype == DType::f16)
    launch(__half{});
  else
    launch(__nv_bfloat16{});
}

}  // namespace vf
