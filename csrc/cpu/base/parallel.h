// Threads for the files in csrc/cpu: parallel_for(tasks, threads, body).
//
// A program of kernels runs on one team (cpu/team.h), each of whose threads calls every kernel,
// maybe when the others have long left it. So what a kernel does outside of the bodies is done by
// every thread: it writes nothing but locals, and reads nothing that a kernel writes. Its locals
// are the thread's own: what one task leaves for another lies in memory that the arguments name.
//
// A task's result must not depend on the thread that ran it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/team.h"

namespace vf::VF_ISA {

template <class Body>
static inline void parallel_for(int64_t tasks, int64_t threads, const Body& body) {
  const auto run = [](const void* it, int64_t task) { (*static_cast<const Body*>(it))(task); };
  if (in_team()) return share_tasks(tasks, run, &body);
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  const auto all = [&] { share_tasks(tasks, run, &body); };
  run_team(threads, [](const void* it) { (*static_cast<const decltype(all)*>(it))(); }, &all);
}

}  // namespace vf::VF_ISA
