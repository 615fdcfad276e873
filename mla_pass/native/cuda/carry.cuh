// Past rows into a present that is other memory: read and written once each, in the widest words that both keep to.
#pragma once

#include "sizes.h"
#include "simt.h"
#include "params.h"

namespace mla_pass::cuda {

constexpr int kCarryThreads = 256;

struct alignas(16) Words {
  std::uint32_t word[4];
};

// Bytes [begin, end) of a sequence's rows, which are multiples of the word.
template <class Word>
MLA_DEVICE void carry_words(const unsigned char* from, unsigned char* to, long long begin, long long end) {
  constexpr int kSize = static_cast<int>(sizeof(Word));
  for (long long at = begin + thread().x * kSize; at < end; at += kCarryThreads * kSize) {
    *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(from + at);
  }
}

// grid (pieces of kCarryBytes, sequences)
MLA_DEVICE void carry_rows(const Carry& p) {
  const long long rows = static_cast<long long>(p.rows) * p.bytes, room = static_cast<long long>(p.capacity) * p.bytes;
  const unsigned char* from = p.past + block().y * rows;
  unsigned char* to = p.present + block().y * room;
  const long long begin = static_cast<long long>(block().x) * kCarryBytes;
  const long long end = min(begin + kCarryBytes, rows);
  const auto unit = reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to) |
                    static_cast<std::uintptr_t>(rows);
  if (unit % 16 == 0) return carry_words<Words>(from, to, begin, end);
  if (unit % 4 == 0) return carry_words<std::uint32_t>(from, to, begin, end);
  carry_words<unsigned char>(from, to, begin, end);
}

}  // namespace mla_pass::cuda
