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

}  // namespace mla_pass::MLA_PASS_ISA
