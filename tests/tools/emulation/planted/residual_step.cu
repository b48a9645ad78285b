// residual_step of csrc/cuda on buffers of exactly its size, with switches for what a test plants:
//
//     program FRAMES PIXELS MISALIGNED OVERLAP
//
// MISALIGNED: u starts that many elements after an aligned address. OVERLAP: out is u plus that
// many elements, which vfengine.ops refuses. The bugs themselves are planted in a copy of csrc.
#include <cstdio>
#include <cstdlib>

#include "cuda/frames.cuh"
#include "residual_step.h"

namespace {

// Memory of its own for every tensor: a sanitizer then sees one element too many.
void* buffer(size_t count, size_t element) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, count * element) != 0) abort();
  for (size_t i = 0; i < count * element; ++i) static_cast<char*>(memory)[i] = 0;
  return memory;
}

void run(vf::DType dtype, size_t element, int64_t frames, int64_t pixels, int64_t misaligned,
         int64_t overlap) {
  const size_t count = frames * pixels;
  const float coeffs[3] = {1.0f, 0.5f, 0.0f};
  const int32_t step = 0;
  float* lam = static_cast<float*>(buffer(frames, sizeof(float)));
  char* u = static_cast<char*>(buffer(count + misaligned + overlap, element));
  void* r = buffer(count, element);
  void* g = buffer(pixels, element);
  vf::FrameArgs args{};
  args.x = u + misaligned * element;
  args.r = r;
  args.g = g;
  args.lam = lam;
  args.coeffs = coeffs;
  args.step = &step;
  args.out = u + (misaligned + overlap) * element;
  args.batch = 1;
  args.frames = frames;
  args.pixels = pixels;
  args.num_steps = 1;
  args.dtype = dtype;
  vf::run_frames<vf::ResidualStep>(args, 0, nullptr);
  for (void* memory : {static_cast<void*>(lam), static_cast<void*>(u), r, g}) free(memory);
}

}  // namespace

int main(int, char** arguments) {
  int64_t number[4];
  for (int i = 0; i < 4; ++i) number[i] = atoll(arguments[i + 1]);
  run(vf::DType::f32, 4, number[0], number[1], number[2], number[3]);
  run(vf::DType::bf16, 2, number[0], number[1], number[2], number[3]);
  puts("done");
  return 0;
}
