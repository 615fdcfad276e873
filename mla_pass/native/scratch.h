// Working memory that outlives a call, so that a decoding step allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace mla_pass {

// Room of at least `bytes`, taken from what earlier leases gave back and returned when the lease ends. Threads may
// hold leases at the same time; each has its own room. Contents are whatever they were.
class Lease {
 public:
  explicit Lease(std::size_t bytes);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  std::size_t size_;
};

// How often a lease had to ask the system for memory, in this process.
std::uint64_t scratch_growths();

// Cuts one room into arrays. On a null room it only counts what they take.
class Carver {
 public:
  explicit Carver(std::byte* room) : room_(room) {}

  template <class T>
  T* take(Index count) {
    static_assert(alignof(T) <= kAlign);
    const std::size_t at = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return room_ == nullptr ? nullptr : reinterpret_cast<T*>(room_ + at);
  }

  std::size_t used() const { return used_; }

  static constexpr std::size_t kAlign = 64;

 private:
  std::byte* room_;
  std::size_t used_ = 0;
};

// Bytes that `lay` carves.
template <class Lay>
std::size_t bytes_of(const Lay& lay) {
  Carver counter(nullptr);
  lay(counter);
  return counter.used();
}

}  // namespace mla_pass
