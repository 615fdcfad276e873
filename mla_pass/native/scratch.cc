#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace mla_pass {
namespace {

std::atomic<std::uint64_t> growths{0};

struct Room {
  std::byte* data;
  std::size_t size;
};

void release(const Room& room) { ::operator delete(room.data, std::align_val_t{Carver::kAlign}); }

Room allocate(std::size_t size) {
  growths.fetch_add(1, std::memory_order_relaxed);
  return {static_cast<std::byte*>(::operator new(size, std::align_val_t{Carver::kAlign})), size};
}

// Rooms nobody holds, smallest first. At most as many as threads have been at work at a time.
class Shelf {
 public:
  ~Shelf() {
    for (const Room& room : rooms_) release(room);
  }

  Room take(std::size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fits = std::find_if(rooms_.begin(), rooms_.end(), [&](const Room& r) { return r.size >= size; });
      if (fits != rooms_.end()) return remove(fits);
      if (!rooms_.empty()) release(remove(rooms_.end() - 1));  // too small for this: let it go before asking for more
      rooms_.reserve(rooms_.size() + ++held_ + 1);
    }
    return allocate(size);
  }

  void put(const Room& room) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto after = std::find_if(rooms_.begin(), rooms_.end(), [&](const Room& r) { return r.size >= room.size; });
    rooms_.insert(after, room);  // does not allocate: room was reserved for every lease
  }

 private:
  Room remove(std::vector<Room>::iterator at) {
    const Room room = *at;
    rooms_.erase(at);
    return room;
  }

  std::mutex mutex_;
  std::vector<Room> rooms_;
  std::size_t held_ = 0;
};

Shelf& shelf() {
  static Shelf one;
  return one;
}

}  // namespace

Lease::Lease(std::size_t bytes) {
  const Room room = shelf().take(std::max<std::size_t>(bytes, 1));
  data_ = room.data;
  size_ = room.size;
#if defined(MLA_PASS_POISON)
  std::memset(data_, 0xff, size_);  // NaN in every type: what is read before it is written shows
#endif
}

Lease::~Lease() { shelf().put({data_, size_}); }

std::uint64_t scratch_growths() { return growths.load(std::memory_order_relaxed); }

}  // namespace mla_pass
