// Shadows the toolkit's header: the part of CUDA C++ that csrc/cuda uses, on the CPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_emulation.h"

// ---- Language ---------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- Vector types -----------------------------------------------------------------------------
// Aligned as CUDA's are, so that UBSan sees a 16-byte access to an address that is not.
#define VF_VECTOR2(type, scalar, bytes) \
  struct alignas(bytes) type {          \
    scalar x, y;                        \
  };                                    \
  inline type make_##type(scalar x, scalar y) { return {x, y}; }
#define VF_VECTOR4(type, scalar, bytes) \
  struct alignas(bytes) type {          \
    scalar x, y, z, w;                  \
  };                                    \
  inline type make_##type(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
VF_VECTOR2(float2, float, 8)
VF_VECTOR4(float4, float, 16)
VF_VECTOR2(double2, double, 16)
VF_VECTOR2(int2, int, 8)
VF_VECTOR4(int4, int, 16)
VF_VECTOR2(uint2, unsigned, 8)
VF_VECTOR4(uint4, unsigned, 16)
VF_VECTOR4(uchar4, unsigned char, 4)
VF_VECTOR2(ushort2, unsigned short, 4)
VF_VECTOR4(ushort4, unsigned short, 8)
VF_VECTOR2(ulonglong2, unsigned long long, 16)
#undef VF_VECTOR2
#undef VF_VECTOR4

// ---- Threads of a block and of a warp ---------------------------------------------------------
constexpr unsigned kEmulatedFullMask = 0xffffffffu;

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = kEmulatedFullMask) { emulation::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, int width = warpSize) {
  return emulation::shuffle_as(mask, emulation::Shuffle::index, x, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = warpSize) {
  return emulation::shuffle_as(mask, emulation::Shuffle::up, x, int(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = warpSize) {
  return emulation::shuffle_as(mask, emulation::Shuffle::down, x, int(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = warpSize) {
  return emulation::shuffle_as(mask, emulation::Shuffle::exclusive_or, x, lane_mask, width);
}

// ---- Memory -----------------------------------------------------------------------------------
// Cache hints, hence plain loads and stores here.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stwb(T* to, T x) {
  *to = x;
}
template <class T>
void __stcg(T* to, T x) {
  *to = x;
}
template <class T>
void __stcs(T* to, T x) {
  *to = x;
}

// What comes before one thread's fence comes before what follows a later fence of another.
inline void __threadfence() { emulation::fence(); }

// Relaxed, as on the device: they order nothing else, and TSan must not think they do.
inline int atomicAdd(int* to, int x) { return __atomic_fetch_add(to, x, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* to, unsigned x) {
  return __atomic_fetch_add(to, x, __ATOMIC_RELAXED);
}
inline unsigned atomicInc(unsigned* to, unsigned last) {  // last + 1 is 0
  unsigned old;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  unsigned next = old >= last ? 0 : old + 1;
  while (!__atomic_compare_exchange(to, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    next = old >= last ? 0 : old + 1;
  return old;
}
inline float atomicAdd(float* to, float x) {
  float old;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  float sum = old + x;
  while (!__atomic_compare_exchange(to, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    sum = old + x;
  return old;
}

// ---- Arithmetic -------------------------------------------------------------------------------
namespace emulation {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) { return emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return emulation::bit_cast<float>(x); }

// Rounded one by one, which needs -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// Macros, because glibc declares functions of these names for itself.
#define __expf(x) std::exp(float(x))
#define __logf(x) std::log(float(x))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// ---- Host -------------------------------------------------------------------------------------
// The numbers are CUDA's.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st* cudaStream_t;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);  // there is one, number 0
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
