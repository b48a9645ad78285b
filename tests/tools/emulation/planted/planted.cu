// Correct kernels and planted bugs, for tests/cuda/test_emulator.py: `planted <case>`.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/cuda_mma.h"
#include "cuda/group.cuh"

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// out[block] = sum of kThreads floats. kBarrier = false is the bug.
template <bool kBarrier>
__global__ void __launch_bounds__(kThreads) block_sum(const float* __restrict__ x, float* out) {
  VF_SHARED(float, sums, kWarps);
  const float sum = warp_sum(x[blockIdx.x * kThreads + threadIdx.x]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (kBarrier) __syncthreads();
  if (threadIdx.x >= 32) return;
  const float all = warp_sum(threadIdx.x < kWarps ? sums[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = all;
}

// Two barriers in a row of a loop: x[i] <- x[i + 1], round after round.
__global__ void rotate(float* x, int rounds) {
  VF_SHARED(float, copy, kThreads);
  for (int round = 0; round < rounds; ++round) {
    copy[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = copy[(threadIdx.x + 1) % kThreads];
    __syncthreads();
  }
}

// The lane reads what its neighbour wrote, which a shuffle does not order: only __syncwarp does.
template <bool kSyncwarp>
__global__ void warp_exchange(float* x) {
  VF_SHARED(float, copy, 32);
  copy[threadIdx.x] = x[threadIdx.x];
  if (kSyncwarp)
    __syncwarp();
  else
    __shfl_sync(0xffffffffu, 0, 0);
  x[threadIdx.x] = copy[threadIdx.x ^ 1];
}

// What lane 5 of a full warp, and lane 7 of segments of 8, gets from each kind of shuffle.
__global__ void shuffles(float* out) {
  const unsigned all = 0xffffffffu;
  const int lane = int(threadIdx.x);
  const int whole[] = {__shfl_sync(all, lane, 3), __shfl_up_sync(all, lane, 1),
                       __shfl_down_sync(all, lane, 2), __shfl_xor_sync(all, lane, 4)};
  const int segment[] = {__shfl_sync(all, lane, 11, 8), __shfl_up_sync(all, lane, 1, 8),
                         __shfl_down_sync(all, lane, 2, 8), __shfl_xor_sync(all, lane, 4, 8)};
  for (int i = 0; i < 4; ++i) {
    if (lane == 5) out[i] = float(whole[i]);
    if (lane == 7) out[4 + i] = float(segment[i]);
  }
}

__global__ void partial_mask(float* out) {
  if (threadIdx.x < 16) out[0] = __shfl_xor_sync(0xffffu, out[threadIdx.x], 1);
}

// The first block and the first thread to run.
__global__ void first_to_arrive(float* out, int* taken) {
  if (atomicAdd(taken, 1) != 0) return;
  out[0] = float(blockIdx.x);
  out[1] = float(threadIdx.x);
}

__global__ void shared_overrun(float* out, int past) {
  VF_SHARED(float, before, 8);
  VF_SHARED(float, after, 8);
  before[threadIdx.x] = after[threadIdx.x] = 1.0f;
  float* p = before;
  out[threadIdx.x] = past > 0 ? p[threadIdx.x + past] : before[threadIdx.x - past];
}

// Thread i reads what i + 1 wrote; the last of the block `past` too far.
__global__ void dynamic_shared(float* out, int past) {
  VF_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const unsigned next = (threadIdx.x + 1) % blockDim.x;
  out[threadIdx.x] = values[next + (next == 0 ? past : 0)];
}

// a [16, 16] and b [16, 8] by rows, whole numbers; the fragments are those of the PTX manual.
template <class T>
__global__ void product(const float* a, const float* b, float* d) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const auto word = [](float low, float high) {
    struct {
      T low, high;
    } both;
    vf::from_float(both.low, low);
    vf::from_float(both.high, high);
    return emulation::bit_cast<uint32_t>(both);
  };
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) {
    const float* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    of_a[i] = word(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* at = b + (2 * t + 8 * i) * 8 + g;
    of_b[i] = word(at[0], at[8]);
  }
  float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  vf::warp_mma<T>(sum, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x != 3) __syncthreads();
  out[blockDim.x * threadIdx.y + threadIdx.x] = 1.0f;
}

// Blocks agree on nothing: every one writes out[0], the second time after a barrier.
__global__ void every_block_writes(float* out, int barriers) {
  for (int i = 0; i < barriers; ++i) __syncthreads();
  if (threadIdx.x == blockIdx.x) out[0] = float(blockIdx.x);
}

__global__ void blocks_add(float* out) { atomicAdd(out, 1.0f); }

__device__ __forceinline__ void move_vector(const float* from, float* to) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

__global__ void tail_overrun(const float* from, float* to, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i < count) move_vector(from + i, to + i);
}

__global__ void copy_vectors(const float* from, float* to) {
  move_vector(from + 4 * threadIdx.x, to + 4 * threadIdx.x);
}

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  std::vector<float> x(4 * kThreads), out(4 * kThreads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  void* stream = nullptr;

  if (is("block_sum") || is("missing_barrier")) {
    if (is("block_sum"))
      VF_LAUNCH(block_sum<true>, 4, kThreads, stream, x.data(), out.data());
    else
      VF_LAUNCH(block_sum<false>, 4, kThreads, stream, x.data(), out.data());
    for (int block = 0; block < 4; ++block) std::printf("%g ", out[block]);
  } else if (is("rotate")) {
    VF_LAUNCH(rotate, 1, kThreads, stream, x.data(), 5);
    std::printf("%g %g %g", x[0], x[kThreads - 6], x[kThreads - 5]);
  } else if (is("syncwarp")) {
    VF_LAUNCH(warp_exchange<true>, 1, 32, stream, x.data());
    std::printf("%g %g", x[0], x[31]);
  } else if (is("missing_syncwarp")) {
    VF_LAUNCH(warp_exchange<false>, 1, 32, stream, x.data());
  } else if (is("shuffles")) {
    VF_LAUNCH(shuffles, 1, 32, stream, out.data());
    for (int i = 0; i < 8; ++i) std::printf("%g ", out[i]);
  } else if (is("partial_mask")) {
    VF_LAUNCH(partial_mask, 1, 32, stream, out.data());
  } else if (is("first_to_arrive")) {
    int taken = 0;
    VF_LAUNCH(first_to_arrive, 64, 64, stream, out.data(), &taken);
    std::printf("%g %g", out[0], out[1]);
  } else if (is("shared_index")) {
    VF_LAUNCH(shared_overrun, 1, 8, stream, out.data(), -1);
  } else if (is("shared_pointer")) {
    VF_LAUNCH(shared_overrun, 1, 8, stream, out.data(), 1);
  } else if (is("dynamic_shared") || is("dynamic_overrun")) {
    const int bytes = 60 << 10, past = is("dynamic_overrun") ? bytes / 4 : 0;
    VF_LAUNCH_DYNAMIC(dynamic_shared, 1, 8, bytes, stream, out.data(), 0);
    std::printf("%d ", cudaGetLastError());  // more than 48 KiB, which must be asked for
    cudaFuncSetAttribute(reinterpret_cast<const void*>(dynamic_shared),
                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    VF_LAUNCH_DYNAMIC(dynamic_shared, 1, 8, bytes, stream, out.data(), past);
    std::printf("%d %g %g", cudaGetLastError(), out[0], out[7]);
  } else if (is("product") || is("product_bf16")) {
    for (float& number : x) number = float(int(number) * 37 % 11 - 5);
    const float *a = x.data(), *b = a + 256;
    VF_LAUNCH((is("product") ? product<__half> : product<__nv_bfloat16>), 1, 32, stream, a, b,
              out.data());
    int wrong = 0;
    for (int i = 0; i < 16 * 8; ++i) {
      float sum = 1.0f;
      for (int k = 0; k < 16; ++k) sum += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
      wrong += out[i] != sum;
    }
    std::printf("%d", wrong);
  } else if (is("divergent_barrier")) {
    VF_LAUNCH(divergent_barrier, dim3(1, 2), dim3(4, 2), stream, out.data());
  } else if (is("block_race")) {
    VF_LAUNCH(every_block_writes, 3, 8, stream, out.data(), 0);
  } else if (is("block_race_after_barrier")) {
    VF_LAUNCH(every_block_writes, 3, 8, stream, out.data(), 1);
  } else if (is("atomic")) {
    VF_LAUNCH(blocks_add, 3, 8, stream, out.data());
    std::printf("%g", out[0]);
  } else if (is("tail_overrun")) {
    x.resize(x.size() - 2);
    x.shrink_to_fit();
    VF_LAUNCH(tail_overrun, 2, kThreads, stream, x.data(), out.data(), int(x.size()));
  } else if (is("aligned") || is("misaligned")) {
    VF_LAUNCH(copy_vectors, 1, 8, stream, x.data() + (is("aligned") ? 4 : 1), out.data());
    std::printf("%g %g", out[0], out[31]);
  } else if (is("bad_launch")) {
    const dim3 shapes[][2] = {{1, 1025}, {{1, 65536}, 1}, {0, 1}, {1, 1024}};
    for (const auto& [grid, block] : shapes) {
      VF_LAUNCH(blocks_add, grid, block, stream, out.data());
      const cudaError_t error = cudaGetLastError();
      std::printf("%d %s\n", error, cudaGetErrorString(error));
    }
    std::printf("%g\n", out[0]);
  } else if (is("cost")) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    VF_LAUNCH(blocks_add, 4096, 256, stream, out.data());
    const std::chrono::duration<double, std::micro> time = Clock::now() - start;
    std::printf("%.9g %g", out[0], time.count() / (4096 * 256));
  } else {
    return 2;
  }
  return 0;
}
