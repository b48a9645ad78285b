// What every .cu file needs around its kernel: the launch, its check, the current device.
//
// The macros are the only places with <<<>>> and __shared__, so that a .cu
// file can also be compiled as plain C++ against tests/tools/emulation, which defines them itself.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#if !defined(VF_LAUNCH)
#define VF_LAUNCH(kernel, grid, block, stream, ...) \
  VF_LAUNCH_DYNAMIC(kernel, grid, block, 0, stream, __VA_ARGS__)
#define VF_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define VF_SHARED(type, name, count) __shared__ type name[count]
// The `bytes` of VF_LAUNCH_DYNAMIC; one a kernel.
#define VF_DYNAMIC_SHARED(type, name)       \
  extern __shared__ uint4 dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
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

}  // namespace vf
