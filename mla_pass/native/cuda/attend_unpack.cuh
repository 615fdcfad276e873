// Stored rows, as they were copied, to 16-bit columns of `attend`'s tile.
#pragma once

#include "attend_work.cuh"
#include "stored.cuh"

namespace mla_pass::cuda {

// Eight 16-bit numbers: what a copy carries at a time.
struct alignas(16) [[gnu::may_alias]] Unit {
  std::uint32_t word[4];
};

// A row's bytes in both parts, in shared memory.
struct RawRow {
  const unsigned char *first, *second;
  MLA_DEVICE const unsigned char* part(int i) const { return i == 0 ? first : second; }
};

// Up to eight neighbouring numbers, the same ones of every row; `first` counts all latents and rope dims, `at` those of
// the part that holds the first of them.
struct Run {
  int first, count;
  int part, at, segment;
  bool whole;  // eight, all in this part and at one scale
};

MLA_DEVICE Run run_of(const Attend& p, int first, int end) {
  Run run{};
  run.first = first;
  run.count = min(8, end - first);
  run.part = first >= p.split;
  run.at = first - run.part * p.split;
  const Part& part = p.part[run.part];
  run.whole = run.count == 8 && run.at + 8 <= part.numbers;
  if (!run.whole || part.as == Stored::model) return run;
  const int length = segment_length(part.numbers);
  run.segment = run.at / length;
  run.whole = run.at + 8 <= (run.segment + 1) * length;
  return run;
}

MLA_DEVICE bool aligned(const void* p, unsigned bytes) {
  return (reinterpret_cast<std::uintptr_t>(p) & (bytes - 1)) == 0;
}

MLA_DEVICE Unit unpack_model(const unsigned char* from) {
  if (aligned(from, 16)) return *reinterpret_cast<const Unit*>(from);
  const auto* numbers = reinterpret_cast<const std::uint16_t*>(from);
  Unit unit;
  MLA_UNROLL
  for (int i = 0; i < 4; ++i) unit.word[i] = numbers[2 * i] | static_cast<std::uint32_t>(numbers[2 * i + 1]) << 16;
  return unit;
}

MLA_DEVICE std::uint32_t four_bytes(const unsigned char* from) {
  if (aligned(from, 4)) return *reinterpret_cast<const std::uint32_t*>(from);
  return from[0] | from[1] << 8 | from[2] << 16 | static_cast<std::uint32_t>(from[3]) << 24;
}

template <class T>
MLA_DEVICE Unit unpack_eight(const Part& part, const unsigned char* row, const Run& run) {
  const float step = segment_step(part, row, run.segment);
  Unit unit;
  MLA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t word = four_bytes(row + run.at + 4 * i);
    float x[4];
    MLA_UNROLL
    for (int j = 0; j < 4; ++j) x[j] = from_eight(part.as, static_cast<unsigned char>(word >> 8 * j)) * step;
    unit.word[2 * i] = T::pack(x[0], x[1]);
    unit.word[2 * i + 1] = T::pack(x[2], x[3]);
  }
  return unit;
}

// A row's run to eight columns; those behind its end become zeros.
template <class T>
MLA_DEVICE void unpack_run(const Attend& p, const Run& run, const RawRow& row, std::uint16_t* to) {
  if (run.whole) {
    const Part& part = p.part[run.part];
    const unsigned char* from = row.part(run.part);
    *reinterpret_cast<Unit*>(to) =
        part.as == Stored::model ? unpack_model(from + run.at * 2) : unpack_eight<T>(part, from, run);
    return;
  }
  *reinterpret_cast<Unit*>(to) = {};
  for (int i = 0; i < run.count; ++i) {
    const int part = run.first + i >= p.split;
    to[i] = T::narrow(stored_number<T>(p.part[part], row.part(part), run.first + i - part * p.split));
  }
}

}  // namespace mla_pass::cuda
