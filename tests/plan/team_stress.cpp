// Teams (csrc/cpu/team.h): late threads, more threads than cores, two teams at once, and failures.
// Its own two functions of OpenMP start threads that ThreadSanitizer can see into.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/base/parallel.h"

using vf::VF_ISA::parallel_for;

static thread_local int number = 0;

extern "C" int omp_get_thread_num() { return number; }

extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i)
    others.emplace_back([=] {
      number = int(i);
      run(data);
    });
  run(data);
  for (std::thread& other : others) other.join();
}

constexpr int64_t kTasks = 7, kRegions = 60;

template <class Walk>
static void run(int64_t threads, const Walk& walk) {
  vf::run_team(threads, [](const void* it) { (*static_cast<const Walk*>(it))(); }, &walk);
}

// Every region computes from what the one before it left; the first `late` threads to come sleep.
static std::vector<int64_t> walk(int64_t threads, int64_t late) {
  std::vector<int64_t> numbers(kTasks, 1), others(kTasks, 0);
  std::atomic<int> arrived{0};
  run(threads, [&] {
    if (arrived++ < late) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    for (int64_t region = 0; region < kRegions; ++region) {
      const auto& x = region % 2 ? others : numbers;
      auto& y = region % 2 ? numbers : others;
      const int64_t tasks = region % 5 == 3 ? 1 : kTasks;  // one task, or more than threads
      parallel_for(tasks, threads, [&](int64_t task) {
        for (int64_t i = task; i < kTasks; i += tasks)
          y[i] = (3 * x[i] + x[(i + 1) % kTasks] + region) % 1000003;
      });
    }
  });
  return numbers;
}

static bool fails(int64_t threads) {
  try {
    run(threads, [&] {
      for (int64_t region = 0; region < kRegions; ++region)
        parallel_for(kTasks, threads, [&](int64_t task) {
          if (region == 20 && task == 5) throw std::runtime_error("task 5");
        });
    });
  } catch (const std::runtime_error& error) {
    return error.what() == std::string("task 5");
  }
  return false;
}

int main() {
  const auto expected = walk(1, 0);
  const auto work = [&](int64_t threads, int* errors) {
    for (int64_t run = 0; run < 30; ++run) *errors += walk(threads, run % threads) != expected;
    for (int64_t run = 0; run < 30; ++run) *errors += !fails(threads);
  };
  int errors[2] = {0, 0};
  std::thread other(work, 3, errors + 1);
  work(8, errors);
  other.join();
  std::printf("%d wrong\n", errors[0] + errors[1]);
  return errors[0] + errors[1] != 0;
}
