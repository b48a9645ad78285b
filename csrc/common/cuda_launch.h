// What every .cu file needs around its kernel: the launch, its check, the current device.
//
// VF_LAUNCH is the only place with <<<>>>, so that a .cu file can also be compiled as plain C++
// against an emulation that defines VF_LAUNCH itself.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#if !defined(VF_LAUNCH)
#define VF_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace vf {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` the current one, and puts the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&former_), "cudaGetDevice");
    if (device != former_) cuda_check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != former_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
}

// kSize neighbours: a single element, or 16 bytes moved by one instruction.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  static_assert(kSize == 1 || sizeof(T) * kSize == 16);
  T at[kSize];
};

template <int kSize, class T>
__device__ __forceinline__ Vector<T, kSize> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kSize>*>(from);
}

template <class T, int kSize>
__device__ __forceinline__ void store(T* to, const Vector<T, kSize>& x) {
  if constexpr (kSize == 1)
    *to = x.at[0];
  else  // a plain assignment becomes four stores of 4 bytes (nvcc 13.0)
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&x));
}

}  // namespace vf
