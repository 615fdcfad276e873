// AVX-512 vectors that multiply pairs of bfloat16 numbers, too.
#pragma once

#define MLA_PASS_PAIRS 1
#include "vec_avx512.h"
