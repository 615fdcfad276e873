#include "isa.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "contract.h"

namespace mla_pass {

extern const Isa isa_scalar;
#if defined(MLA_PASS_X86)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

namespace {

// Best first. The compiler's own check asks the operating system, too, whether it keeps the wide registers.
std::vector<const Isa*> usable() {
  std::vector<const Isa*> found;
#if defined(MLA_PASS_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&isa_avx512);
  if (avx2) found.push_back(&isa_avx2);
#endif
  found.push_back(&isa_scalar);
  return found;
}

const std::vector<const Isa*>& known() {
  static const std::vector<const Isa*> found = usable();
  return found;
}

}  // namespace

const Isa* usable_isa(Index i) {
  return i < static_cast<Index>(known().size()) ? known()[static_cast<std::size_t>(i)] : nullptr;
}

const Isa& chosen_isa() {
  const char* wanted = std::getenv("MLA_PASS_ISA");
  if (wanted == nullptr || *wanted == '\0') return *known().front();
  std::string names;
  for (const Isa* isa : known()) {
    if (std::string(isa->name) == wanted) return *isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw Refused(std::string("the environment variable MLA_PASS_ISA is '") + wanted +
                "'; expected one that this processor and this build have: " + names);
}

}  // namespace mla_pass
