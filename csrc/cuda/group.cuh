// What a thread owns: the 16 bytes of neighbours that one instruction moves, and their arithmetic
// in fp32; and a launch shape for clips of them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda_launch.h"
#include "common/noise.h"

namespace vf {

constexpr int kThreads = 256;
constexpr int kMaxRun = 16;            // frames that a block walks over
constexpr int64_t kMaxBlocks = 65535;  // of a grid in y or z

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
}

template <class T>
struct alignas(16) Group {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

template <class T>
struct Floats {
  float at[Group<T>::kSize];
};

template <class T>
__device__ __forceinline__ uint4 words_of(const Group<T>& x) {
  uint4 words;
  memcpy(&words, &x, sizeof words);
  return words;
}

template <class T>
__device__ __forceinline__ Group<T> group_of(const uint4& words) {
  Group<T> x;
  memcpy(&x, &words, sizeof x);
  return x;
}

// The elements in fp32.
template <class T>
__device__ __forceinline__ Floats<T> floats_of(const uint4& words) {
  Floats<T> x;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // an instruction each: their bits, and zeros
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x.at[2 * k] = __uint_as_float(pairs[k] << 16);
      x.at[2 * k + 1] = __uint_as_float(pairs[k] & 0xffff0000u);
    }
  } else {
    const Group<T> group = group_of<T>(words);
#pragma unroll
    for (int k = 0; k < Group<T>::kSize; ++k) x.at[k] = to_float(group.at[k]);
  }
  return x;
}

// kVector: `from` is a multiple of 16 bytes and the whole group is there, so that one instruction
// moves it. Otherwise the first `count` elements move one by one.
template <bool kVector, class T>
__device__ __forceinline__ Group<T> load_group(const T* from, int64_t count) {
  if constexpr (kVector) return *reinterpret_cast<const Group<T>*>(from);
  Group<T> x{};
  for (int k = 0; k < Group<T>::kSize; ++k)
    if (k < count) x.at[k] = from[k];
  return x;
}

// nvcc 13.0 makes four stores of 4 bytes of an assignment, and of __stwb one that other blocks must
// see at once.
__device__ __forceinline__ void store_16_bytes(void* to, const uint4& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = x;
#endif
}

template <bool kVector, class T>
__device__ __forceinline__ void store_group(T* to, const Group<T>& x, int64_t count) {
  if constexpr (kVector) {
    store_16_bytes(to, words_of(x));
  } else {
    for (int k = 0; k < Group<T>::kSize; ++k)
      if (k < count) to[k] = x.at[k];
  }
}

// The words of counter element / 4; element is a multiple of 4.
__device__ __forceinline__ void draw_words(const NoiseSource& from, int64_t element,
                                           uint32_t words[4]) {
  words[0] = uint32_t(element / 4);
  words[1] = from.frame;
  words[2] = from.sample;
  words[3] = from.stream_and_step;
  philox4x32_10<ScalarLanes>(words, from.keys);
}

constexpr int kNormals = 4;  // of one counter

// kSize normals from `element` on.
template <int kSize>
__device__ __forceinline__ void draw_normals(const NoiseSource& from, int64_t element,
                                             float normals[kSize]) {
#pragma unroll
  for (int first = 0; first < kSize; first += kNormals) {
    uint32_t words[4];
    draw_words(from, element + first, words);
    box_muller<ScalarLanes>(words, normals + first);
  }
}

// blockIdx.x: kThreads groups of pixels; y: a clip; z: a run of `run` frames. y and z as far as a
// grid goes: the kernel strides over the rest.
struct FrameGrid {
  dim3 blocks;
  int run;
};

inline FrameGrid frame_grid(int64_t batch, int64_t frames, int64_t pixels, int group, int device) {
  int processors = 0;
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  const int64_t per_block = int64_t(kThreads) * group;
  const int64_t blocks_x = (pixels + per_block - 1) / per_block;
  // Halved until every processor has four blocks.
  int run = int(std::min<int64_t>(frames, kMaxRun));
  const auto runs = [&] { return (frames + run - 1) / run; };
  while (run > 1 && blocks_x * batch * runs() < 4 * int64_t(processors)) run = (run + 1) / 2;
  return {dim3(unsigned(blocks_x), unsigned(std::min<int64_t>(batch, kMaxBlocks)),
               unsigned(std::min<int64_t>(runs(), kMaxBlocks))),
          run};
}

}  // namespace vf
