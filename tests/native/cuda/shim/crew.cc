// How the threads of a CTA take turns: as fibers, each of which runs until it has to wait for others.
#include <exception>
#include <memory>
#include <utility>

#include "cta.h"
#include "fiber.h"

namespace mla_pass::cuda::shim {
namespace {

[[noreturn]] void live();

// Of a thread of the system. Fibers outlive a CTA: each goes on with the next CTA's thread of its number.
struct Crew {
  explicit Crew(std::size_t threads) : fibers(threads, live) { ready.reserve(threads); }

  Fiber& fiber_of(const Member& member) { return fibers[static_cast<std::size_t>(member.number)]; }

  Fibers fibers;
  Fiber caller{};
  Cta* cta = nullptr;
  std::vector<Member*> ready;  // the next one last
  std::exception_ptr failed;
};

thread_local std::unique_ptr<Crew> crew;

void make_current(Member* member) { __atomic_store_n(&running, static_cast<Thread*>(member), __ATOMIC_RELAXED); }

// Puts threads [first, first + count) before all others that are ready.
void make_ready(int first, int count) {
  Member* members = crew->cta->members.data() + first;
  const bool forward = crew->cta->options.order == Order::forward;
  for (int i = 0; i < count; ++i) {
    Member& member = members[forward ? count - 1 - i : i];
    member.waits = nullptr;
    crew->ready.push_back(&member);
  }
}

// Leaves one fiber for the thread that is next.
void run_next(Fiber& from) {
  Member* next = crew->ready.back();
  crew->ready.pop_back();
  make_current(next);
  Fiber& to = crew->fiber_of(*next);
  if (&to != &from) switch_fiber(from, to);
}

void back_to_caller(Fiber& from) {
  make_current(nullptr);
  switch_fiber(from, crew->caller);
}

// Leaves the running thread for the next one, or for the caller when all have ended.
void run_others() {
  Fiber& own = crew->fiber_of(self());
  if (!crew->ready.empty()) return run_next(own);
  for (const Member& member : crew->cta->members) {
    if (!member.ended) fail("no thread can go on: " + crew->cta->whereabouts());
  }
  back_to_caller(own);
}

Cta& running_cta() {
  const Unseen unseen;  // before anything orders what its maker wrote
  return *self().cta;
}

// One CTA's thread, and all that comes before the next CTA's.
void live_once() {
  Cta& cta = running_cta();
  order_after(&cta.start);
  cta.kernel();
  order_before(&cta.finish);
  const Unseen unseen;
  self().ended = true;
  run_others();
}

void live() {
  enter_fiber();
  for (;;) {
    try {
      live_once();
      continue;
    } catch (...) {  // whatever it is, it belongs to the caller
      crew->failed = std::current_exception();
    }
    const Unseen unseen;
    back_to_caller(crew->fiber_of(self()));
  }
}

void take_part(Meeting& meeting, const Operation& operation, Where where) {
  const Unseen unseen;
  if (arrive(meeting, operation, where)) {
    operation.work(*current()->exchange);
    make_ready(meeting.first, meeting.count);
  }
  run_others();
}

// What a meeting's coming time is ordered by. Not by what the last one was: who came early would be ordered before who
// has yet to leave. Nobody comes to the next but one before that.
char* turn_of(Meeting& meeting) {
  const Unseen unseen;
  return &meeting.turn[meeting.times % 2];
}

void meet(Meeting& meeting, const Operation& operation, Where where) {
  if (!operation.orders_memory) return take_part(meeting, operation, where);
  char* turn = turn_of(meeting);
  order_before(turn);
  take_part(meeting, operation, where);
  order_after(turn);
}

}  // namespace

void meet_cta(const Operation& operation, Where where) { meet(self().cta->all, operation, where); }

void meet_warp(const Operation& operation, Where where) {
  meet(self().cta->warps[static_cast<std::size_t>(self().number / 32)], operation, where);
}

void run(Cta& cta) {
  if (!crew || crew->fibers.count() < cta.members.size()) crew = std::make_unique<Crew>(cta.members.size());
  crew->cta = &cta;
  order_before(&cta.start);
  {
    const Unseen unseen;
    make_ready(0, static_cast<int>(cta.members.size()));
    run_next(crew->caller);
  }
  order_after(&cta.finish);
  if (!crew->failed) return;
  // The others were left in the midst of a kernel.
  const std::unique_ptr<Crew> stopped = std::move(crew);
  std::rethrow_exception(stopped->failed);
}

}  // namespace mla_pass::cuda::shim
