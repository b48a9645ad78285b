// A team: threads that walk through the same code and share the tasks of every parallel_for in it.
//
// Forking and joining threads at each of a network's hundreds of loops costs little on a quiet
// machine and much on a busy one, where a thread that has lost its core is waited for every time.
// Here no thread is special and none is waited for but in the middle of a task: who has a core
// takes what tasks are left, and who comes late finds them done and passes on. Memory and waiting
// are one run's own, so that any number of teams may run at once.
//
// This file and team.cpp are built once, for every machine (csrc/cpu is built once per instruction
// set).
#pragma once
#include <cstdint>

namespace vf {

// Runs walk(context) on every one of `threads` threads, OpenMP's. The first exception that any of
// them throws stops all, and is thrown here.
void run_team(int64_t threads, void (*walk)(const void* context), const void* context);

// Whether the calling thread is a team's.
bool in_team();

// Called by each thread of a team, in the same order and with the same count: run(body, task) of
// those tasks that this thread claims. Returns when all are finished, whoever ran them.
void share_tasks(int64_t tasks, void (*run)(const void* body, int64_t task), const void* body);

}  // namespace vf
