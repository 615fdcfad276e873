// Threads of the library's own, for callers that have none to lend.
#pragma once

#include <cstddef>

#include "attention.h"

namespace mla_pass {

// What Threads::run asks for; `workers` is an Index, the most threads to run on, the caller's among them. Threads are
// started when they are first needed and kept. One call at a time has them: another meanwhile, and one from within a
// task, runs in its own thread alone. After a fork the child starts threads anew. An exception of a task ends its
// thread's share of the work and is thrown here once all threads are done.
void run_on_own(void* workers, std::size_t count, void (*task)(void* user, std::size_t i), void* user);

// `workers` outlives their use.
inline Threads own_threads(Index& workers) { return {&workers, run_on_own, workers}; }

}  // namespace mla_pass
