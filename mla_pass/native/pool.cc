#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace mla_pass {
namespace {

// How often a thread looks for work before it goes to sleep: some microseconds, longer than from one step of an
// execution to the next.
constexpr int kLooks = 200;
// The same for a caller that waits for the others' last tasks, which are sure to end soon.
constexpr int kLastLooks = 10 * kLooks;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*task)(void*, std::size_t);
  void* user;
  std::size_t count;
};

// A job has a door with seats behind it. A helper that finds a seat free takes it, works, and leaves; the caller works,
// too, closes the door, and waits until nobody is inside. So no helper ever has to come, and none that is late can mix
// up two jobs.
class Pool {
 public:
  // The one whose threads these are.
  const pid_t process = getpid();

  // False, and nothing done, when another job has the helpers.
  bool run(const Job& job, std::uint64_t helpers) {
    if (busy_.exchange(true)) return false;
    const Free free{busy_};
    hire(helpers);
    job_ = job;
    next_ = 0;
    door_ = helpers * kSeat;
    wake(helpers);
    work();
    door_ &= kInside;
    await_helpers();
    if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
    return true;
  }

 private:
  static constexpr std::uint64_t kSeat = std::uint64_t{1} << 32, kInside = kSeat - 1;

  struct Free {
    std::atomic<bool>& busy;
    ~Free() { busy = false; }
  };

  void hire(std::uint64_t helpers) {
    for (; hired_ < helpers; ++hired_) {
      std::thread([this] {
        for (;;) {
          await_job();
          work();
          leave();
        }
      }).detach();
    }
  }

  bool enter() {
    std::uint64_t door = door_;
    while (door >= kSeat) {
      if (door_.compare_exchange_weak(door, door - kSeat + 1)) return true;
    }
    return false;
  }

  // Who goes to sleep says so before the last look at the door; who opens it does so before looking for sleepers.
  void await_job() {
    for (int i = 0; i < kLooks; ++i, pause()) {
      if (enter()) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    opened_.wait(lock, [this] { return enter(); });
    --asleep_;
  }

  void wake(std::uint64_t helpers) {
    std::uint64_t wanted = std::min<std::uint64_t>(helpers, asleep_);
    if (wanted == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }  // who has looked is asleep now
    for (; wanted > 0; --wanted) opened_.notify_one();
  }

  void leave() {
    if ((--door_ & kInside) > 0 || !waiting_) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    left_.notify_one();
  }

  void await_helpers() {
    const auto empty = [this] { return (door_ & kInside) == 0; };
    for (int i = 0; i < kLastLooks; ++i, pause()) {
      if (empty()) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_ = true;
    left_.wait(lock, empty);
    waiting_ = false;
  }

  void work() {
    try {
      for (std::size_t i = next_++; i < job_.count; i = next_++) job_.task(job_.user, i);
    } catch (...) {  // whatever it is, it belongs to the caller
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!failed_) failed_ = std::current_exception();
    }
  }

  std::atomic<bool> busy_{false}, waiting_{false};
  std::atomic<std::uint64_t> door_{0};  // free seats, in units of kSeat, and helpers inside
  std::atomic<std::uint64_t> asleep_{0};
  std::atomic<std::size_t> next_{0};
  Job job_{};  // written while nobody is inside
  std::uint64_t hired_ = 0;
  std::exception_ptr failed_;
  std::mutex mutex_;
  std::condition_variable opened_, left_;
};

// Never destroyed: its threads sleep on it to the end of the process. A forked child has its memory but no thread of
// its own in it, and perhaps a lock that one of them held, so it makes another.
Pool& pool() {
  static std::atomic<Pool*> made{nullptr};
  Pool* found = made;
  if (found != nullptr && found->process == getpid()) return *found;
  auto fresh = std::make_unique<Pool>();
  if (made.compare_exchange_strong(found, fresh.get())) return *fresh.release();
  return *found;
}

}  // namespace

void run_on_own(void* workers, std::size_t count, void (*task)(void*, std::size_t), void* user) {
  const auto most = static_cast<std::size_t>(*static_cast<const Index*>(workers));
  const std::size_t threads = std::min(most, count);
  if (threads > 1 && pool().run({task, user, count}, threads - 1)) return;
  for (std::size_t i = 0; i < count; ++i) task(user, i);
}

}  // namespace mla_pass
