// The engine behind cuda_emulation.h: blocks, fibers, barriers, shared memory.
//
// Compiled without sanitizers in every variant, so that only the kernels are watched; it tells
// them which fiber runs (EMULATION_ASAN, EMULATION_TSAN). One launch runs at a time.
//
// Under TSan the only happens-before edges are the language's own: launch -> every thread, barriers
// within a block, every thread -> after the launch. Threads of two blocks have none, although the
// blocks run one after the other: a fiber, stack and shared memory of its own for each block keep
// TSan from seeing any. Which order ran therefore does not decide whether a race is found.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define IF_ASAN(...) __VA_ARGS__
#else
#define IF_ASAN(...)
#endif

#if defined(EMULATION_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}
#define IF_TSAN(...) __VA_ARGS__
constexpr bool kTsan = true;
#else
#define IF_TSAN(...)
constexpr bool kTsan = false;
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedLimit = 48 << 10;   // what CUDA allows without asking
constexpr size_t kSharedGap = 256;          // poisoned, after each declaration
constexpr int kMaxSites = 64;               // declarations in a kernel
constexpr size_t kSharedMost = 99 << 10;    // with cudaFuncSetAttribute, as sm_120 has it
constexpr size_t kArenaBytes = 192 << 10;   // kSharedMost and the gaps
constexpr unsigned kSwitchWithoutSync = 1;  // of __tsan_switch_to_fiber
// TSan spends 0.8 MB on a fiber, and forgets what it did once it is gone.
constexpr size_t kFibersKept = 1024;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  const char* call = nullptr;  // that the first to arrive was in
  // TSan releases to one and acquires from it. Two in turn: a thread that is slow to leave must not
  // acquire what a fast one has already released at the next barrier.
  char tokens[2];
};

struct Block {
  Barrier all, warps[kMaxWarps];
  std::vector<void*> tsan_fibers;
};

// A CUDA thread.
struct Thread {
  uint3 index;
  int worker = -1;  // that it began on
  bool returned = false;
  const Barrier* waits_at = nullptr;
  unsigned waits_for = 0;  // leaves once the barrier's generation is another
  void* tsan_fiber = nullptr;

  bool runnable() const { return !returned && !(waits_at && waits_at->generation == waits_for); }
};

// A stack. It runs one CUDA thread after the other until one of them waits; under TSan, one.
struct Worker {
  ucontext_t context;
  bool started = false;
  void* asan_stack = nullptr;
};

struct Site {
  const void* declaration;
  char* memory;
};

// The state of the launch that runs.
std::mutex one_launch;
cudaError_t last_error = cudaSuccess;

void (*body)(void*);
void* context;
int num_threads, num_alive, num_begun;  // of the block; order[num_begun] is the next to begin
int order[kMaxThreads];
Thread threads[kMaxThreads];
Thread* self;
Worker workers[kMaxThreads];
int idle[kMaxThreads], num_idle;
int num_workers;  // ever used: idle ones among them
Exchanged exchanged[2][kMaxThreads];

ucontext_t scheduler;
char* memory;  // [arena of shared memory][stack of worker 0][stack of worker 1]...
Site sites[kMaxSites];
int num_sites;
size_t shared_bytes, dynamic_bytes, shared_limit, arena_used;
std::map<const void*, size_t> dynamic_limits;  // of kernels that asked for another
std::deque<std::unique_ptr<Block>> blocks;     // the running one last

#if defined(EMULATION_TSAN)
void* host_fiber;
char launch_end, fences;
#endif
#if defined(EMULATION_ASAN)
void* host_asan_stack;
const void* host_stack;
size_t host_stack_bytes;
#endif

std::string name(const uint3& at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "CUDA emulation: block %s: %s\n", name(blockIdx).c_str(), what.c_str());
  std::abort();
}

std::string named(const Thread& thread) { return "thread " + name(thread.index); }

// ---- Memory -----------------------------------------------------------------------------------

char* stack_of(int worker) { return memory + kArenaBytes + worker * kStackBytes; }

