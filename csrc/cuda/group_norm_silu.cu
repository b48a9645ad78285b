// y = SiLU(((x - mu) / sqrt(var + eps) weight + bias) (1 + scale) + shift)
//
// x: [B, P, C]; a set is num_frames images, which share statistics. Three launches, no atomics, so
// that the order of sums depends on the shape alone:
//
//   channel_kernel  mean and centred squares of each channel in each chunk of a set's rows
//   group_kernel    those of a group's channels in all chunks, merged by one warp
//   apply_kernel    y
//
// In the first and last a thread owns the channels of one 16-byte vector and every `slots`-th row,
// so that a warp reads neighbours. x moves twice, y once; what the first two write is small beside
// that.
#include "cuda/group.cuh"
#include "group_norm_silu.h"

namespace vf {

namespace {

// Which channels and rows a thread owns.
struct Tiling {
  int columns;  // vectors of one block
  int slots;    // threads a column has
};

template <class T>
Tiling tiling(int64_t channels) {
  const int64_t columns = (channels + Group<T>::kSize - 1) / Group<T>::kSize;
  const int in_block = int(std::min<int64_t>(columns, kThreads));
  return {in_block, kThreads / in_block};
}

// Partial results: (mean, squares) of [set, chunk, channel], then (mean, 1 / deviation) of [set,
// group].
struct Statistics {
  int64_t sets, set_rows, chunks;
  float *partial, *groups;

  explicit Statistics(const GroupNormSiluArgs& args)
      : sets(args.images / args.num_frames),
        set_rows(args.rows * args.num_frames),
        chunks((set_rows + args.chunk_rows - 1) / args.chunk_rows),
        partial(args.workspace),
        groups(partial + 2 * sets * chunks * args.channels) {}
};

// Welford's sums of differences from the thread's first row, which are small where the mean is
// large; then those of the slots, by two sums over their means.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    channel_kernel(const GroupNormSiluArgs args, const Statistics statistics, const Tiling tiles) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize;
  VF_SHARED(float, means, kThreads* kSize);
  VF_SHARED(float, squares, kThreads* kSize);
  const int slot = int(threadIdx.x) / tiles.columns;
  const int64_t first_channel = int64_t(blockIdx.y) * tiles.columns * kSize;
  const int64_t channel = first_channel + int(threadIdx.x) % tiles.columns * kSize;
  const int64_t set = blockIdx.x / statistics.chunks, chunk = blockIdx.x % statistics.chunks;
  const int64_t first = chunk * args.chunk_rows;
  const int64_t rest = statistics.set_rows - first;
  const int rows = int(rest < args.chunk_rows ? rest : args.chunk_rows);
  const T* x = static_cast<const T*>(args.x) + (set * statistics.set_rows + first) * args.channels;

