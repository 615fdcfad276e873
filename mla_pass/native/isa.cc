#include "isa.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "contract.h"

#if defined(MLA_PASS_AVX512BF16)
#include <cpuid.h>
#endif
#if defined(MLA_PASS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mla_pass {

extern const Isa isa_scalar;
#if defined(MLA_PASS_X86)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#if defined(MLA_PASS_AVX512BF16)
extern const Isa isa_avx512bf16;
#endif
#if defined(MLA_PASS_AMX)
extern const Isa isa_amx;
#endif
#endif

namespace {

#if defined(MLA_PASS_AVX512BF16)
// Whether vectors multiply pairs of bfloat16 numbers.
bool pairs_known() {
#if defined(MLA_PASS_EMULATE)
  return true;
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5)) != 0;
#endif
}
#endif

#if defined(MLA_PASS_AMX)
// Whether there are tiles and bfloat16 products on them, and the system lets this process use them: it keeps their
// registers only for those that ask.
bool amx_granted() {
#if defined(MLA_PASS_EMULATE)
  return true;
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat = 1u << 22, kTile = 1u << 24, kOsxsave = 1u << 27;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBfloat | kTile)) != (kBfloat | kTile)) return false;
  if (!pairs_known()) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsxsave) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl, see Linux' x86/xstate documentation
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

// Best first. The compiler's own check asks the operating system, too, whether it keeps the wide registers.
std::vector<const Isa*> usable() {
  std::vector<const Isa*> found;
#if defined(MLA_PASS_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(MLA_PASS_AMX)
  if (avx512 && amx_granted()) found.push_back(&isa_amx);
#endif
  if (avx512) found.push_back(&isa_avx512);
#if defined(MLA_PASS_AVX512BF16)
  // A pair takes as long as a float32 number on AMD's processors (Zen 4: 117 to 59 G multiply-adds/s of a core), and
  // four times as long on Intel's (Sapphire Rapids: 24 to 60), where it is there to be asked for.
  if (avx512 && pairs_known()) {
    found.insert(__builtin_cpu_is("amd") ? found.end() - 1 : found.end(), &isa_avx512bf16);
  }
#endif
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
