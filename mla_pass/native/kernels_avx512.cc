#define MLA_PASS_ISA avx512
#include "vec_avx512.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_avx512;
const Isa isa_avx512 = avx512::isa_of("avx512", Meeting::float32);

}  // namespace mla_pass
