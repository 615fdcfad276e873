#include "cta.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <sstream>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mla_pass::cuda::shim {
namespace {

constexpr int kPoison = 0xff;
constexpr std::uintptr_t kAlignment = 16;  // of copies and of matrix rows

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % kAlignment == 0; }

std::string text(Where where) { return std::string(where.file) + ":" + std::to_string(where.line); }

bool same(Where a, Where b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Out of the way of those that do come together, whose stacks stay small so.
[[noreturn, gnu::noinline]] void fail_apart(const Meeting& meeting, const Operation& operation, Where where) {
  fail("thread " + std::to_string(self().number) + " came to " + operation.name + " at " + text(where) +
       " while others of threads " + std::to_string(meeting.first) + "-" +
       std::to_string(meeting.first + meeting.count - 1) + " wait in " + meeting.operation->name + " at " +
       text(meeting.where));
}

[[noreturn, gnu::noinline]] void fail_outside(const void* p, const char* use, Where where) {
  const SharedMemory& shared = self().cta->shared;
  fail(std::string(use) + " at " + text(where) + " is given byte " +
       std::to_string(static_cast<const unsigned char*>(p) - shared.data()) + " of " + std::to_string(shared.bytes()) +
       " bytes of shared memory; expected 16 bytes in there at a multiple of 16");
}

void carry_out(const Copy& copy) {
  Sixteen read = {};
  if (copy.bytes == static_cast<int>(kAlignment)) {
    read = *static_cast<const Sixteen*>(copy.from);
  } else if (copy.bytes > 0) {
    std::memcpy(&read, copy.from, static_cast<std::size_t>(copy.bytes));
  }
  *static_cast<Sixteen*>(copy.to) = read;
}

}  // namespace

__thread Thread* running = nullptr;

// ---- shared memory

SharedMemory::SharedMemory(std::size_t bytes) : bytes_(bytes) {
  block_ = static_cast<unsigned char*>(::operator new(bytes + 2 * kGuard, std::align_val_t(128)));
  guard(true);
}

SharedMemory::~SharedMemory() {
  guard(false);
  ::operator delete(block_, std::align_val_t(128));
}

void SharedMemory::guard([[maybe_unused]] bool closed) {
#if defined(__SANITIZE_ADDRESS__)
  for (unsigned char* p : {block_, data() + bytes_}) {
    closed ? __asan_poison_memory_region(p, kGuard) : __asan_unpoison_memory_region(p, kGuard);
  }
#endif
}

void SharedMemory::poison() {
  guard(false);
  std::memset(block_, kPoison, bytes_ + 2 * kGuard);
  guard(true);
}

std::ptrdiff_t SharedMemory::written_outside() {
  guard(false);
  const auto first_written = [](const unsigned char* p) {
    return std::find_if(p, p + kGuard, [](unsigned char byte) { return byte != kPoison; });
  };
  const unsigned char *before = first_written(block_), *behind = first_written(data() + bytes_);
  guard(true);
  if (before != data()) return before - data();
  if (behind != data() + bytes_ + kGuard) return behind - data();
  return 0;
}

// ---- a CTA

Cta::Cta(const char* name, Grid grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
         const Options& options)
    : name(name), kernel(kernel), options(options), shared(shared_bytes), exchanges(threads / 32), members(threads),
      all{0, threads, 0, nullptr, {}, 0, {}} {
  for (int i = 0; i < threads; ++i) {
    Member& member = members[i];
    member.index = {i, 0, 0};
    member.grid = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
    member.threads = threads;
    member.lane = i % 32;
    member.shared = shared.data();
    member.exchange = &exchanges[i / 32];
    member.cta = this;
    member.number = i;
    if (member.lane == 0) warps.push_back({i, 32, 0, nullptr, {}, 0, {}});
  }
}

void Cta::begin(Place block) {
  shared.poison();
  for (Member& member : members) {
    member.block = block;
    member.copies.clear();
    member.groups.clear();
    member.open = 0;
    member.waits = nullptr;
    member.ended = false;
  }
}

void Cta::end() {
  const std::ptrdiff_t outside = shared.written_outside();
  if (outside == 0) return;
  throw Fault(report("byte " + std::to_string(outside) + " of " + std::to_string(shared.bytes()) +
                     " bytes of shared memory was written"));
}

std::string Cta::report(const std::string& what) const {
  const Place& block = members[0].block;
  std::ostringstream out;
  out << name << ", CTA (" << block.x << ", " << block.y << ", " << block.z << "): " << what;
  return out.str();
}

