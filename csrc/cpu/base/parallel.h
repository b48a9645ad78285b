// Threads for the files in csrc/cpu: parallel_for(tasks, threads, body).
//
// OpenMP, because torch's own pool is OpenMP: vfengine/native.py imports torch first, so that both
// use one runtime and one set of threads. A task's result must not depend on the thread that ran
// it.
#pragma once
#include <algorithm>
#include <cstdint>

namespace vf::VF_ISA {

template <class Body>
static inline void parallel_for(int64_t tasks, int64_t threads, const Body& body) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace vf::VF_ISA
