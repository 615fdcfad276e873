#define MLA_PASS_ISA avx512bf16
#include "vec_avx512bf16.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_avx512bf16;
const Isa isa_avx512bf16 = avx512bf16::isa_of("avx512bf16", Meeting::bfloat16);

}  // namespace mla_pass
