// Angles and what keys are turned by.
#pragma once

#include "params.h"
#include "simt.h"

namespace mla_pass::cuda {

struct Complex {
  float re, im;
};

MLA_DEVICE Complex times(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// exp(j theta row) of a column of the tables.
MLA_DEVICE Complex angle(const Tables& tables, int row, int column) {
  const long long at = static_cast<long long>(row) * tables.angles + column;
  return {tables.cos[at], tables.sin[at]};
}

// What a band pair's keys are multiplied by: exp(j theta block's first row) (A0 + A1 offset).
class KeyTurn {
 public:
  MLA_DEVICE KeyTurn(const Tables& tables, const Bands& bands, int pair)
      : tables_(tables), column_(bands.index[pair]), block_(static_cast<unsigned>(bands.block[pair])) {
    const float* fit = bands.fit + pair * 4;
    constant_ = {fit[0], fit[1]};
    slope_ = {fit[2], fit[3]};
  }

  // Of a cache row.
  MLA_DEVICE Complex at(int row) const {
    const int offset = static_cast<int>(static_cast<unsigned>(row) % block_);
    const float by = static_cast<float>(offset);
    return times(angle(tables_, row - offset, column_),
                 {constant_.re + by * slope_.re, constant_.im + by * slope_.im});
  }

 private:
  const Tables& tables_;
  const int column_;
  const unsigned block_;
  Complex constant_, slope_;
};

MLA_DEVICE Complex key_turn(const Tables& tables, const Bands& bands, int pair, int row) {
  return KeyTurn(tables, bands, pair).at(row);
}

}  // namespace mla_pass::cuda
