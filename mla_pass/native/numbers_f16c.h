// Single numbers to float32 and back with F16C, which every processor with AVX2 has.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace mla_pass::MLA_PASS_ISA {

inline float to_float(Half x) { return _cvtsh_ss(x.bits); }

inline void narrow(float x, Half* out) { out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

}  // namespace mla_pass::MLA_PASS_ISA
