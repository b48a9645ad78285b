// y_n = sum_m softmax_m(q_n . k_m / sqrt(D) + bias_nm) v_m, of every pixel and head
//
// qkv: [B, N, P, 3 H D], read in place: a pixel's frames are P rows apart. 16-bit dtypes are in
// cuda/tensor_attention.cuh. For fp32 a block owns 16 queries of one pixel and head, 4 to a warp,
// and walks over the keys, 16 at a time, with a running maximum and sum (Milakov and Gimelshein
// 2018; Dao et al. 2022). Rows pass through shared memory:
//
//   logits  a lane owns one key and some of the warp's queries: whole products, no shuffles
//   sums    a lane owns D / 32 neighbouring elements of all 4 queries; v is read once for them
//
// Neighbouring blocks are the heads of one pixel, whose rows are neighbours. qkv moves once and y
// once for N up to 16, beyond that k and v come once per 16 queries, from cache. Sums are fp32
// FMAs: tensor cores would round to TF32.
#include "cuda/group.cuh"
#include "cuda/tensor_attention.cuh"
#include "temporal_attention.h"

namespace vf {

namespace {

constexpr int kWarps = 4, kBlock = 32 * kWarps;
constexpr int kPerWarp = 4, kQueries = kWarps * kPerWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// Keys at a time, as far as 48 KiB of shared memory go.
template <class T, int kDim>
constexpr int kKeysOf = sizeof(T) == 4 && kDim == 256 ? 8 : 16;

// A lane's neighbouring elements of a row.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Part {
  T at[kCount];
};

template <class T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return __expf(x);
}

template <int kWidth>
__device__ __forceinline__ float largest(float x) {
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset, kWidth));
  return x;
}

template <int kWidth>
__device__ __forceinline__ float sum(float x) {
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(kAllLanes, x, offset, kWidth);
  return x;
}

template <class T>
__device__ __forceinline__ Group<T> load_row(const T* from, bool aligned) {
  return aligned ? load_group<true>(from, Group<T>::kSize)
                 : load_group<false>(from, Group<T>::kSize);
}

// kDim: D rounded up to what the lanes can share. aligned: qkv and out are multiples of 16 bytes.
template <class T, int kDim>
__global__ void __launch_bounds__(kBlock, 4)
    attention_kernel(const TemporalAttentionArgs args, int64_t blocks, float scale, bool aligned) {
  wait_for_inputs();
  constexpr int kKeys = kKeysOf<T, kDim>;
  constexpr int kSize = Group<T>::kSize, kVectors = kDim / kSize, kQuads = kDim / 4;
  constexpr int kPitch = kVectors + 1;  // lanes of different keys then use different banks
  constexpr int kParts = 32 / kKeys, kOwn = kPerWarp / kParts;
  constexpr int kElements = kDim / 32;
  VF_SHARED(Group<float>, queries, kQueries * kQuads);
  VF_SHARED(Group<T>, keys, kKeys * kPitch);
  VF_SHARED(Group<T>, values, kKeys * kVectors);
  VF_SHARED(Group<float>, weights, kWarps * kKeys);  // of a key, for the warp's queries
  VF_SHARED(float, factors, kQueries);

  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int key = lane % kKeys, own = warp * kPerWarp + lane / kKeys * kOwn;
  const int frames = int(args.frames), dim = int(args.head_dim);
  const int64_t width = args.heads * dim, in_frame = args.pixels * 3 * width;
  const int vectors = dim / kSize;

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t head = block % args.heads, pixel = block / args.heads % args.pixels;
    const int64_t rest = block / args.heads / args.pixels, clip = rest % args.batch;
    const int first = int(rest / args.batch) * kQueries;
    const T* rows =
        static_cast<const T*>(args.qkv) + clip * frames * in_frame + pixel * 3 * width + head * dim;

    __syncthreads();  // the block before has been read
    for (int i = int(threadIdx.x); i < kQueries * vectors; i += kBlock) {
      const int n = i / vectors, c = i % vectors;
      Group<T> row{};
      if (first + n < frames) row = load_row(rows + (first + n) * in_frame + c * kSize, aligned);
      Group<float>* to = queries + n * kQuads + c * (kSize / 4);
#pragma unroll
      for (int k = 0; k < kSize; ++k) to[k / 4].at[k % 4] = to_float(row.at[k]) * scale;
    }

    float top[kOwn], total[kOwn], y[kPerWarp][kElements];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) top[j] = -INFINITY, total[j] = 0.0f;
#pragma unroll
    for (int n = 0; n < kPerWarp; ++n)
