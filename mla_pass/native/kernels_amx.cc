#define MLA_PASS_ISA amx
#include "vec_amx.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_amx;
const Isa isa_amx = amx::isa_of("amx", Meeting::two_terms);

}  // namespace mla_pass
