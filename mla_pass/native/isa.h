// Which of the compiled instruction sets this process uses.
#pragma once

#include "problem.h"

namespace mla_pass {

// The best one this processor runs, or the one that the environment variable MLA_PASS_ISA names. Throws Refused when
// that names none, or one that this processor or this build does not have.
const Isa& chosen_isa();

// The i-th of those that this processor runs, best first; null past the last.
const Isa* usable_isa(Index i);

}  // namespace mla_pass
