// Everything that is compiled once for each instruction set: include after the vectors, with MLA_PASS_ISA its name.
#pragma once

#include "absorb.h"
#include "expand.h"
#include "finish.h"

namespace mla_pass::MLA_PASS_ISA {

template <class T>
constexpr Kernels<T> kernels_of() {
  return {prepare<T>, absorb<T>, finish<T>, expand<T>};
}

constexpr Isa isa_of(const char* name, Meeting narrow) {
  return {name, narrow, kernels_of<float>(), kernels_of<Half>(), kernels_of<Bfloat>()};
}

}  // namespace mla_pass::MLA_PASS_ISA
