// Stacks of their own for functions that take turns on one thread.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_UCONTEXT
#endif
#if defined(SHIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace mla_pass::cuda::shim {

// Where a fiber, or the thread that fibers run on, was left.
struct Fiber {
#if defined(SHIM_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  // What a sanitizer must be told.
  const void* bottom;  // of the stack
  std::size_t bytes;
  void* fake_stack;    // AddressSanitizer's
  void* thread;        // ThreadSanitizer's
};

// So many fibers, which begin in `entry` when first switched to. It must never return.
class Fibers {
 public:
  Fibers(std::size_t count, void (*entry)());
  ~Fibers();
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  std::size_t count() const { return fibers_.size(); }
  Fiber& operator[](std::size_t i) { return fibers_[i]; }

 private:
  unsigned char* memory_;
  std::size_t bytes_;
  std::vector<Fiber> fibers_;
};

// Leaves `from`, which is running, for `to`.
void switch_fiber(Fiber& from, Fiber& to);
// What a fiber does first, having been switched to for the first time.
void enter_fiber();

}  // namespace mla_pass::cuda::shim
