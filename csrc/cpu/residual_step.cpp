// u_i <- c1 u_i + sqrt(lam_i) g + sqrt(1 - lam_i) (c2 r_i + sigma xi_i)        csrc/residual_step.h
//
// u, r: [B, N, P], g: [B, P], lam: [N] fp32. Sums in fp32, one F32 vector at a time.
// A task is one tile: kTileFrames frames x kTilePixels pixels of one clip, so that its part of g is
// read from memory once and stays in the L1 cache. 2 reads + 1 write of the clip, one more read
// with guidance, and one more with noise. Every element is computed the same way whatever tile,
// lane or thread it falls on, hence the same bits on any number of threads and any instruction set.
#include "residual_step.h"

#include <algorithm>
#include <stdexcept>

#include "common/parallel.h"
#include "common/simd.h"

namespace vf::VF_ISA {

namespace {

constexpr int64_t kTileFrames = 8;
constexpr int64_t kTilePixels = 2048;
constexpr int64_t kElementsPerThread = 32768;  // below that a thread costs more than it brings

template <class T>
struct Row {  // the part of one frame that a tile covers; null pointers where absent
  const T *u, *r, *r_uncond, *xi, *g;
  T* out;
};

template <bool kGuided, bool kNoise, class T>
inline void step_vector(const Row<T>& row, int64_t i, const ResidualStepFrame& frame,
                        float guidance_scale) {
  F32 r = load(row.r + i);
  if constexpr (kGuided) r = guided(r, load(row.r_uncond + i), guidance_scale);
  F32 x = residual_step(frame, load(row.u + i), load(row.g + i), r);
  if constexpr (kNoise) x += frame.from_noise * load(row.xi + i);
  store(row.out + i, x);
}

template <bool kGuided, bool kNoise, class T>
void step_row(const Row<T>& row, int64_t count, const ResidualStepFrame& frame,
              float guidance_scale) {
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    step_vector<kGuided, kNoise>(row, i, frame, guidance_scale);
  if (whole == count) return;

  // The last, incomplete vector goes through a buffer: the same arithmetic as the others.
  const size_t bytes = size_t(count - whole) * sizeof(T);
  T u[kLanes] = {}, r[kLanes] = {}, r_uncond[kLanes] = {}, xi[kLanes] = {}, g[kLanes] = {};
  T out[kLanes];
  std::memcpy(u, row.u + whole, bytes);
  std::memcpy(r, row.r + whole, bytes);
  std::memcpy(g, row.g + whole, bytes);
  if constexpr (kGuided) std::memcpy(r_uncond, row.r_uncond + whole, bytes);
  if constexpr (kNoise) std::memcpy(xi, row.xi + whole, bytes);
  step_vector<kGuided, kNoise>(Row<T>{u, r, r_uncond, xi, g, out}, 0, frame, guidance_scale);
  std::memcpy(row.out + whole, out, bytes);
}

template <bool kGuided, bool kNoise, class T>
void step_clips(const ResidualStepArgs& args, int64_t threads) {
  const float* coeffs = args.coeffs + 3 * int64_t(*args.step);
  const int64_t N = args.frames, P = args.pixels;
  const int64_t frame_tiles = (N + kTileFrames - 1) / kTileFrames;
  const int64_t pixel_tiles = (P + kTilePixels - 1) / kTilePixels;
  threads = std::min(threads, args.batch * N * P / kElementsPerThread);

  parallel_for(args.batch * frame_tiles * pixel_tiles, threads, [&](int64_t task) {
    const int64_t first_pixel = task % pixel_tiles * kTilePixels;
    const int64_t first_frame = task / pixel_tiles % frame_tiles * kTileFrames;
    const int64_t clip = task / pixel_tiles / frame_tiles;
    const int64_t pixels = std::min(kTilePixels, P - first_pixel);
    for (int64_t n = first_frame; n < std::min(first_frame + kTileFrames, N); ++n) {
      const int64_t at = (clip * N + n) * P + first_pixel;
      const auto part = [at](const void* p) { return p ? static_cast<const T*>(p) + at : nullptr; };
      const Row<T> row{part(args.u),
                       part(args.r),
                       part(args.r_uncond),
                       part(args.xi),
                       static_cast<const T*>(args.g) + clip * P + first_pixel,
                       static_cast<T*>(args.out) + at};
      step_row<kGuided, kNoise>(row, pixels, residual_step_frame(coeffs, args.lam[n]),
                                args.guidance_scale);
    }
  });
}

template <class T>
void step_clips(const ResidualStepArgs& args, int64_t threads) {
  const bool noise = args.coeffs[3 * int64_t(*args.step) + 2] != 0.0f;
  if (noise && !args.xi)
    throw std::invalid_argument("residual_step: sigma > 0 at this step needs seed or xi");
  if (args.r_uncond) {
    noise ? step_clips<true, true, T>(args, threads) : step_clips<true, false, T>(args, threads);
  } else {
    noise ? step_clips<false, true, T>(args, threads) : step_clips<false, false, T>(args, threads);
  }
}

}  // namespace

void residual_step_cpu(const ResidualStepArgs& args, int64_t threads) {
  if (*args.step < 0 || *args.step >= args.num_steps)
    throw std::invalid_argument("residual_step: step lies outside coeffs");
  for (int64_t n = 0; n < args.frames; ++n)
    if (!(args.lam[n] >= 0.0f && args.lam[n] <= 1.0f))
      throw std::invalid_argument("residual_step: lam must lie in [0, 1]");
  switch (args.dtype) {
    case DType::f32:
      return step_clips<float>(args, threads);
    case DType::f16:
      return step_clips<Half>(args, threads);
    case DType::bf16:
      return step_clips<BFloat16>(args, threads);
  }
}

}  // namespace vf::VF_ISA
