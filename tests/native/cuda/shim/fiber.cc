#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace mla_pass::cuda::shim {
namespace {

// Address space, of which a kernel touches a few pages.
constexpr std::size_t kStackBytes = 256 << 10;
// Neighbours' stacks begin so much further down in turn: were they pages apart, the few lines that each uses would fall
// into one set of the cache.
constexpr std::size_t kStagger = 9 * 64, kStaggered = 32;

// ---- what sanitizers are told

#if defined(__SANITIZE_ADDRESS__)
thread_local Fiber* left = nullptr;  // whom the running fiber was switched to from

void about_to_switch(Fiber& from, const Fiber& to) {
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
}

// Tells where the stack of the one that was left lies, too: nobody else knows a thread's own.
void has_switched(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->bytes);
}

void* make_thread() { return nullptr; }

void forget_stacks(void* memory, std::size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }

#elif defined(__SANITIZE_THREAD__)

// A turn taken orders nothing.
void about_to_switch(Fiber& from, const Fiber& to) {
  if (from.thread == nullptr) from.thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
}

void has_switched(void*) {}

// Never destroyed, nor could it be: fibers rest in code that is hidden, which ThreadSanitizer takes for a mistake.
void* make_thread() { return __tsan_create_fiber(0); }

void forget_stacks(void*, std::size_t) {}

#else

void about_to_switch(Fiber&, const Fiber&) {}
void has_switched(void*) {}
void* make_thread() { return nullptr; }
void forget_stacks(void*, std::size_t) {}

#endif

}  // namespace

// ---- stacks

#if defined(SHIM_UCONTEXT)
namespace {

void prepare(Fiber& fiber, unsigned char* bottom, std::size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void change_stacks(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

}  // namespace

#else

// swapcontext saves the signal mask, which takes two system calls, 300 times what this takes. All other registers are
// the caller's to save.
asm(R"(
  .text
  .p2align 4
  .type mla_pass_shim_change_stacks, @function
mla_pass_shim_change_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mla_pass_shim_change_stacks, . - mla_pass_shim_change_stacks
)");
extern "C" void mla_pass_shim_change_stacks(void** from, void** to);

namespace {

// As if `entry` had been called by nobody and left off before its first instruction.
void prepare(Fiber& fiber, unsigned char* bottom, std::size_t bytes, void (*entry)()) {
  constexpr std::size_t kSaved = 6;
  void** top = reinterpret_cast<void**>(bottom + bytes);
  *--top = nullptr;  // where it would return to
  *--top = reinterpret_cast<void*>(entry);
  for (std::size_t i = 0; i < kSaved; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void change_stacks(Fiber& from, Fiber& to) { mla_pass_shim_change_stacks(&from.stack_pointer, &to.stack_pointer); }

}  // namespace

#endif

namespace {

[[noreturn]] void refuse(const char* call) {
  throw std::system_error(errno, std::generic_category(), std::string("no memory for the fibers' stacks: ") + call);
}

}  // namespace

Fibers::Fibers(std::size_t count, void (*entry)()) : fibers_(count) {
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), step = guard + kStackBytes;
  bytes_ = count * step;
  void* memory = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) refuse("mmap");
  memory_ = static_cast<unsigned char*>(memory);
  for (std::size_t i = 0; i < count; ++i) {
    unsigned char* bottom = memory_ + i * step + guard;
    if (mprotect(bottom, kStackBytes, PROT_READ | PROT_WRITE) != 0) refuse("mprotect");
    fibers_[i].bottom = bottom;
    fibers_[i].bytes = kStackBytes - i % kStaggered * kStagger;
    fibers_[i].fake_stack = nullptr;
    fibers_[i].thread = make_thread();
    prepare(fibers_[i], bottom, fibers_[i].bytes, entry);
  }
}

Fibers::~Fibers() {
  forget_stacks(memory_, bytes_);
  munmap(memory_, bytes_);
}

void switch_fiber(Fiber& from, Fiber& to) {
  about_to_switch(from, to);
  change_stacks(from, to);
  has_switched(from.fake_stack);
}

void enter_fiber() { has_switched(nullptr); }

}  // namespace mla_pass::cuda::shim
