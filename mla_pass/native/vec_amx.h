// AVX-512 vectors beside a matrix unit: Intel AMX with bfloat16.
#pragma once

#define MLA_PASS_MATRIX_UNIT 1
#include "vec_avx512.h"
