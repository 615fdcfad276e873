// Copies of `attend` into shared memory: keys of a tile, and the queries that meet them.
//
// A tile of 64 keys of 512 + 64 numbers is 74 KB of cache rows, read once for all query rows of a CTA. Where queries
// turn in blocks of 64 rows, each tile brings its own: 2 orders of 16 rows of 512 numbers are 33 KB, which come from
// the second-level cache.
#pragma once

#include "attend_unpack.cuh"

namespace mla_pass::cuda {

// Threads share `units` 16-byte units of each of some rows out: neighbours, a power of two of them and at most a warp,
// take a row's. Calls visit(unit, first row, row step) for every unit that is this thread's.
template <class Visit>
MLA_DEVICE void for_units(int units, const Visit& visit) {
  int shift = 5;
  while (shift > 0 && 1 << (shift - 1) >= units) --shift;
  const int across = 1 << shift, at = thread().x;
  for (int unit = at & (across - 1); unit < units; unit += across) visit(unit, at >> shift, threads() >> shift);
}

// Copies rows [real.first, real.end) of `rows` rows; the others become zeros. Steps are in bytes.
MLA_DEVICE void copy_rows(void* to, int to_step, const void* from, int from_step, int units, int rows, Sight real) {
  for_units(units, [&](int unit, int first, int step) {
    for (int row = first; row < rows; row += step) {
      const bool copied = row >= real.first && row < real.end;
      copy_async(static_cast<unsigned char*>(to) + row * to_step + unit * 16,
                 static_cast<const unsigned char*>(from) + (copied ? row : real.first) * from_step + unit * 16,
                 copied ? 16 : 0);
    }
  });
}

// The keys of a CTA's problem, tile by tile.
class Keys {
 public:
  MLA_DEVICE Keys(const Attend& p, const Work& work) : p_(p), work_(work) {}

  // Rows of a tile that hold keys that the CTA's queries see.
  MLA_DEVICE Sight real(int tile) const {
    const int first = tile * p_.tile;
    return {max(work_.seen.first - first, 0), min(work_.seen.end - first, p_.tile)};
  }

  MLA_DEVICE std::uint16_t* at(int buffer) const {
    const int offset = p_.shared.tile + (p_.shared.direct ? buffer * p_.shared.tile_bytes : 0);
    return reinterpret_cast<std::uint16_t*>(shared_memory() + offset);
  }

  MLA_DEVICE void copy(int tile, int buffer) const {
    for (int part = 0; part < p_.parts; ++part) {
      if (p_.shared.direct) {
        copy_part(tile, buffer, part);
      } else {
        copy_run(tile, part);
      }
    }
  }

  // What was copied as it lies becomes the tile.
  template <class T>
  MLA_DEVICE void unpack(int tile) const {
    const Sight rows = real(tile);
    const RawRow raw = {raw_run(tile, 0), raw_run(tile, 1)};
    for_units(p_.shared.fine_column / 8, [&](int unit, int first, int step) {
      const bool rope = unit * 8 >= p_.shared.rope_column;
      const Run run = rope ? run_of(p_, p_.rank + unit * 8 - p_.shared.rope_column, p_.rank + p_.rope_dim)
                           : run_of(p_, unit * 8, p_.rank);
      for (int row = first; row < p_.tile; row += step) {
        std::uint16_t* to = at(0) + row * p_.shared.tile_step + unit * 8;
        if (row < rows.first || row >= rows.end) {
          *reinterpret_cast<Unit*>(to) = {};
          continue;
        }
        const int i = row - rows.first;
        unpack_run<T>(p_, run, {raw.first + i * p_.part[0].bytes, raw.second + i * p_.part[1].bytes}, to);
      }
    });
  }

  // Zeros in columns that nothing else is written to: they meet zeros of the queries, so they must be numbers.
  MLA_DEVICE void clear_pads() const {
    clear(up8(p_.parts == 1 ? p_.part[0].numbers : p_.rank), p_.shared.rope_column);
    clear(p_.shared.rope_column + up8(p_.rope_dim), p_.shared.fine_column);
    clear(p_.shared.fine_column + work_.groups * p_.fine_width, p_.shared.columns);
  }

 private:
  // A row in memory; those of an expansion are counted from the launch's first one.
  MLA_DEVICE const unsigned char* stored(int part, int row) const {
    const bool cache = p_.parts == 2;
    const long long at = static_cast<long long>(cache ? work_.sequence : work_.problem) * p_.capacity + row;
    return p_.part[part].data + (at - (cache ? 0 : p_.begin)) * p_.part[part].bytes;
  }