// NaN in every format, so that a read before the first write shows in the result.
void fill_arena(size_t bytes) {
  if (bytes == 0) return;
  IF_ASAN(__asan_unpoison_memory_region(memory, bytes);)
  std::memset(memory, 0xff, bytes);
  IF_ASAN(__asan_poison_memory_region(memory, bytes);)
}

void map(int num_stacks) {
  const size_t bytes = kArenaBytes + num_stacks * kStackBytes;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (memory ? MAP_FIXED : 0);
  void* mapped = mmap(memory, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) die("no memory for the stacks");
  memory = static_cast<char*>(mapped);
}

void fresh_memory() {
  if (!memory) {
    map(kMaxThreads);
    fill_arena(kArenaBytes);
  } else if (kTsan) {
    // Mapping anew makes TSan forget the accesses of the block before.
    map(num_threads);
    fill_arena(kArenaBytes);
  } else {
    fill_arena(arena_used);
  }
  num_sites = 0;
  shared_bytes = dynamic_bytes;
  arena_used = 0;
}

// ---- Fibers -----------------------------------------------------------------------------------

void become(Thread* thread) {
  self = thread;
  threadIdx = thread->index;
}

void to_scheduler(int worker) {
  Worker& from = workers[worker];
  IF_TSAN(__tsan_switch_to_fiber(host_fiber, kSwitchWithoutSync);)
  IF_ASAN(__sanitizer_start_switch_fiber(&from.asan_stack, host_stack, host_stack_bytes);)
  swapcontext(&from.context, &scheduler);
  IF_ASAN(__sanitizer_finish_switch_fiber(from.asan_stack, &host_stack, &host_stack_bytes);)
}

void work(int worker) {
  IF_ASAN(__sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);)
  for (;;) {
    do {
      Thread* thread = &threads[order[num_begun++]];
      thread->worker = worker;
      become(thread);
      body(context);
      IF_TSAN(__tsan_release(&launch_end);)
      thread->returned = true;
      --num_alive;
    } while (!kTsan && num_begun < num_threads);
    if (!kTsan) idle[num_idle++] = worker;  // two threads on one stack would be a race
    to_scheduler(worker);
  }
}

void to_worker(int worker, Thread* thread) {
  Worker& to = workers[worker];
  if (!to.started) {
    to.started = true;
    getcontext(&to.context);
    to.context.uc_stack.ss_sp = stack_of(worker);
    to.context.uc_stack.ss_size = kStackBytes;
    to.context.uc_link = nullptr;
    makecontext(&to.context, reinterpret_cast<void (*)()>(work), 1, worker);
    // ASan's swapcontext would otherwise wipe the marks of the whole stack at every switch.
    to.context.uc_stack.ss_size = 0;
  }
  IF_TSAN(__tsan_switch_to_fiber(thread->tsan_fiber, kSwitchWithoutSync);)
  IF_ASAN(__sanitizer_start_switch_fiber(&host_asan_stack, stack_of(worker), kStackBytes);)
  swapcontext(&scheduler, &to.context);
  IF_ASAN(__sanitizer_finish_switch_fiber(host_asan_stack, nullptr, nullptr);)
  (void)thread;
}

// The next CUDA thread of the block begins, on an idle stack.
void begin_next() {
  Thread* thread = &threads[order[num_begun]];
#if defined(EMULATION_TSAN)
  thread->tsan_fiber = __tsan_create_fiber(0);  // knows what this launch has done, and no block's
  const std::string title = "block " + name(blockIdx) + " " + named(*thread);
  __tsan_set_fiber_name(thread->tsan_fiber, title.c_str());
  blocks.back()->tsan_fibers.push_back(thread->tsan_fiber);
#endif
  to_worker(num_idle ? idle[--num_idle] : num_workers++, thread);
}

void forget_block() {
  IF_TSAN(for (void* fiber : blocks.front()->tsan_fibers) __tsan_destroy_fiber(fiber);)
  blocks.pop_front();
}

// ---- Barriers ---------------------------------------------------------------------------------

