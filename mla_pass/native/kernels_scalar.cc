#define MLA_PASS_ISA scalar
#include "vec_scalar.h"
#include "kernels.h"

namespace mla_pass {

extern const Isa isa_scalar;
const Isa isa_scalar = {"scalar", Meeting::float32, scalar::kernels_of<float>(), scalar::kernels_of<Half>(), scalar::kernels_of<Bfloat>()};

}  // namespace mla_pass
