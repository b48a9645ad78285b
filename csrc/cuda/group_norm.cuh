// What the kernels of group norm share: slabs of whole groups, their statistics by one block, and
// the line y = a (x - centre) + b of each channel.
#pragma once
#include <numeric>

#include "cuda/group.cuh"
#include "group_norm_silu.h"

namespace vf {

constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 8;  // vectors that a thread has in flight

// Of a row of out: those of x, then those of x2.
VF_HOST_DEVICE int64_t all_channels(const GroupNormSiluArgs& args) {
  return args.channels + args.channels2;
}

// A thread's `count` channels from `channel` on, in rows `apart` rows from each other. A vector
// lies in x or in x2. Elements that move one by one may begin in x and end in x2.
template <class T, bool kVector>
struct Column {
  const T *from, *rest;  // rest: in x2, what follows the channels of x
  int step, rest_step;   // from row to row
  int here, count;       // here: channels of `from`

  __device__ __forceinline__ Column(const GroupNormSiluArgs& args, int64_t row, int apart,
                                    int64_t channel, int count)
      : count(count) {
    const T *x = static_cast<const T*>(args.x), *x2 = static_cast<const T*>(args.x2);
    const bool in_x2 = x2 && channel >= args.channels;
    const int64_t channels = in_x2 ? args.channels2 : args.channels;
    from = (in_x2 ? x2 : x) + row * channels + (in_x2 ? channel - args.channels : channel);
    step = apart * int(channels);
    here = x2 && !in_x2 ? int(min(int64_t(count), args.channels - channel)) : count;
    rest = x2 ? x2 + row * args.channels2 : x;
    rest_step = apart * int(args.channels2);
  }

  __device__ __forceinline__ Group<T> load(int row) const {
    if constexpr (kVector) return load_group<true>(from + int64_t(row) * step, count);
    Group<T> x{};
    for (int k = 0; k < Group<T>::kSize; ++k)
      if (k < count)
        x.at[k] =
            k < here ? from[int64_t(row) * step + k] : rest[int64_t(row) * rest_step + k - here];
    return x;
  }
};

// A cell is a group, or a part of one that is wider than a block: what has statistics of its own.
struct Slab {
  int cell, pieces;  // channels of a cell, the last of a group may have fewer; cells of a group
  int channels, columns;  // of a slab: whole cells; one, where a group has several
  int slots;              // threads that share a column
  int count;              // slabs of a set
};

__device__ __forceinline__ int64_t first_channel(const Slab& slab, int index, int64_t width) {
  if (slab.pieces == 1) return int64_t(index) * slab.channels;
  return index / slab.pieces * width + int64_t(index % slab.pieces) * slab.cell;
}

__device__ __forceinline__ int cell_channels(const Slab& slab, int piece, int64_t width) {
  return int(min(int64_t(slab.cell), width - int64_t(piece) * slab.cell));
}

// The narrowest slab of `least` channels or more that divides a row; else the widest of a block.
// size: of a vector, which slabs are multiples of; 1 where elements move one by one.
inline Slab make_slab(const GroupNormSiluArgs& args, int in_vector, int size, int64_t least) {
  const int64_t width = all_channels(args) / args.groups, most = int64_t(kThreads) * in_vector;
  Slab slab{int(std::min(width, most)), int((width + most - 1) / most)};
  slab.channels = slab.cell;
  if (slab.pieces == 1) {
    const int64_t unit = std::lcm(width, int64_t(size));
    for (int64_t wide = unit; wide <= std::min(most, all_channels(args)); wide += unit) {
      if (all_channels(args) % wide) continue;
      slab.channels = int(wide);
      if (wide >= least) break;
    }
  }
  slab.columns = (slab.channels + in_vector - 1) / in_vector;
  slab.slots = kThreads / slab.columns;
  slab.count =
      int(slab.pieces == 1 ? all_channels(args) / slab.channels : args.groups * slab.pieces);
  return slab;
}

// ---- Statistics ---------------------------------------------------------------------------------

template <class T>
struct Moments {
  float mean[Group<T>::kSize] = {}, squares[Group<T>::kSize] = {};
};

// Merges kBatch rows, of which `here` count: their mean first, then differences from it.
template <class T, bool kWhole>
__device__ __forceinline__ void add_rows(Moments<T>& sum, const Group<T> (&rows)[kBatch], int here,
                                         int before) {
  const float inverse = __fdividef(1.0f, float(here));
  const float share = __fdividef(float(here), float(before + here));
#pragma unroll
  for (int k = 0; k < Group<T>::kSize; ++k) {
    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) total += kWhole || i < here ? to_float(rows[i].at[k]) : 0.0f;
    const float mean = total * inverse;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float apart = kWhole || i < here ? to_float(rows[i].at[k]) - mean : 0.0f;
      squares = fmaf(apart, apart, squares);
    }
    const float apart = mean - sum.mean[k];
    sum.mean[k] = fmaf(apart, share, sum.mean[k]);
    sum.squares[k] += fmaf(apart * apart, float(before) * share, squares);
  }
}

// Of a thread's `rows` rows; keep(i, vector) sees each.
template <class T, bool kVector, class Keep>
__device__ __forceinline__ Moments<T> moments_of(const Column<T, kVector>& column, int rows,
                                                 const Keep& keep) {
  Moments<T> sum;
  Group<T> batch[kBatch];
  for (int first = 0; first < rows; first += kBatch) {
    const int here = min(kBatch, rows - first);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)  // the last row again where there is none: no branch
      batch[i] = column.load(first + min(i, here - 1));
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (i < here) keep(first + i, batch[i]);
    if (here == kBatch)
      add_rows<T, true>(sum, batch, here, first);
    else
      add_rows<T, false>(sum, batch, here, first);
  }
  return sum;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Rows that a slot has, of `rows`: slots + s, 2 slots + s and so on.
