// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)        csrc/residual_step.h
//
// u, r: [B, N, P], g: [B, P], lam: [N] fp32. Sums in fp32.
// A thread owns one 16-byte vector of pixels, reads g there once and walks over a run of frames;
// runs are as long as they can be while the grid still fills the GPU. 2 reads + 1 write of the
// clip, one more read with guidance, and one more with noise. Where P or an address is not a
// multiple of 16 bytes a vector is a single element.
//
// step, coeffs and lam are read on the device, so a captured launch can be replayed for every step.
// The device cannot raise: a step outside coeffs, or sigma > 0 without xi, writes NaN.
#include <algorithm>

#include "common/cuda_launch.h"
#include "residual_step.h"

namespace vf {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxRun = 16;

// out may be u: neither is __restrict__. The host refuses any other overlap.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads)
    residual_step_kernel(const T* u, const T* __restrict__ r, const T* __restrict__ r_uncond,
                         const T* __restrict__ xi, const T* __restrict__ g,
                         const float* __restrict__ lam, const float* __restrict__ coeffs,
                         const int32_t* __restrict__ step, T* out, int64_t batch, int frames,
                         int64_t pixels, int64_t num_steps, float guidance_scale, int run) {
  using Vec = Vector<T, kSize>;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= pixels) return;

  const int32_t row = *step;
  float c[3] = {nanf(""), 0.0f, 0.0f};
  if (row >= 0 && row < num_steps)
    for (int k = 0; k < 3; ++k) c[k] = coeffs[3 * int64_t(row) + k];
  const bool noise = c[2] != 0.0f && xi != nullptr;
  if (c[2] != 0.0f && xi == nullptr) c[0] = nanf("");

  const int runs = (frames + run - 1) / run;
  for (int64_t tile = blockIdx.y; tile < batch * runs; tile += gridDim.y) {
    const int64_t clip = tile / runs;
    const int first = int(tile % runs) * run;
    const int last = first + run < frames ? first + run : frames;
    const Vec gv = load<kSize>(g + clip * pixels + i);
    for (int n = first; n < last; ++n) {
      const int64_t at = (clip * frames + n) * pixels + i;
      const ResidualStepFrame frame = residual_step_frame(c, lam[n]);
      const Vec uv = load<kSize>(u + at);
      const Vec rv = load<kSize>(r + at);
      Vec r0v, xv, ov;
      if (r_uncond) r0v = load<kSize>(r_uncond + at);
      if (noise) xv = load<kSize>(xi + at);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        float rk = to_float(rv.at[k]);
        if (r_uncond) rk = guided(rk, to_float(r0v.at[k]), guidance_scale);
        float x = residual_step(frame, to_float(uv.at[k]), to_float(gv.at[k]), rk);
        if (noise) x += frame.from_noise * to_float(xv.at[k]);
        from_float(ov.at[k], x);
      }
      store(out + at, ov);
    }
  }
}

bool aligned(const ResidualStepArgs& args, size_t element) {
  const void* addresses[] = {args.u, args.r, args.r_uncond, args.xi, args.g, args.out};
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  return args.pixels * element % 16 == 0;
}

template <class T, int kSize>
void launch(const ResidualStepArgs& args, int processors, void* stream) {
  const int64_t blocks_x = (args.pixels / kSize + kThreads - 1) / kThreads;
  // The longest run of frames that still gives every processor four blocks.
  int run = int(std::min<int64_t>(args.frames, kMaxRun));
  const auto tiles = [&] { return args.batch * ((args.frames + run - 1) / run); };
  while (run > 1 && blocks_x * tiles() < 4 * int64_t(processors)) run = (run + 1) / 2;
  const dim3 grid(unsigned(blocks_x), unsigned(std::min<int64_t>(tiles(), 65535)));
  const auto as = [](const void* p) { return static_cast<const T*>(p); };
  VF_LAUNCH((residual_step_kernel<T, kSize>), grid, dim3(kThreads), stream, as(args.u), as(args.r),
            as(args.r_uncond), as(args.xi), as(args.g), args.lam, args.coeffs, args.step,
            static_cast<T*>(args.out), args.batch, int(args.frames), args.pixels, args.num_steps,
            args.guidance_scale, run);
  cuda_check(cudaGetLastError(), "residual_step");
}

template <class T>
void launch(const ResidualStepArgs& args, int processors, void* stream) {
  if (aligned(args, sizeof(T)))
    launch<T, 16 / sizeof(T)>(args, processors, stream);
  else
    launch<T, 1>(args, processors, stream);
}

}  // namespace

void residual_step_cuda(const ResidualStepArgs& args, int device, void* stream) {
  if (args.batch * args.frames * args.pixels == 0) return;
  const DeviceGuard guard(device);
  int processors = 0;
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  switch (args.dtype) {
    case DType::f32:
      return launch<float>(args, processors, stream);
    case DType::f16:
      return launch<__half>(args, processors, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(args, processors, stream);
  }
}

}  // namespace vf
