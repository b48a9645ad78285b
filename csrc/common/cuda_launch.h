// What every .cu file needs around its kernel: the launch, its check, the current device.
//
// The macros are the only places that launch or have __shared__, so that a .cu file can also be
// compiled as plain C++ against tests/tools/emulation, which defines them itself.
//
// Launches are programmatic dependent ones from sm_90 on (CUDA C++ Programming Guide, "Programmatic
// Dependent Launch"): the blocks of a kernel are set up while those of the kernel before it still
// run, so that its launch costs no time of its own. Every kernel therefore begins with
// wait_for_inputs(). VFENGINE_PDL=off launches a kernel when the one before it has ended.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

namespace vf {

// Waits until the kernels before this one have ended and all that they wrote can be seen. The first
// line of every kernel, for all its threads: without it a kernel could end before those that it
// depends on, and the next one would take them for ended too. From here on the next one may be set
// up.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace vf

#if !defined(VF_LAUNCH)
#define VF_LAUNCH(kernel, grid, block, stream, ...) \
  VF_LAUNCH_DYNAMIC(kernel, grid, block, 0, stream, __VA_ARGS__)
#define VF_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) \
  ::vf::launch(kernel, grid, block, bytes, stream, __VA_ARGS__)
#define VF_SHARED(type, name, count) __shared__ type name[count]
// The `bytes` of VF_LAUNCH_DYNAMIC; one a kernel.
#define VF_DYNAMIC_SHARED(type, name)       \
  extern __shared__ uint4 dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)

namespace vf {

// vfengine/devices.py reads the same switch, for Triton's kernels.
inline bool dependent_launches() {
  const char* set = std::getenv("VFENGINE_PDL");
  const std::string value = set && *set ? set : "on";
  if (value != "on" && value != "off")
    throw std::invalid_argument("VFENGINE_PDL must be on or off, got " + value);
  return value == "on";
}

// The caller reads cudaGetLastError.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes, void* stream,
            Arguments&&... arguments) {
  cudaFuncAttributes code{};
  if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess) return;
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dependent;
  // Code for older architectures, compiled again for a newer one, does not wait.
  config.numAttrs = code.ptxVersion >= 90 && dependent_launches() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace vf
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
