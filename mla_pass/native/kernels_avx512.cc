#define MLA_PASS_ISA avx512
#include "vec_avx512.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_avx512;
const Isa isa_avx512 = {"avx512", Meeting::float32, avx512::kernels_of<float>(), avx512::kernels_of<Half>(), avx512::kernels_of<Bfloat>()};

}  // namespace mla_pass
