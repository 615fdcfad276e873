#define MLA_PASS_ISA amx
#include "vec_amx.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_amx;
const Isa isa_amx = {"amx", Meeting::two_terms, amx::kernels_of<float>(), amx::kernels_of<Half>(), amx::kernels_of<Bfloat>()};

}  // namespace mla_pass