[[noreturn]] void report_deadlock() {
  const Thread* waiting = std::find_if(threads, threads + num_threads,
                                       [](const Thread& thread) { return !thread.returned; });
  const int lane = int(waiting - threads);
  const bool of_block = waiting->waits_at == &blocks.back()->all;
  const int first = of_block ? 0 : lane / 32 * 32;
  const int last = of_block ? num_threads : std::min(first + 32, num_threads);
  const Thread* missing = std::find_if(threads + first, threads + last, [&](const Thread& thread) {
    return thread.waits_at != waiting->waits_at;
  });
  die("barrier deadlock: " + named(*waiting) + " waits at " + waiting->waits_at->call + ", which " +
      named(*missing) + " never reaches: " +
      (missing->returned ? "it returned" : std::string("it waits at ") + missing->waits_at->call));
}

void wait(Barrier& barrier, int needed, const char* call, bool orders_memory) {
  Thread* me = self;
  if (barrier.arrived == 0) barrier.call = call;
  if (std::strcmp(barrier.call, call) != 0)
    die(named(*me) + " is at " + call + " while others of its warp are at " + barrier.call);
  const unsigned generation = barrier.generation;
  IF_TSAN(if (orders_memory) __tsan_release(&barrier.tokens[generation % 2]);)
  if (++barrier.arrived == needed) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    me->waits_at = &barrier;
    me->waits_for = generation;
    to_scheduler(me->worker);
    me->waits_at = nullptr;
  }
  IF_TSAN(if (orders_memory) __tsan_acquire(&barrier.tokens[generation % 2]);)
  (void)orders_memory;
}

int warp_size(int warp) { return std::min(32, num_threads - 32 * warp); }

void check_mask(unsigned mask, const char* call) {
  if (mask != kEmulatedFullMask) die(named(*self) + ": " + call + " with a partial mask");
}

// ---- Blocks -----------------------------------------------------------------------------------

void shuffle_order(std::mt19937* random) {
  if (random) std::shuffle(order, order + num_threads, *random);
}

void run_block(std::mt19937* random) {
  if (!kTsan && !blocks.empty()) forget_block();
  while (blocks.size() * size_t(num_threads) > kFibersKept) forget_block();
  blocks.push_back(std::make_unique<Block>());
  fresh_memory();
  for (int i = 0; i < num_threads; ++i) {
    const unsigned linear = unsigned(i);
    threads[i] = Thread{};
    threads[i].index = {linear % blockDim.x, linear / blockDim.x % blockDim.y,
                        linear / (blockDim.x * blockDim.y)};
    order[i] = i;
    if (kTsan) workers[i].started = false;  // its stack is new
  }
  if (kTsan) num_idle = num_workers = 0;
  num_alive = num_threads;
  num_begun = 0;

  shuffle_order(random);
  while (num_begun < num_threads) begin_next();
  while (num_alive > 0) {
    shuffle_order(random);
    bool progress = false;
    for (int i = 0; i < num_threads; ++i) {
      Thread* thread = &threads[order[i]];
      if (!thread->runnable()) continue;
      progress = true;
      become(thread);
      to_worker(thread->worker, thread);
    }
    if (!progress) report_deadlock();
  }
}

// 48 KiB in all, or kSharedMost where the kernel asked for dynamic memory; that, as it asked.
bool takes_shared_memory(const Configuration& launch) {
  const auto asked = dynamic_limits.find(launch.kernel);
  const bool more = asked != dynamic_limits.end();
  shared_limit = more ? kSharedMost : kSharedLimit;
  return launch.shared_bytes <= (more ? asked->second : kSharedLimit);
}

bool valid(dim3 grid, dim3 block) {
  const bool empty = grid.x * uint64_t(grid.y) * grid.z == 0 || block.x * block.y * block.z == 0;
  return !empty && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && block.x <= 1024 &&
         block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= kMaxThreads;
}

}  // namespace

