// Temporal attention of 16-bit dtypes on tensor cores: a warp has 16 queries of one pixel and head.
//
// q, k and v go straight from global memory into the fragments of common/cuda_mma.h, 16 bytes a
// load. Which column of a product is which channel is free, so a lane's 8 neighbours are
//
//   q kT  its pairs of columns in two products, the same in q and in k
//   p v   its column g in 8 products: product j has channels j, 8 + j, 16 + j, ...
//
// so that it ends with 16 neighbours of y in two rows. p goes from d of the first into a of the
// second, where it is: no shared memory, no barrier, no shuffle but for a row's maximum and sum.
// Beyond 16 frames keys come 16 at a time with a running maximum and sum.
#pragma once
#include "common/cuda_mma.h"
#include "cuda/group.cuh"
#include "temporal_attention.h"

namespace vf {

constexpr int kTensorWarps = 4;  // of a block; they share nothing
constexpr int kTile = 16;        // frames: queries of a warp, keys at a time

// Of the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Two elements in a word, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pair(T first, T second) {
  const T both[2] = {first, second};
  uint32_t word;
  memcpy(&word, both, sizeof word);
  return word;
}

template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
  T a, b;
  from_float(a, first);
  from_float(b, second);
  return pair(a, b);
}

// A row's pairs 2 j and 2 j + 1.
template <class T>
__device__ __forceinline__ uint32_t pair_of(const Group<T>& row, int j) {
  return pair(row.at[2 * j], row.at[2 * j + 1]);
}

// 8 channels of a frame; zeros where either is not there.
template <bool kVector, class T>
__device__ __forceinline__ Group<T> load_channels(const T* rows, int frame, int64_t in_frame,
                                                  int channel, int frames, int dim) {
  Group<T> part{};
  if (frame < frames && channel < dim)
    part = load_group<kVector>(rows + frame * in_frame + channel, Group<T>::kSize);
  return part;
}

// The keys whose weights lane t of a row has, 0 to 3.
__device__ __forceinline__ int key_of(int t, int i) { return 2 * t + i % 2 + i / 2 * 8; }

// kDim: of q and k, at least D. A warp has 128 channels of y at most: `parts` of them make a head.
template <class T, int kDim, bool kVector>
__global__ void __launch_bounds__(32 * kTensorWarps, kDim <= 64 && kVector ? 3 : 2)
    tensor_attention_kernel(const TemporalAttentionArgs args, int parts, float scale) {
  wait_for_inputs();
  constexpr int kBlocks = kDim <= 64 ? 1 : 2;  // of 64 channels
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int frames = int(args.frames), dim = int(args.head_dim), heads = int(args.heads);
  const unsigned item = blockIdx.x * kTensorWarps + threadIdx.x / 32;
  if (item >= unsigned(args.pixels * heads)) return;  // as a whole warp
  const int head = int(item % heads);
  const int64_t pixel = item / heads, width = int64_t(heads) * dim;
  const int64_t in_frame = args.pixels * 3 * width;
  const int first = int(blockIdx.y) / parts * kTile, out_channel = int(blockIdx.y) % parts * 128;

  for (int64_t clip = blockIdx.z; clip < args.batch; clip += gridDim.z) {
    const T* rows =
        static_cast<const T*>(args.qkv) + clip * frames * in_frame + pixel * 3 * width + head * dim;
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of rows g and g + 8
    float y[kBlocks][8][4] = {};

    for (int start = 0; start < frames; start += kTile) {
      // All loads of a head of 64 channels before the first product.
      Group<T> v[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = start + key_of(t, i), channel = out_channel + 64 * b + 8 * g;
          v[b][i] = load_channels<kVector>(rows + 2 * width, row, in_frame, channel, frames, dim);
        }

      float bias[2][4] = {};
      if (args.bias) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // the last query or key again where there is none
          const int query = min(first + g + i / 4 * 8, frames - 1);
          const int key = min(start + key_of(t, i % 4), frames - 1);
          bias[i / 4][i % 4] = args.bias[(int64_t(head) * frames + query) * frames + key];
        }
      }

      float logits[2][4] = {};  // keys 0 to 7 and 8 to 15
#pragma unroll 1
      for (int begin = 0; begin < kDim; begin += 64) {
        Group<T> q[2][2], k[2][2];
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half, channel = begin + 32 * c + 8 * t;
            q[c][half] = load_channels<kVector>(rows, first + row, in_frame, channel, frames, dim);
            k[c][half] =
                load_channels<kVector>(rows + width, start + row, in_frame, channel, frames, dim);
          }
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            const uint32_t a[4] = {pair_of(q[c][0], j), pair_of(q[c][1], j),
                                   pair_of(q[c][0], j + 1), pair_of(q[c][1], j + 1)};
#pragma unroll
            for (int half = 0; half < 2; ++half)
              warp_mma<T>(logits[half], a, {pair_of(k[c][half], j), pair_of(k[c][half], j + 1)});
          }
      }

      uint32_t p[4];
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float logit[4], weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          logit[i] = fmaf(logits[i / 2][2 * r + i % 2], scale, bias[r][i]);
          if (start + key_of(t, i) >= frames) logit[i] = -INFINITY;
        }
        const float most = fmaxf(fmaxf(logit[0], logit[1]), fmaxf(logit[2], logit[3]));
        const float new_top = fmaxf(top[r], row_max(most));
        // Where every logit so far is -inf there is nothing to subtract.
        const float origin = new_top == -INFINITY ? 0.0f : new_top;
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = __expf(logit[i] - origin);
        factor[r] = __expf(top[r] - origin);
        top[r] = new_top;
        // Of the lane's own keys; the row's lanes are summed at the end.
        total[r] = total[r] * factor[r] + ((weight[0] + weight[1]) + (weight[2] + weight[3]));
        p[r] = rounded_pair<T>(weight[0], weight[1]);
        p[2 + r] = rounded_pair<T>(weight[2], weight[3]);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) y[b][j][i] *= factor[i / 2];
          warp_mma<T>(y[b][j], p,
                      {pair(v[b][0].at[j], v[b][1].at[j]), pair(v[b][2].at[j], v[b][3].at[j])});
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int frame = first + g + 8 * r;
      const float share = __fdividef(1.0f, row_sum(total[r]));
      T* out = static_cast<T*>(args.out) + ((clip * frames + frame) * args.pixels + pixel) * width +
               head * dim;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // columns 2 t and 2 t + 1: 8 channels each
          const int channel = out_channel + 64 * b + 8 * (2 * t + i);
          Group<T> part;
#pragma unroll
          for (int j = 0; j < 8; ++j) from_float(part.at[j], y[b][j][2 * r + i] * share);
          if (frame < frames && channel < dim)
            store_group<kVector>(out + channel, part, Group<T>::kSize);
        }
    }
  }
}

}  // namespace vf
