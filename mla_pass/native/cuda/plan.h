// How a call is cut into launches. Sizes go in, and what a device has; what comes out is plain data, made without a
// look at any number in the device's memory, so that a captured graph may be replayed while the cache fills.
//
//   setup, carry, append                           once
//   runs of new tokens                             so that what is kept of queries stays bounded
//     map, fix
//     waves: sequences by ranges of cache rows     so that what `absorb` or `expand` writes stays bounded, and is read
//       absorb or expand, attend                   again out of the second-level cache
//     combine, decode
#pragma once

#include <cstddef>

#include "../attention.h"
#include "launch.h"
#include "params.h"

namespace mla_pass::cuda {

// Parts of the scratch block, in bytes from its beginning; each begins at a multiple of 256.
struct Scratch {
  struct Piece {
    std::size_t at, bytes;
  };
  Piece span;    // Span of every sequence
  Piece fit;     // fits of band pairs
  Piece dims;    // mapped queries of a run
  Piece fixed;   // what `fix` makes of them
  Piece keys;    // of a wave: Attend.varying, or the expansion
  Piece mean;    // of a wave: Attend.mean
  Piece sum, top, mass;
  Piece joined;  // what `decode` decodes
};

// How `attend` meets the keys for runs of some number of tokens.
struct Tiling {
  Kernel kernel;
  int rows;  // that the kernel has room for
  int tile_rows, tile, stages, splits;
  std::size_t shared_bytes;
};

// A wave: so many sequences, and of each so many units of cache rows: blocks of Attend.varying, or 64 rows. Where
// queries are one block for all rows there is one unit.
struct Wave {
  int sequences, units;
  int unit;  // rows; 0: all
};

// All parameters that no address and no place in the sequence of launches decides are in the kernels' own structs.
struct Plan {
  bool expanded, exact;
  Type model;
  int bound;   // the most T can be
  int tokens;  // of a run; the last one may have fewer
  Tiling tiling, last_tiling;
  Wave wave;
  int column_shares;  // of `absorb`
  std::size_t absorb_bytes, expand_bytes, map_bytes, decode_bytes;  // of shared memory
  Scratch scratch;
  std::size_t scratch_bytes;

  Setup setup;
  Carry carry[2];
  Append append;
  Map map;
  Fix fix;
  Absorb absorb;
  Expand expand;
  Attend attend;
  Combine combine;
  Decode decode;
};

// Bytes of scratch for queries of a run of tokens, and for keys of a wave. More is used where a single token, or a
// single block of one sequence, takes more.
struct Room {
  Index queries = Index{256} << 20, keys = Index{256} << 20;
};

// `size` is what `checked` returned for these inputs, of which types, shapes and absences are looked at. Throws
// Unsupported where no kernel takes them.
Plan make_plan(const Layout& layout, const Sizes& size, const Inputs& inputs, Type model, Form form,
               const Device& device, const Room& room = {});

// Puts all launches of the call behind one another. Inputs, outputs and scratch are the device's memory: scratch at a
// multiple of 256, all else at multiples of 16. Nothing is allocated, and nothing waited for.
void run(const Plan& plan, const Inputs& inputs, const Outputs& outputs, void* scratch, Launcher& launcher);

}  // namespace mla_pass::cuda
