// VF_HOST_DEVICE marks arithmetic that CPU and CUDA kernels share.
//
// On the CPU it must be inlined: the files in csrc/cpu are compiled once per instruction set, and a
// copy that the linker shares between them could hold instructions the machine does not have.
#pragma once

#if defined(__CUDACC__)
#define VF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VF_HOST_DEVICE __attribute__((always_inline)) inline
#endif