void run_grid(const Configuration& launch, void (*new_body)(void*), void* new_context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto [kernel, grid, block, dynamic] = launch;
  if (!valid(grid, block) || !takes_shared_memory(launch)) {
    last_error = valid(grid, block) ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
    return;
  }
  dynamic_bytes = dynamic;
  gridDim = grid;
  blockDim = block;
  body = new_body;
  context = new_context;
  num_threads = int(block.x * block.y * block.z);
  IF_TSAN(host_fiber = __tsan_get_current_fiber();)

  const char* seed = std::getenv("VF_EMULATED_SEED");
  std::mt19937 random(seed ? unsigned(std::atoi(seed)) : 0u);
  const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> block_order(seed ? num_blocks : 0);
  for (uint64_t i = 0; i < block_order.size(); ++i) block_order[i] = i;
  std::shuffle(block_order.begin(), block_order.end(), random);

  for (uint64_t i = 0; i < num_blocks; ++i) {
    const uint64_t at = seed ? block_order[i] : i;
    blockIdx = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y),
                unsigned(at / (uint64_t(grid.x) * grid.y))};
    run_block(seed ? &random : nullptr);
  }
  while (!blocks.empty()) forget_block();
  IF_TSAN(__tsan_acquire(&launch_end);)
}

void* shared_memory(const void* site, size_t bytes, size_t alignment) {
  for (int i = 0; i < num_sites; ++i)
    if (sites[i].declaration == site) return sites[i].memory;
  if (site != &dynamic_bytes) shared_bytes += bytes;
  if (shared_bytes > shared_limit || num_sites == kMaxSites)
    die("more than " + std::to_string(shared_limit >> 10) +
        " KiB of shared memory, or 64 declarations");
  alignment = std::max<size_t>(alignment, 16);
  char* at = memory + (arena_used + alignment - 1) / alignment * alignment;
  IF_ASAN(__asan_unpoison_memory_region(at, bytes);)
  arena_used = size_t(at - memory) + bytes + kSharedGap;
  sites[num_sites++] = {site, at};
  return at;
}

void fence() { IF_TSAN(__tsan_acquire(&fences); __tsan_release(&fences);) }

void* dynamic_shared_memory() { return shared_memory(&dynamic_bytes, dynamic_bytes, 16); }

void block_barrier() { wait(blocks.back()->all, num_threads, "__syncthreads", true); }

void warp_barrier(unsigned mask) {
  check_mask(mask, "__syncwarp");
  const int warp = int(self - threads) / 32;
  wait(blocks.back()->warps[warp], warp_size(warp), "__syncwarp", true);
}

const Exchanged* exchange(unsigned mask, const char* call, const Exchanged& mine) {
  check_mask(mask, call);
  const int linear = int(self - threads), warp = linear / 32;
  // Two slots in turn: a fast lane may be at its next exchange before a slow one has read this.
  Barrier& barrier = blocks.back()->warps[warp];
  Exchanged* slots = exchanged[barrier.generation % 2];
  slots[linear] = mine;
  // CUDA promises no memory order here: only __syncwarp gives one.
  wait(barrier, warp_size(warp), call, false);
  return slots + 32 * warp;
}

uint64_t shuffle(unsigned mask, Shuffle kind, uint64_t mine, int operand, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    die(named(*self) + ": a shuffle of width " + std::to_string(width));
  const int linear = int(self - threads), warp = linear / 32, lane = linear % 32;
  const int segment = lane / width * width;
  int source = lane;
  switch (kind) {
    case Shuffle::index:
      source = segment + (operand & (width - 1));
      break;
    case Shuffle::up:
      if (lane - operand >= segment) source = lane - operand;
      break;
    case Shuffle::down:
      if (lane + operand < segment + width) source = lane + operand;
      break;
    case Shuffle::exclusive_or:
      if ((lane ^ operand) < segment + width) source = lane ^ operand;
      break;
  }
  const Exchanged* lanes = exchange(mask, "a shuffle", {{mine}});
  return source < warp_size(warp) ? lanes[source].words[0] : ~uint64_t(0);  // undefined: NaN
}

}  // namespace emulation

#include "host_calls.h"
