// Decoded dims of a tile's keys: pairs that turn too fast for a block of 64 rows, made of the latents in shared memory.
//
// Counted a tile of 64 keys and a kv group of m decoded pairs: 64 * 2 m * key_rank multiply-adds; key_up's rows of
// these pairs, 4 m * key_rank bytes, from the second-level cache; latents, 128 * key_rank bytes of shared memory for
// every 16 columns. At m = 20, key_rank = 512 and 8 groups that is three times the work of all else on a tile, and
// 330 KB of key_up where the tile itself is 74 KB: a node whose blocks are finer than 64 rows is bound by it. So a warp
// makes 16 columns of all keys at a time, which halves what a product loads of shared memory, reads key_up once, and
// has the next columns of it under way while it multiplies.
#pragma once

#include "attend_copy.cuh"
#include "turn.cuh"

namespace mla_pass::cuda {

// Eight neighbouring columns of a group: real and imaginary parts of four pairs alternate, so that a lane of a product
// holds both of a pair.
struct PairColumns {
  int group;   // of all
  int pair;    // the first; behind the decoded ones where there are no columns
  int column;  // in the tile
};

// Two runs of eight columns for all keys of a tile.
template <class T, int kKeys>
class Decoder {
 public:
  MLA_DEVICE Decoder(const Attend& p, const PairColumns& first, const PairColumns& second)
      : p_(p), columns_{first, second} {}

  // Keys [real.first, real.end) of a tile that begins at cache row `first`; those that there are not become zeros.
  MLA_DEVICE void decode(int first, Sight real, std::uint16_t* tile) {
    const std::uint16_t* keys = tile + lane() % 16 * p_.shared.tile_step + lane() / 16 * 8;
    multiply(keys);
    MLA_UNROLL
    for (int run = 0; run < kRuns; ++run) turn(run, first, real, tile);
  }

 private:
  static constexpr int kRuns = 2;
  // Steps of 16 latents that key_up is read ahead: a read takes some 300 cycles, a step's products half of that.
  static constexpr int kAhead = 2;

  // Of each run what a lane gives to the products of some steps.
  struct Columns {
    std::uint32_t of[kAhead][kRuns][2];
  };

  // A row of key_up: of a pair's real or imaginary part.
  MLA_DEVICE long long dim(int group, int pair, int part) const {
    return static_cast<long long>(group) * p_.nope_dim + pair + part * p_.bands.pairs;
  }

  // Two neighbouring numbers of a row of key_up, zeros behind its end. Rows of an odd number begin at odd addresses.
  MLA_DEVICE std::uint32_t two(const std::uint16_t* row, int column, int rank) const {
    if (column >= rank) return 0;
    if (p_.key_rank % 2 == 0) return *reinterpret_cast<const std::uint32_t*>(row + column);
    return row[column] | (column + 1 < rank ? static_cast<std::uint32_t>(row[column + 1]) << 16 : 0);
  }

  MLA_DEVICE Columns read(int k) const {
    const int mine = lane() / 4;
    Columns columns;
    MLA_UNROLL
    for (int run = 0; run < kRuns; ++run) {
      const int pair = columns_[run].pair + mine / 2;
      const int rank = pair < p_.bands.decoded ? p_.key_rank : 0;  // else zeros, and nothing is read
      const std::uint16_t* row = p_.key_up + dim(columns_[run].group, pair, mine % 2) * p_.key_rank;
      MLA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int at = k + 16 * i + lane() % 4 * 2;
        columns.of[i][run][0] = two(row, at, rank);
        columns.of[i][run][1] = two(row, at + 8, rank);
      }
    }
    return columns;
  }

  MLA_DEVICE void multiply(const std::uint16_t* keys) {
    Columns now = read(0);
    for (int k = 0; k < p_.key_rank; k += 16 * kAhead) {
      const Columns next = read(k + 16 * kAhead);
      MLA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (k + 16 * i < p_.key_rank) add(keys + k + 16 * i, now.of[i]);
      }
      now = next;
    }
  }

  MLA_DEVICE void add(const std::uint16_t* keys, const std::uint32_t (&of)[kRuns][2]) {
    MLA_UNROLL
    for (int i = 0; i < kKeys / kMatrixRows; ++i) {
      std::uint32_t latent[4];
      load_matrices(latent, keys + i * kMatrixRows * p_.shared.tile_step);
      MLA_UNROLL
      for (int run = 0; run < kRuns; ++run) mma<T>(product_[run][i], latent, of[run][0], of[run][1]);
    }
  }

  MLA_DEVICE void turn(int run, int first, Sight real, std::uint16_t* tile) const {
    const auto& [group, first_pair, column] = columns_[run];
    const int pair = first_pair + lane() % 4;
    if (first_pair >= p_.bands.decoded) return;
    const bool decoded = pair < p_.bands.decoded;
    Complex mean{};
    if (decoded) mean = {T::widen(p_.key_mean[dim(group, pair, 0)]), T::widen(p_.key_mean[dim(group, pair, 1)])};
    const KeyTurn by(p_.tables, p_.bands, decoded ? pair : 0);
    MLA_UNROLL
    for (int i = 0; i < kKeys / 8; ++i) {
      const int key = i * 8 + lane() / 4;
      Complex turned{};
      if (decoded && key >= real.first && key < real.end) {
        const float(&of)[4] = product_[run][i / 2];
        turned = times({of[i % 2 * 2] + mean.re, of[i % 2 * 2 + 1] + mean.im}, by.at(first + key));
      }
      *reinterpret_cast<std::uint32_t*>(tile + key * p_.shared.tile_step + column + lane() % 4 * 2) =
          T::pack(turned.re, turned.im);
    }
  }

  const Attend& p_;
  const PairColumns columns_[kRuns];
  float product_[kRuns][kKeys / kMatrixRows][4] = {};
};

// The columns of all groups that the CTA's rows are of. `first` is the tile's first cache row.
template <class T>
MLA_DEVICE void decode_tile(const Attend& p, const Work& work, int first, Sight real, std::uint16_t* tile) {
  const int of_group = p.fine_width / 8, runs = work.groups * of_group;
  const auto columns = [&](int i) {
    return PairColumns{work.first_group + i / of_group, i < runs ? i % of_group * 4 : p.bands.decoded,
                       p.shared.fine_column + i * 8};
  };
  for (int i = warp() * 2; i < runs; i += threads() / 32 * 2) {
    if (p.tile == 64) {
      Decoder<T, 64>(p, columns(i), columns(i + 1)).decode(first, real, tile);
    } else {
      Decoder<T, 32>(p, columns(i), columns(i + 1)).decode(first, real, tile);
    }
  }
}

}  // namespace mla_pass::cuda