__device__ __forceinline__ int rows_of(int slot, int rows, int slots) {
  return slot < rows && slot < slots ? (rows - slot + slots - 1) / slots : 0;
}

// Merges what the threads of a block have of `rows` rows; a warp calls each(cell, mean, squares) of
// one, in all its lanes. width: channels of this slab's cells.
template <class T, class Each>
__device__ __forceinline__ void merge(const Moments<T>& own, const Slab& slab, int rows, int width,
                                      const Each& each) {
  constexpr int kSize = Group<T>::kSize;
  VF_SHARED(float, means, kThreads* kSize);
  VF_SHARED(float, squares, kThreads* kSize);
  VF_SHARED(float, sizes, kThreads);
  const int tid = int(threadIdx.x), channels = slab.columns * kSize;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    means[tid * kSize + k] = own.mean[k];
    squares[tid * kSize + k] = own.squares[k];
  }
  __syncthreads();

  // Slots, into `parts` of them. Part p is slots p, p + parts, ...: its first is its result.
  int parts = 1;
  while (2 * parts * channels <= kThreads && 2 * parts <= slab.slots) parts *= 2;
  for (int i = tid; i < parts * channels; i += kThreads) {
    float size = 0.0f, apart = 0.0f;
    const float origin = means[i];
    int at = i;
    for (int s = i / channels; s < slab.slots; s += parts, at += parts * channels) {
      const float n = float(rows_of(s, rows, slab.slots));
      size += n;
      apart = fmaf(n, means[at] - origin, apart);
    }
    apart = size > 0.0f ? __fdividef(apart, size) : 0.0f;
    float total = 0.0f;
    at = i;
    for (int s = i / channels; s < slab.slots; s += parts, at += parts * channels) {
      const float n = float(rows_of(s, rows, slab.slots)), from_mean = means[at] - origin - apart;
      total += fmaf(n * from_mean, from_mean, squares[at]);
    }
    means[i] = origin + apart;
    squares[i] = total;
    if (i % channels == 0) sizes[i / channels] = size;  // the same of every channel
  }
  __syncthreads();

  // Parts and channels of a cell, by a warp.
  const int lane = tid % 32, cells = slab.pieces == 1 ? slab.channels / slab.cell : 1;
  const int more_parts = 32 / width, more_channels = 32 % width;
  for (int cell = tid / 32; cell < cells; cell += kWarps) {
    const auto entries = [&](const auto& body) {
      int part = lane / width, c = lane % width;
      while (part < parts) {
        body(part * channels + cell * width + c, sizes[part]);
        part += more_parts, c += more_channels;
        if (c >= width) c -= width, ++part;
      }
    };
    const float origin = means[cell * width];
    float apart = 0.0f, total = 0.0f;
    entries([&](int at, float n) { apart = fmaf(n, means[at] - origin, apart); });
    apart = __fdividef(warp_sum(apart), float(rows) * float(width));
    entries([&](int at, float n) {
      const float from_mean = means[at] - origin - apart;
      total += fmaf(n * from_mean, from_mean, squares[at]);
    });
    each(cell, origin + apart, warp_sum(total));
  }
}

// ---- y ------------------------------------------------------------------------------------------

// Of one channel. Before its statistics are known, mu = 0 and var + eps = 1.
struct Line {
  float a, b, centre;
};

__device__ __forceinline__ Line modulated(const GroupNormSiluArgs& args, int64_t image,
                                          int64_t channel) {
  float factor = args.weight ? args.weight[channel] : 1.0f;
  float offset = args.bias ? args.bias[channel] : 0.0f;
  if (args.scale) {
    const int row = int(image) / int(args.modulation_images);
    const int64_t at = row * args.modulation_stride + channel;
    const float more = 1.0f + args.scale[at];
    factor *= more;
    offset = fmaf(offset, more, args.shift[at]);
  }
  return {factor, offset, 0.0f};
}

// Where x has 32 bits, x - mu comes first: a x + b would lose what a large mean has in common.
template <class T>
__device__ __forceinline__ Line normalised(const Line& line, float mean, float inverse) {
  const float a = line.a * inverse;
  if constexpr (sizeof(T) == 4) return {a, line.b, mean};
  return {a, line.b - mean * a, 0.0f};
}

// Of a thread's channels.
template <class T>
struct Lines {
  Line at[Group<T>::kSize];
  __device__ __forceinline__ void load(const Line* table) {
#pragma unroll
    for (int k = 0; k < Group<T>::kSize; ++k) at[k] = table[k];
  }
  __device__ __forceinline__ Group<T> y(const Group<T>& x, bool silu) const {
    Group<T> out;
#pragma unroll
    for (int k = 0; k < Group<T>::kSize; ++k) {
      // Not fused: where all of a group are equal, a x is the mean's.
      const float centred = sizeof(T) == 4 ? to_float(x.at[k]) - at[k].centre : to_float(x.at[k]);
      float y = at[k].a * centred + at[k].b;
      if (silu) y = __fdividef(y, 1.0f + __expf(-y));
      from_float(out.at[k], y);
    }
    return out;
  }
};

}  // namespace vf
