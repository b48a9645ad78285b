#include "cpu/team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vf {

namespace {

// What the other threads' last tasks may take without costing this one its core; what takes longer
// is waited for asleep, so that whoever has to run can.
constexpr std::chrono::microseconds kSpin{20};

struct Stopped {};  // thrown through a kernel where another thread has failed

// Regions, the loops that share_tasks was called for, are counted through the run, and so are the
// tasks of all regions. A region begins when all tasks before it are finished, so that one count of
// finished tasks says for every region whether it is over.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads), parts_(new Part[threads]) {}

  // The next task of a part of a region's tasks, or -1 where all are claimed.
  int64_t claim(int64_t part, uint32_t region, int64_t tasks) {
    const int64_t first = part * tasks / threads_, count = (part + 1) * tasks / threads_ - first;
    std::atomic<uint64_t>& claimed = parts_[part].claimed;
    uint64_t seen = claimed.load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t last = seen >> 32;  // region that a task was claimed of
      const int64_t next = last == region ? uint32_t(seen) : 0;
      if (last > region || next >= count) return -1;
      if (claimed.compare_exchange_weak(seen, uint64_t(region) << 32 | uint64_t(next + 1),
                                        std::memory_order_relaxed))
        return first + next;
    }
  }

  bool finished(int64_t target) const { return finished_ >= target; }

  // Says that `tasks` more are finished; those that wait for `target` go on if they are the last.
  void finish(int64_t tasks, int64_t target) {
    if (finished_.fetch_add(tasks) + tasks == target) wake();
  }

  void wait(int64_t target) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      if (finished(target)) return;
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    waiting_.wait(lock, [&] { return finished(target) || failed_; });
    --sleepers_;
  }

  void fail(std::exception_ptr error) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = error;
    }
    failed_ = true;
    wake();
  }

  void stop_if_failed() const {
    if (failed_.load(std::memory_order_relaxed)) throw Stopped();
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

  int64_t threads() const { return threads_; }

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> claimed{0};  // region << 32 | tasks of it, from the part's first on
  };

  void wake() {
    if (!sleepers_) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    waiting_.notify_all();
  }

  const int64_t threads_;
  const std::unique_ptr<Part[]> parts_;
  alignas(64) std::atomic<int64_t> finished_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable waiting_;
  std::exception_ptr error_;
};

struct Member {  // one thread of a team, and how far it has walked
  Team* team;
  int64_t thread;
  uint32_t region;
  int64_t target;  // tasks of this region and all before
};

thread_local Member* current = nullptr;

}  // namespace

bool in_team() { return current != nullptr; }

void run_team(int64_t threads, void (*walk)(const void* context), const void* context) {
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    Member member{&team, omp_get_thread_num(), 0, 0};
#else
    Member member{&team, 0, 0, 0};
#endif
    current = &member;
    try {
      walk(context);
    } catch (const Stopped&) {
    } catch (...) {
      team.fail(std::current_exception());
    }
    current = nullptr;
  }
  team.rethrow();
}

// A thread takes the tasks of its own part first: it has the same part of the rows in every
// region, so that what it reads is mostly what it wrote itself.
void share_tasks(int64_t tasks, void (*run)(const void* body, int64_t task), const void* body) {
  Member& member = *current;
  Team& team = *member.team;
  ++member.region;
  member.target += tasks;
  if (team.finished(member.target)) return;
  int64_t mine = 0;
  for (int64_t i = 0; i < team.threads(); ++i) {
    const int64_t part = (member.thread + i) % team.threads();
    for (int64_t task; (task = team.claim(part, member.region, tasks)) >= 0; ++mine) {
      team.stop_if_failed();
      run(body, task);
    }
  }
  if (mine) team.finish(mine, member.target);
  team.wait(member.target);
  team.stop_if_failed();
}

}  // namespace vf
