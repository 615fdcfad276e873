#define MLA_PASS_ISA avx2
#include "vec_avx2.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_avx2;
const Isa isa_avx2 = avx2::isa_of("avx2", Meeting::float32);

}  // namespace mla_pass
