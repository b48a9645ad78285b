// b or r_i of N(0, I), straight from the counter
//
// A task is one tile: kTileFrames frames x kTilePixels pixels of one clip. One write of the clip;
// the numbers pass through a buffer in the L1 cache.
#include "decomposed_noise.h"

#include "cpu/base/parallel.h"
#include "cpu/noise.h"

namespace vf::VF_ISA {

namespace {

constexpr int64_t kTileFrames = 8;
constexpr int64_t kTilePixels = 2048;         // a multiple of kBlock
constexpr int64_t kElementsPerThread = 4096;  // below that a thread costs more than it brings

// The normals, which lie as pairs of T, in order and rounded.
template <class T>
void write_row(T* out, const float* normals, int64_t count) {
  for (int64_t i = 0; i < count; i += kPair) {
    const Pair x = load_pair(normals + i);
    if (count - i >= kPair) {
      store_pair(out + i, x);
    } else {
      T rest[kPair];
      store_pair(rest, x);
      std::memcpy(out + i, rest, size_t(count - i) * sizeof(T));
    }
  }
}

// The words of the elements first ... first + count, four of every counter, in order.
void write_words(const NoiseSource& from, int64_t first, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; i += kBlock) {
    U32 words[4];
    draw_words<float>(from, uint32_t((first + i) / 4), words);
    uint32_t in_order[kBlock];
    for (int position = 0; position < kLanes; ++position)
      for (int k = 0; k < 4; ++k)
        in_order[4 * counter_at<float>(position) + k] = words[k][position];
    std::memcpy(out + i, in_order, size_t(std::min<int64_t>(kBlock, count - i)) * sizeof(uint32_t));
  }
}

template <class T>
void write_tile(const DecomposedNoiseArgs& args, int64_t clip, int64_t first_frame,
                int64_t last_frame, int64_t first_pixel, int64_t pixels) {
  const Stream stream = args.base ? kBaseStream : kResidualStream;
  alignas(64) float normals[kTilePixels];
  for (int64_t n = first_frame; n < last_frame; ++n) {
    T* out = static_cast<T*>(args.out) + (clip * args.frames + n) * args.pixels + first_pixel;
    const NoiseSource from{args.base ? 0 : args.frame_offset + uint32_t(n),
                           args.sample_offset + uint32_t(clip), stream_and_step(stream, args.step),
                           args.seed};
    if constexpr (std::is_same_v<T, uint32_t>) {
      write_words(from, first_pixel, pixels, out);
    } else {
      draw<T>(from, first_pixel, pixels, normals);
      write_row(out, normals, pixels);
    }
  }
}

template <class T>
void write_clips(const DecomposedNoiseArgs& args, int64_t threads) {
  const int64_t frame_tiles = (args.frames + kTileFrames - 1) / kTileFrames;
  const int64_t pixel_tiles = (args.pixels + kTilePixels - 1) / kTilePixels;
  threads = std::min(threads, args.batch * args.frames * args.pixels / kElementsPerThread);
  parallel_for(args.batch * frame_tiles * pixel_tiles, threads, [&](int64_t task) {
    const int64_t first_pixel = task % pixel_tiles * kTilePixels;
    const int64_t first_frame = task / pixel_tiles % frame_tiles * kTileFrames;
    write_tile<T>(args, task / pixel_tiles / frame_tiles, first_frame,
                  std::min(first_frame + kTileFrames, args.frames), first_pixel,
                  std::min(kTilePixels, args.pixels - first_pixel));
  });
}

}  // namespace

void decomposed_noise_cpu(const DecomposedNoiseArgs& args, int64_t threads) {
  switch (args.dtype) {
    case DType::f32:
      return write_clips<float>(args, threads);
    case DType::f16:
      return write_clips<Half>(args, threads);
    case DType::bf16:
      return write_clips<BFloat16>(args, threads);
    case DType::words:
      return write_clips<uint32_t>(args, threads);
  }
}

}  // namespace vf::VF_ISA