#pragma unroll
      for (int e = 0; e < kElements; ++e) y[n][e] = 0.0f;

    for (int start = 0; start < frames; start += kKeys) {
      __syncthreads();  // the keys before have been read
      for (int i = int(threadIdx.x); i < kKeys * vectors; i += kBlock) {
        const int m = i / vectors, c = i % vectors;
        Group<T> k{}, v{};
        if (start + m < frames) {
          const T* row = rows + (start + m) * in_frame + c * kSize;
          k = load_row(row + width, aligned);
          v = load_row(row + 2 * width, aligned);
        }
        keys[m * kPitch + c] = k;
        values[m * kVectors + c] = v;
      }
      __syncthreads();

      // Four sums a query, each over every fourth channel: a single one errs twice as much in fp32.
      float parts[kOwn][4] = {};
#pragma unroll 2
      for (int c = 0; c < vectors; ++c) {
        const Group<T> k = keys[key * kPitch + c];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
#pragma unroll
          for (int part = 0; part < kSize / 4; ++part) {
            const Group<float> q = queries[(own + j) * kQuads + c * (kSize / 4) + part];
#pragma unroll
            for (int e = 0; e < 4; ++e)
              parts[j][e] = fmaf(q.at[e], to_float(k.at[4 * part + e]), parts[j][e]);
          }
        }
      }
      float logits[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        logits[j] = (parts[j][0] + parts[j][1]) + (parts[j][2] + parts[j][3]);
        const int n = first + own + j, m = start + key;
        if (args.bias && n < frames && m < frames)
          logits[j] += args.bias[(head * frames + n) * frames + m];
        if (m >= frames) logits[j] = -INFINITY;
        const float new_top = fmaxf(top[j], largest<kKeys>(logits[j]));
        // Where every logit so far is -inf there is nothing to subtract.
        const float origin = new_top == -INFINITY ? 0.0f : new_top;
        const float weight = exponential<T>(logits[j] - origin);
        const float factor = exponential<T>(top[j] - origin);
        total[j] = total[j] * factor + sum<kKeys>(weight);
        top[j] = new_top;
        weights[warp * kKeys + key].at[own % kPerWarp + j] = weight;
        if (key == 0) factors[own + j] = factor;
      }
      __syncwarp();

      float tile[kPerWarp][kElements] =
          {};  // one sum over all frames would err three times as much
      if (lane * kElements < dim) {
#pragma unroll 4
        for (int m = 0; m < kKeys; ++m) {
          const T* row = reinterpret_cast<const T*>(values + m * kVectors) + lane * kElements;
          const auto v = *reinterpret_cast<const Part<T, kElements>*>(row);
          const Group<float> weight = weights[warp * kKeys + m];
#pragma unroll
          for (int e = 0; e < kElements; ++e)
#pragma unroll
            for (int n = 0; n < kPerWarp; ++n)
              tile[n][e] = fmaf(weight.at[n], to_float(v.at[e]), tile[n][e]);
        }
      }
#pragma unroll
      for (int n = 0; n < kPerWarp; ++n)
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          y[n][e] = fmaf(y[n][e], factors[warp * kPerWarp + n], tile[n][e]);
      __syncwarp();
    }

#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (key == 0) factors[own + j] = __frcp_rn(total[j]);
    __syncwarp();
    if (lane * kElements >= dim) continue;
#pragma unroll
    for (int n = 0; n < kPerWarp; ++n) {
      const int frame = first + warp * kPerWarp + n;
      if (frame >= frames) continue;
      Part<T, kElements> part;
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        from_float(part.at[e], y[n][e] * factors[warp * kPerWarp + n]);
      T* out = static_cast<T*>(args.out) + ((clip * frames + frame) * args.pixels + pixel) * width +
               head * dim + lane * kElements;
      if (aligned) {
        *reinterpret_cast<Part<T, kElements>*>(out) = part;
      } else {
        for (int e = 0; e < kElements; ++e) out[e] = part.at[e];
      }
    }
  }
}

inline float scale_of(const TemporalAttentionArgs& args) {
  return args.scale > 0 ? args.scale : 1.0f / sqrtf(float(args.head_dim));
}

inline bool are_aligned(const TemporalAttentionArgs& args) {
  return reinterpret_cast<uintptr_t>(args.qkv) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
}

template <class T, int kDim>
void launch(const TemporalAttentionArgs& args, void* stream) {
  const int64_t tiles = (args.frames + kQueries - 1) / kQueries;
  const int64_t blocks = args.batch * args.pixels * args.heads * tiles;
  const dim3 grid(unsigned(std::min<int64_t>(blocks, 0x7fffffff)));
  VF_LAUNCH((attention_kernel<T, kDim>), grid, dim3(kBlock), stream, args, blocks, scale_of(args),
            are_aligned(args));
}

void choose_dim(const TemporalAttentionArgs& args, void* stream) {
  if (args.head_dim <= 32)
    launch<float, 32>(args, stream);
  else if (args.head_dim <= 64)
    launch<float, 64>(args, stream);
  else if (args.head_dim <= 128)
    launch<float, 128>(args, stream);
  else
    launch<float, 256>(args, stream);
}

template <class T, int kDim>
void launch_tensor(const TemporalAttentionArgs& args, bool aligned, void* stream) {
  const int64_t warps = args.pixels * args.heads, parts = kDim <= 128 ? 1 : 2;
  const int64_t tiles = (args.frames + kTile - 1) / kTile;
  const dim3 grid(unsigned((warps + kTensorWarps - 1) / kTensorWarps), unsigned(tiles * parts),
                  unsigned(std::min(args.batch, kMaxBlocks)));
  const auto kernel =
      aligned ? tensor_attention_kernel<T, kDim, true> : tensor_attention_kernel<T, kDim, false>;
  VF_LAUNCH(kernel, grid, dim3(32 * kTensorWarps), stream, args, int(parts), scale_of(args));
}

template <class T>
void choose_tensor_dim(const TemporalAttentionArgs& args, void* stream) {
  const bool aligned = are_aligned(args);
  if (args.head_dim <= 64)
    launch_tensor<T, 64>(args, aligned, stream);
  else if (args.head_dim <= 128)
    launch_tensor<T, 128>(args, aligned, stream);
  else
    launch_tensor<T, 256>(args, aligned, stream);
}

}  // namespace

void temporal_attention_cuda(const TemporalAttentionArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (args.dtype == DType::f32)
    choose_dim(args, stream);
  else if (args.dtype == DType::f16)
    choose_tensor_dim<__half>(args, stream);
  else
    choose_tensor_dim<__nv_bfloat16>(args, stream);
  cuda_check(cudaGetLastError(), "temporal_attention");
}

}  // namespace vf