std::string Cta::whereabouts() const {
  const auto alike = [](const Member& a, const Member& b) {
    return a.ended == b.ended && a.waits == b.waits && (a.waits == nullptr || same(a.where, b.where));
  };
  std::ostringstream out;
  for (auto first = members.begin(); first != members.end();) {
    const auto behind = std::find_if(first, members.end(), [&](const Member& m) { return !alike(m, *first); });
    out << (first == members.begin() ? "threads " : "; threads ") << first->number << "-" << (behind - 1)->number;
    if (first->waits) {
      out << " wait in " << first->waits->name << " at " << text(first->where);
    } else {
      out << (first->ended ? " have ended" : " run");
    }
    first = behind;
  }
  return out.str();
}

bool arrive(Meeting& meeting, const Operation& operation, Where where) {
  Member& member = self();
  if (meeting.arrived == 0) {
    meeting.operation = &operation;
    meeting.where = where;
  } else if (meeting.operation != &operation || !same(meeting.where, where)) {
    fail_apart(meeting, operation, where);
  }
  member.waits = &operation;
  member.where = where;
  if (++meeting.arrived < meeting.count) return false;
  meeting.arrived = 0;
  ++meeting.times;
  return true;
}

void fail(const std::string& what) { throw Fault(self().cta->report(what)); }

// ---- copies

void expect_shared(const void* p, const char* use, Where where) {
  const SharedMemory& shared = self().cta->shared;
  const std::ptrdiff_t at = static_cast<const unsigned char*>(p) - shared.data();
  const auto last = static_cast<std::ptrdiff_t>(shared.bytes()) - static_cast<std::ptrdiff_t>(kAlignment);
  if (at < 0 || at > last || !aligned(p)) fail_outside(p, use, where);
}

void copy(void* shared, const void* global, int bytes, Where where) {
  const char* use = "copy_async";
  expect_shared(shared, use, where);
  if (bytes < 0 || bytes > static_cast<int>(kAlignment)) {
    fail(std::string(use) + " at " + text(where) + " is to read " + std::to_string(bytes) + " bytes; expected 0 to 16");
  }
  if (!aligned(global)) {
    fail(std::string(use) + " at " + text(where) + " is to read from an address that is no multiple of 16");
  }
  Member& member = self();
  const Copy copy = {shared, global, bytes};
  if (member.cta->options.copies == Copies::eager) return carry_out(copy);
  *static_cast<Sixteen*>(shared) = Sixteen{} + kPoison;
  member.copies.push_back(copy);
  ++member.open;
}

void commit_copies() {
  Member& member = self();
  member.groups.push_back(member.open);
  member.open = 0;
}

void wait_for_copies(int groups_left) {
  Member& member = self();
  const auto left = static_cast<std::size_t>(groups_left);
  if (member.groups.size() <= left) return;
  const auto behind = member.groups.end() - groups_left;
  std::size_t count = 0;
  for (auto group = member.groups.begin(); group != behind; ++group) count += *group;
  for (std::size_t i = 0; i < count; ++i) carry_out(member.copies[i]);
  member.copies.erase(member.copies.begin(), member.copies.begin() + static_cast<std::ptrdiff_t>(count));
  member.groups.erase(member.groups.begin(), behind);
}

// ---- a launch

void launch(const char* name, Grid grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
            const Options& options) {
  constexpr int kMostThreads = 1024;
  if (threads < 1 || threads % 32 != 0 || threads > kMostThreads) {
    throw Fault(std::string(name) + " has " + std::to_string(threads) +
                " threads; expected a multiple of 32, 1024 at the most");
  }
  const std::size_t count = std::size_t{grid.x} * grid.y * grid.z;
  std::atomic<std::size_t> next{0};
  std::exception_ptr failed;
  std::mutex mutex;
  const auto work = [&] {
    try {
      Cta cta(name, grid, threads, shared_bytes, kernel, options);
      for (std::size_t i = next++; i < count; i = next++) {
        cta.begin({static_cast<int>(i % grid.x), static_cast<int>(i / grid.x % grid.y),
                   static_cast<int>(i / grid.x / grid.y)});
        run(cta);
        cta.end();
      }
    } catch (...) {  // whatever it is, it belongs to the caller
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failed) failed = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < options.workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (failed) std::rethrow_exception(failed);
}

}  // namespace mla_pass::cuda::shim
