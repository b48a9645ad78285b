// b or r_i of N(0, I), straight from the counter
//
// A thread owns one group of pixels: it draws b there once and walks over a run of frames. One
// write of the clip, 16 bytes an instruction where its address and P allow it.
#include "cuda/group.cuh"
#include "decomposed_noise.h"

namespace vf {

namespace {

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const DecomposedNoiseArgs args, const PhiloxKeys keys, int run) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= args.pixels) return;

  for (int64_t first = int64_t(blockIdx.z) * run; first < args.frames;
       first += int64_t(gridDim.z) * run) {
    const int64_t last = first + run < args.frames ? first + run : args.frames;
    for (int64_t clip = blockIdx.y; clip < args.batch; clip += gridDim.y) {
      const uint32_t sample = args.sample_offset + uint32_t(clip);
      const NoiseSource base{0, sample, stream_and_step(kBaseStream, args.step), keys};
      float b[kSize], r[kSize];
      if constexpr (!std::is_same_v<T, uint32_t>)
        if (args.base) draw_normals<kSize>(base, i, b);
      for (int64_t n = first; n < last; ++n) {
        const NoiseSource from{
            args.base ? 0 : args.frame_offset + uint32_t(n), sample,
            stream_and_step(args.base ? kBaseStream : kResidualStream, args.step), keys};
        Group<T> out;
        if constexpr (std::is_same_v<T, uint32_t>) {
          draw_words(from, i, out.at);
        } else {
          if (!args.base) draw_normals<kSize>(from, i, r);
#pragma unroll
          for (int k = 0; k < kSize; ++k) from_float(out.at[k], args.base ? b[k] : r[k]);
        }
        store_group<kVector>(static_cast<T*>(args.out) + (clip * args.frames + n) * args.pixels + i,
                             out, args.pixels - i);
      }
    }
  }
}

template <class T>
void launch(const DecomposedNoiseArgs& args, int device, void* stream) {
  constexpr int kSize = Group<T>::kSize;
  const FrameGrid grid = frame_grid(args.batch, args.frames, args.pixels, kSize, device);
  if (reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && args.pixels % kSize == 0)
    VF_LAUNCH((noise_kernel<T, true>), grid.blocks, dim3(kThreads), stream, args,
              PhiloxKeys(args.seed), grid.run);
  else
    VF_LAUNCH((noise_kernel<T, false>), grid.blocks, dim3(kThreads), stream, args,
              PhiloxKeys(args.seed), grid.run);
  cuda_check(cudaGetLastError(), "decomposed_noise");
}

}  // namespace

void decomposed_noise_cuda(const DecomposedNoiseArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (args.dtype == DType::f32)
    launch<float>(args, device, stream);
  else if (args.dtype == DType::f16)
    launch<__half>(args, device, stream);
  else if (args.dtype == DType::bf16)
    launch<__nv_bfloat16>(args, device, stream);
  else
    launch<uint32_t>(args, device, stream);
}

}  // namespace vf