  if (slot < tiles.slots) {
    float origin[kSize], mean[kSize] = {}, sum[kSize] = {};
    const bool there = slot < rows && channel < args.channels;
    const int64_t count = args.channels - channel;
    Group<T> values{};
    if (there) values = load_group<kVector>(x + slot * args.channels + channel, count);
#pragma unroll
    for (int k = 0; k < kSize; ++k) origin[k] = to_float(values.at[k]);
    float seen = 1.0f;
    if (there) {
#pragma unroll 4
      for (int row = slot + tiles.slots; row < rows; row += tiles.slots) {
        values = load_group<kVector>(x + int64_t(row) * args.channels + channel, count);
        seen += 1.0f;
        const float share = __frcp_rn(seen);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const float difference = to_float(values.at[k]) - origin[k];
          const float apart = difference - mean[k];
          mean[k] += apart * share;
          sum[k] += apart * (difference - mean[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      means[threadIdx.x * kSize + k] = origin[k] + mean[k];
      squares[threadIdx.x * kSize + k] = sum[k];
    }
  }
  __syncthreads();

  const int width = tiles.columns * kSize;
  for (int c = int(threadIdx.x); c < width; c += kThreads) {
    if (first_channel + c >= args.channels) continue;
    // Slot s has rows s, s + slots, ...; the first has one at least.
    const auto size = [&](int s) {
      return s < rows ? float((rows - s + tiles.slots - 1) / tiles.slots) : 0.0f;
    };
    float apart = 0.0f, total = 0.0f;
    for (int s = 1; s < tiles.slots; ++s) apart += size(s) * (means[s * width + c] - means[c]);
    apart /= float(rows);
    for (int s = 0; s < tiles.slots; ++s) {
      const float from_mean = (means[s * width + c] - means[c]) - apart;
      total += squares[s * width + c] + size(s) * (from_mean * from_mean);
    }
    float* entry = statistics.partial + 2 * (blockIdx.x * args.channels + first_channel + c);
    entry[0] = means[c] + apart;
    entry[1] = total;
  }
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__global__ void __launch_bounds__(kThreads)
    group_kernel(const GroupNormSiluArgs args, const Statistics statistics) {
  wait_for_inputs();
  const int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (group >= statistics.sets * args.groups) return;
  const int width = int(args.channels / args.groups), lane = int(threadIdx.x) % 32;
  const int64_t set = group / args.groups, first = group % args.groups * width;
  const float* partial = statistics.partial + 2 * (set * statistics.chunks * args.channels + first);
  const float origin = partial[0];
  const float size = float(statistics.set_rows) * float(width);
  const int entries = int(statistics.chunks) * width;
  const auto entry_of = [&](int e) {
    return partial + 2 * (e / width * args.channels + e % width);
  };
  const auto rows_of = [&](int e) {
    const int64_t rest = statistics.set_rows - e / width * args.chunk_rows;
    return float(rest < args.chunk_rows ? rest : args.chunk_rows);
  };
  float apart = 0.0f, total = 0.0f;
  for (int e = lane; e < entries; e += 32) apart += rows_of(e) * (entry_of(e)[0] - origin);
  apart = warp_sum(apart) / size;
  for (int e = lane; e < entries; e += 32) {
    const float* entry = entry_of(e);
    const float from_mean = (entry[0] - origin) - apart;
    total += entry[1] + rows_of(e) * (from_mean * from_mean);
  }
  total = warp_sum(total);
  if (lane == 0) {
    statistics.groups[2 * group] = origin + apart;
    statistics.groups[2 * group + 1] = 1.0f / sqrtf(total / size + args.eps);
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 3)
    apply_kernel(const GroupNormSiluArgs args, const float* groups, const Tiling tiles,
                 int64_t tile_rows, int64_t row_tiles) {
  wait_for_inputs();
  constexpr int kSize = Group<T>::kSize;
  const int slot = int(threadIdx.x) / tiles.columns;
  const int64_t column = int64_t(blockIdx.y) * tiles.columns + int(threadIdx.x) % tiles.columns;
  const int64_t channel = column * kSize, count = args.channels - channel;
  if (slot >= tiles.slots || count <= 0) return;
  const int64_t image = blockIdx.x / row_tiles, first = blockIdx.x % row_tiles * tile_rows;
  const int64_t last = first + tile_rows < args.rows ? first + tile_rows : args.rows;

  const int64_t width = args.channels / args.groups;
  const float* of_set = groups + 2 * (image / args.num_frames * args.groups);
  float mean[kSize], factor[kSize], offset[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    mean[k] = factor[k] = offset[k] = 0.0f;
    const int64_t c = channel + k;
    if (c >= args.channels) continue;
    mean[k] = of_set[2 * (c / width)];
    factor[k] = of_set[2 * (c / width) + 1];
    if (args.weight) factor[k] *= args.weight[c];
    if (args.bias) offset[k] = args.bias[c];
    if (args.scale) {
      const float more = 1.0f + args.scale[image * args.channels + c];
      factor[k] *= more;
      offset[k] = offset[k] * more + args.shift[image * args.channels + c];
    }
  }
  const int64_t at_image = image * args.rows * args.channels + channel;
  for (int64_t row = first + slot; row < last; row += tiles.slots) {
    const int64_t at = at_image + row * args.channels;
    const Group<T> x = load_group<kVector>(static_cast<const T*>(args.x) + at, count);
    Group<T> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      float y = (to_float(x.at[k]) - mean[k]) * factor[k] + offset[k];
      if (args.silu) y = __fdividef(y, 1.0f + __expf(-y));
      from_float(out.at[k], y);
    }
    store_group<kVector>(static_cast<T*>(args.out) + at, out, count);
  }
}

template <class T, bool kVector>
void launch(const GroupNormSiluArgs& args, void* stream) {
  const Statistics statistics(args);
  const Tiling tiles = tiling<T>(args.channels);
  const int64_t in_block = int64_t(tiles.columns) * Group<T>::kSize;
  const unsigned columns = unsigned((args.channels + in_block - 1) / in_block);
  VF_LAUNCH((channel_kernel<T, kVector>),
            dim3(unsigned(statistics.sets * statistics.chunks), columns), dim3(kThreads), stream,
            args, statistics, tiles);
  const int64_t groups = statistics.sets * args.groups;
  VF_LAUNCH(group_kernel, dim3(unsigned((groups * 32 + kThreads - 1) / kThreads)), dim3(kThreads),
            stream, args, statistics);
  const int64_t tile_rows = 8 * tiles.slots;  // a thread's reads of the tables serve 8 rows
  const int64_t row_tiles = (args.rows + tile_rows - 1) / tile_rows;
  VF_LAUNCH((apply_kernel<T, kVector>), dim3(unsigned(args.images * row_tiles), columns),
            dim3(kThreads), stream, args, statistics.groups, tiles, tile_rows, row_tiles);
  cuda_check(cudaGetLastError(), "group_norm_silu");
}

template <class T>
void choose_vectors(const GroupNormSiluArgs& args, void* stream) {
  bool fit = args.channels % Group<T>::kSize == 0;
  for (const void* address : {args.x, static_cast<const void*>(args.out)})
    fit = fit && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  if (fit)
    launch<T, true>(args, stream);
  else
    launch<T, false>(args, stream);
}

}  // namespace

void group_norm_silu_cuda(const GroupNormSiluArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (args.dtype == DType::f32)
    choose_vectors<float>(args, stream);
  else if (args.dtype == DType::f16)
    choose_vectors<__half>(args, stream);
  else
    choose_vectors<__nv_bfloat16>(args, stream);
}

}  // namespace vf
