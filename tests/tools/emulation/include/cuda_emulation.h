// CUDA kernels as plain C++ on the CPU: what a kernel and its launch see. The rest is in
// cuda_emulation.cpp; cuda_runtime.h, cuda_fp16.h and cuda_bf16.h beside this file include it.
//
// Every CUDA thread of a block is a fiber with its own stack, blocks run one after the other. A
// barrier is real: a fiber waits until all have arrived, and the program aborts, naming block and
// thread, where some never will. That is stricter than the hardware about threads that returned.
//
//   VF_EMULATED_SEED=n        shuffles the order of blocks, and of threads between barriers
//   VF_EMULATED_PROCESSORS=n  multiprocessors of the emulated device, 2 unless set
//
// Not modelled: weak memory order, partial masks, streams that overlap, cooperative groups,
// cp.async.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs: the engine sets them before it switches to a fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

// A launch of `kernel`, with `shared_bytes` of dynamic shared memory a block.
struct Configuration {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
};

// Runs body(context) once for every thread of the grid, or leaves an error for cudaGetLastError.
void run_grid(const Configuration& launch, void (*body)(void*), void* context);

// The `bytes` of shared memory that belong to this declaration (`site`) in the running block.
void* shared_memory(const void* site, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

void block_barrier();
void fence();
void warp_barrier(unsigned mask);

// Every lane of a warp shows `mine` to the others: theirs, lane by lane, until its next exchange.
struct Exchanged {
  uint64_t words[3];
};
const Exchanged* exchange(unsigned mask, const char* call, const Exchanged& mine);

// Which lane of the warp a shuffle reads.
enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(unsigned mask, Shuffle kind, uint64_t mine, int operand, int width);

template <class T>
T shuffle_as(unsigned mask, Shuffle kind, T mine, int operand, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  bits = shuffle(mask, kind, bits, operand, width);
  std::memcpy(&mine, &bits, sizeof mine);
  return mine;
}

// Arguments are converted to the kernel's parameters once, by the launcher, as CUDA does.
template <class... Parameters>
class Launch {
 public:
  Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
         const void* /*stream*/)
      : kernel_(kernel),
        launch_{reinterpret_cast<const void*>(kernel), grid, block, shared_bytes} {}

  template <class... Arguments>
  void operator()(Arguments&&... arguments) const {
    Call call{kernel_, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
    run_grid(launch_, &run_thread, &call);
  }

 private:
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };

  static void run_thread(void* context) {
    const Call* call = static_cast<const Call*>(context);
    std::apply(call->kernel, call->parameters);
  }

  void (*kernel_)(Parameters...);
  Configuration launch_;
};

}  // namespace emulation

#define VF_LAUNCH(kernel, grid, block, stream, ...) \
  VF_LAUNCH_DYNAMIC(kernel, grid, block, 0, stream, __VA_ARGS__)
#define VF_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) \
  (::emulation::Launch(kernel, grid, block, bytes, stream)(__VA_ARGS__))

// The address of the static tells one declaration from another.
#define VF_SHARED(type, name, count)                 \
  static char name##_site;                           \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::emulation::shared_memory(&name##_site, sizeof(type) * (count), alignof(type)))

#define VF_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::emulation::dynamic_shared_memory())