  // Latents and rope dims go to columns of their own.
  MLA_DEVICE void copy_part(int tile, int buffer, int part) const {
    const int begin = part * p_.split, end = begin + p_.part[part].numbers, rank = p_.parts == 1 ? end : p_.rank;
    const int middle = max(begin, min(end, rank));
    copy_columns(tile, buffer, part, 0, middle - begin, begin);
    copy_columns(tile, buffer, part, middle - begin, end - middle, p_.shared.rope_column + middle - rank);
  }

  MLA_DEVICE void copy_columns(int tile, int buffer, int part, int first, int count, int column) const {
    copy_rows(at(buffer) + column, p_.shared.tile_step * 2, stored(part, tile * p_.tile) + first * 2,
              p_.part[part].bytes, count / 8, p_.tile, real(tile));
  }

  MLA_DEVICE const unsigned char* first_stored(int tile, int part) const {
    return stored(part, tile * p_.tile + real(tile).first);
  }

  // Bytes of a 16-byte unit before the one that a run begins with.
  MLA_DEVICE static int before(const unsigned char* begin) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) & 15);
  }

  // Real rows of a part are one run of bytes. It is copied in whole units, from the one that holds its first byte.
  MLA_DEVICE void copy_run(int tile, int part) const {
    const Sight rows = real(tile);
    const unsigned char* begin = first_stored(tile, part);
    const int bytes = before(begin) + (rows.end - rows.first) * p_.part[part].bytes;
    for (int i = thread().x * 16; i < bytes; i += threads() * 16) {
      copy_async(shared_memory() + p_.shared.raw[part] + i, begin - before(begin) + i, min(16, bytes - i));
    }
  }

  MLA_DEVICE const unsigned char* raw_run(int tile, int part) const {
    return shared_memory() + p_.shared.raw[part] + before(first_stored(tile, part));
  }

  MLA_DEVICE void clear(int begin, int end) const {
    for (int buffer = 0; buffer < p_.shared.tiles; ++buffer) {
      for_units((end - begin) / 8, [&](int unit, int first, int step) {
        for (int row = first; row < p_.tile; row += step) {
          *reinterpret_cast<Unit*>(at(buffer) + row * p_.shared.tile_step + begin + unit * 8) = {};
        }
      });
    }
  }

  const Attend& p_;
  const Work& work_;
};

// The query rows of a CTA, `kRows` of which there is room for; those that there are not are zeros.
template <int kRows>
class QueryRows {
 public:
  MLA_DEVICE QueryRows(const Attend& p, const Work& work) : p_(p), work_(work) {}

  // The block of `varying` that a tile lies in.
  MLA_DEVICE int block_of(int tile) const { return p_.block > 0 ? (tile * p_.tile - p_.begin) / p_.block : 0; }

  MLA_DEVICE std::uint16_t* varying(int buffer) const {
    return reinterpret_cast<std::uint16_t*>(shared_memory() + p_.shared.varying + buffer * p_.shared.varying_bytes);
  }
  MLA_DEVICE std::uint16_t* fixed() const {
    return reinterpret_cast<std::uint16_t*>(shared_memory() + p_.shared.fixed);
  }

  // Numbers between orders.
  MLA_DEVICE int order_step() const { return kRows * p_.shared.varying_step; }

  // Of the problem's rows [blocks][orders][R], the CTA's first.
  MLA_DEVICE long long first(int block, int order) const {
    return ((static_cast<long long>(work_.problem) * p_.blocks + block) * p_.orders + order) * p_.rows + work_.row;
  }

  MLA_DEVICE void copy_varying(int block, int buffer) const {
    for (int order = 0; order < p_.orders; ++order) {
      copy_rows(varying(buffer) + order * order_step(), p_.shared.varying_step * 2,
                p_.varying + first(block, order) * p_.key_width, p_.key_width * 2, p_.key_width / 8, kRows,
                {0, work_.rows});
    }
  }

  // A row's decoded dims meet those of its own group's keys, all others zeros.
  MLA_DEVICE void copy_fixed() const {
    const int rope_units = p_.rope_width / 8, fine_units = p_.fine_width / 8, width = p_.rope_width + p_.fine_width;
    const std::uint16_t* from = p_.fixed + (static_cast<long long>(work_.problem) * p_.rows + work_.row) * width;
    for_units(p_.shared.fixed_width / 8, [&](int unit, int first_row, int step) {
      const bool rope = unit < rope_units;
      const int group = rope ? 0 : work_.first_group + (unit - rope_units) / fine_units;
      const int source = rope ? unit : rope_units + (unit - rope_units) % fine_units;
      for (int row = first_row; row < kRows; row += step) {
        const bool real = row < work_.rows && (rope || head_of(p_, work_.row + row) / p_.per_group == group);
        copy_async(fixed() + row * p_.shared.fixed_step + unit * 8, from + (real ? row : 0) * width + source * 8,
                   real ? 16 : 0);
      }
    });
  }

 private:
  const Attend& p_;
  const Work& work_;
};

}  // namespace mla_pass::cuda
