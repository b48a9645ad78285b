// Runs a rule of common/frames.h over a clip: vectors of simd.h, threads of parallel.h.
//
// A task is one tile of one clip. A clip that fits the caches is cut into tiles of a few frames,
// whose part of g, and base noise, are then read or drawn once and stay in the L1 cache. A larger
// one moves through memory from front to back, which prefetchers follow best; g comes from an outer
// cache then. Either way one read each of x, r and r_uncond and one write of out; noise drawn here
// costs no traffic. Every element is computed the same way whatever tile, lane or thread it
// falls on, hence the same bits on any number of threads and any instruction set.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/frames.h"
#include "cpu/base/parallel.h"
#include "cpu/noise.h"

namespace vf::VF_ISA {

struct TileSize {
  int64_t frames, pixels;  // pixels: a multiple of kBlock
};

constexpr TileSize kInCache{8, 2048};
constexpr TileSize kFrontToBack{1, 65536};
constexpr int64_t kCacheBytes = 4 << 20;       // of a clip, beyond which it is not in the caches
constexpr int64_t kElementsPerThread = 32768;  // below that a thread costs more than it brings

template <class T>
struct FrameRow {  // the part of one frame that a tile covers; null pointers where absent
  const T *x, *r, *r_uncond, *g;
  const float *drawn_xi, *drawn_base;  // as pairs of T
  T* out;
};

template <class Rule, class T, bool kGuided, bool kDraw>
static inline void step_pair(const FrameRow<T>& row, int64_t i, const FrameWeights& w,
                             float guidance_scale) {
  const Pair x = load_pair(row.x + i), g = load_pair(row.g + i);
  Pair r, r_uncond, xi, base_noise, out;
  if constexpr (Rule::kResidual) r = load_pair(row.r + i);
  if constexpr (kGuided) r_uncond = load_pair(row.r_uncond + i);
  if constexpr (kDraw) xi = load_pair(row.drawn_xi + i);
  if constexpr (kDraw && Rule::kBaseNoise) base_noise = load_pair(row.drawn_base + i);
  for (int half = 0; half < 2; ++half) {
    F32 sum = w.x * x.at[half] + w.base * g.at[half];
    if constexpr (Rule::kResidual) {
      F32 estimate = r.at[half];
      if constexpr (kGuided) estimate = guided(estimate, r_uncond.at[half], guidance_scale);
      sum += w.residual * estimate;
    }
    if constexpr (kDraw && Rule::kBaseNoise) sum += w.base_noise * base_noise.at[half];
    if constexpr (kDraw) sum += w.noise * xi.at[half];
    out.at[half] = sum;
  }
  store_pair(row.out + i, out);
}

template <class Rule, class T, bool kGuided, bool kDraw>
static void step_row(const FrameRow<T>& row, int64_t count, const FrameWeights& w,
                     float guidance_scale) {
  const int64_t whole = count - count % kPair;
  for (int64_t i = 0; i < whole; i += kPair)
    step_pair<Rule, T, kGuided, kDraw>(row, i, w, guidance_scale);
  if (whole == count) return;

  // The last, incomplete pair goes through buffers: the same arithmetic as the others.
  const size_t bytes = size_t(count - whole) * sizeof(T);
  T x[kPair] = {}, r[kPair] = {}, r_uncond[kPair] = {}, g[kPair] = {}, out[kPair];
  const auto last = [&](T* to, const T* from) { std::memcpy(to, from + whole, bytes); };
  last(x, row.x);
  last(g, row.g);
  if constexpr (Rule::kResidual) last(r, row.r);
  if constexpr (kGuided) last(r_uncond, row.r_uncond);
  const float* drawn_xi = row.drawn_xi ? row.drawn_xi + whole : nullptr;
  const float* drawn_base = row.drawn_base ? row.drawn_base + whole : nullptr;
  const FrameRow<T> rest{x, r, r_uncond, g, drawn_xi, drawn_base, out};
  step_pair<Rule, T, kGuided, kDraw>(rest, 0, w, guidance_scale);
  std::memcpy(row.out + whole, out, bytes);
}

template <class Rule, class T, bool kGuided, bool kDraw>
static void step_tile(const FrameArgs& args, int64_t clip, int64_t first_frame, int64_t last_frame,
                      int64_t first_pixel, int64_t pixels) {
  const float* coeffs = args.coeffs + Rule::kColumns * int64_t(*args.step);
  const uint32_t sample = args.sample_offset + uint32_t(clip), step = uint32_t(*args.step) + 1;
  alignas(64) float xi[kDraw ? kInCache.pixels : 1];
  alignas(64) float base_noise[kDraw && Rule::kBaseNoise ? kInCache.pixels : 1];
  if constexpr (kDraw && Rule::kBaseNoise) {
    const NoiseSource from{0, sample, stream_and_step(kBaseStream, step), args.base_seed};
    draw<T>(from, first_pixel, pixels, base_noise);
  }
  for (int64_t n = first_frame; n < last_frame; ++n) {
    if constexpr (kDraw) {
      const NoiseSource from{args.frame_offset + uint32_t(n), sample,
                             stream_and_step(kResidualStream, step), args.residual_seed};
      draw<T>(from, first_pixel, pixels, xi);
    }
    const int64_t at = (clip * args.frames + n) * args.pixels + first_pixel;
    const auto part = [at](const void* p) { return p ? static_cast<const T*>(p) + at : nullptr; };
    const FrameRow<T> row{part(args.x),
                          part(args.r),
                          part(args.r_uncond),
                          static_cast<const T*>(args.g) + clip * args.pixels + first_pixel,
                          kDraw ? xi : nullptr,
                          kDraw && Rule::kBaseNoise ? base_noise : nullptr,
                          static_cast<T*>(args.out) + at};
    const FrameWeights w = Rule::weights(coeffs, args.lam[n]);
    const FrameWeights plain{plain_nan(w.x), plain_nan(w.base), plain_nan(w.base_noise),
                             plain_nan(w.residual), plain_nan(w.noise)};
    step_row<Rule, T, kGuided, kDraw>(row, pixels, plain, plain_nan(args.guidance_scale));
  }
}

template <class Rule, class T, bool kGuided, bool kDraw>
static void step_clips(const FrameArgs& args, int64_t threads) {
  const int64_t elements = args.batch * args.frames * args.pixels;
  const bool in_cache = kDraw || elements * int64_t(sizeof(T)) <= kCacheBytes;
  const TileSize tile = in_cache ? kInCache : kFrontToBack;
  const int64_t frame_tiles = (args.frames + tile.frames - 1) / tile.frames;
  const int64_t pixel_tiles = (args.pixels + tile.pixels - 1) / tile.pixels;
  threads = std::min(threads, elements / kElementsPerThread);
  parallel_for(args.batch * frame_tiles * pixel_tiles, threads, [&](int64_t task) {
    const int64_t first_pixel = task % pixel_tiles * tile.pixels;
    const int64_t first_frame = task / pixel_tiles % frame_tiles * tile.frames;
    const int64_t clip = task / pixel_tiles / frame_tiles;
    step_tile<Rule, T, kGuided, kDraw>(
        args, clip, first_frame, std::min(first_frame + tile.frames, args.frames), first_pixel,
        std::min(tile.pixels, args.pixels - first_pixel));
  });
}

template <class Rule, class T, bool kGuided>
static void choose_noise(const FrameArgs& args, int64_t threads) {
  if (Rule::sigma(args.coeffs + Rule::kColumns * int64_t(*args.step)) == 0.0f)
    return step_clips<Rule, T, kGuided, false>(args, threads);
  if constexpr (Rule::kResidual)
    if (args.draw) return step_clips<Rule, T, kGuided, true>(args, threads);
  throw std::invalid_argument(std::string(Rule::kName) +
                              ": sigma > 0 at this step needs the seed of its noise");
}

template <class Rule, class T>
static void choose_guidance(const FrameArgs& args, int64_t threads) {
  if constexpr (Rule::kGuidance)
    if (args.r_uncond) return choose_noise<Rule, T, true>(args, threads);
  choose_noise<Rule, T, false>(args, threads);
}

template <class Rule>
static void run_frames(const FrameArgs& args, int64_t threads) {
  const std::string name = Rule::kName;
  if (*args.step < 0 || *args.step >= args.num_steps)
    throw std::invalid_argument(name + ": step " + std::to_string(*args.step) +
                                " lies outside coeffs, which has " +
                                std::to_string(args.num_steps) + " rows");
  for (int64_t n = 0; n < args.frames; ++n)
    if (!(args.lam[n] >= 0.0f && args.lam[n] <= 1.0f))
      throw std::invalid_argument(name + ": lam must lie in [0, 1], got " +
                                  std::to_string(args.lam[n]));
  switch (args.dtype) {
    case DType::f32:
      return choose_guidance<Rule, float>(args, threads);
    case DType::f16:
      return choose_guidance<Rule, Half>(args, threads);
    case DType::bf16:
      return choose_guidance<Rule, BFloat16>(args, threads);
    case DType::words:
      throw std::invalid_argument(name + ": words are no clip");
  }
}

}  // namespace vf::VF_ISA
