#define MLA_PASS_ISA scalar
#include "vec_scalar.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_scalar;
const Isa isa_scalar = scalar::isa_of("scalar", Meeting::float32);

}  // namespace mla_pass
